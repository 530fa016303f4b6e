"""Transforms: an ordered chain around any algorithm's update."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat

from fedloom import tensors
from fedloom.parts import Part
from fedloom.types import Bundle, ClientUpdate, Memory, Message


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
    """Scale the change of the shared weights down to a largest joint Euclidean norm."""

    norm: PositiveFloat
    """Largest norm of an update."""

    def encode(self, update: ClientUpdate, memory: Memory, generator: torch.Generator) -> tuple[ClientUpdate, Memory]:
        if "params" not in update.message.groups:
            return update, memory
        delta = update.message.groups["params"].tensors
        size = tensors.norm(delta)
        metrics = {**update.metrics, "update_norm": size}
        groups = dict(update.message.groups)
        if size > self.norm:
            groups["params"] = Bundle(tensors.scale(delta, self.norm / size))
        return ClientUpdate(update.client, update.weight, Message(groups), metrics), memory
