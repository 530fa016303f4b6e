"""Transforms: an ordered chain around any algorithm's update."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import PositiveFloat

from fedloom import tensors
from fedloom.parts import Part
from fedloom.types import ClientUpdate, Memory, Message


class Transform(Part, family=True):
    """One link of the chain: the client encodes, the server decodes, and `finish` acts on the combined update once."""

    def encode(self, update: ClientUpdate, memory: Memory, generator: torch.Generator) -> tuple[ClientUpdate, Memory]:
        """Change an update before it is sent; what must outlive the round goes into the client's memory."""
        return update, memory

    def decode(self, update: ClientUpdate) -> ClientUpdate:
        """Undo at the server what must be undone before updates are combined."""
        return update

    def finish(self, combined: Message, generator: torch.Generator) -> Message:
        """Act on the combined update."""
        return combined


class Clip(Transform, name="clip"):
    """Scale the change of the shared weights down to a largest Euclidean norm, joint over all that the client changed.

    Where clients share several adapters it is the norm over all of them; what is no change of weights, such as
    SCAFFOLD's control variates, is sent as it is.
    """

    norm: PositiveFloat
    """Largest norm of an update."""

    def encode(self, update: ClientUpdate, memory: Memory, generator: torch.Generator) -> tuple[ClientUpdate, Memory]:
        changes = {group: update.message.groups[group] for group in update.changes if group in update.message.groups}
        if not changes:
            return update, memory
        size = tensors.norm({f"{group}/{name}": t for group, one in changes.items() for name, t in one.tensors.items()})
        metrics = {**update.metrics, "update_norm": size}
        if size > self.norm:
            factor = self.norm / size
            changes = {
                group: replace(one, tensors=tensors.scale(one.tensors, factor)) for group, one in changes.items()
            }
        return replace(update, message=Message({**update.message.groups, **changes}), metrics=metrics), memory
