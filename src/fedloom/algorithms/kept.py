"""What methods share whose server keeps every client's adapter: where they lie, and how near they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedloom import tensors
from fedloom.algorithms.stacking import mean_of
from fedloom.types import Bundle, ClientUpdate, Memory, Message, ServerState, Tensors

SLOT = "client:"
"""Prefix of the slot with what one client has now."""
WHO = "who"
"""Name of the memory group that tells whose it is."""


def kept(state: ServerState, client: str) -> Tensors:
    """Return what a client has as far as the server knows; where everybody begins if it never sent anything."""
    return state.slots.get(f"{SLOT}{client}", Bundle(state.params)).tensors


def mean(state: ServerState) -> Tensors:
    """Return the mean over clients that have sent something; before that it is where everybody begins."""
    names = everyone(state)
    return mean_of([(1.0, kept(state, name)) for name in names]) if names else state.params


def everyone(state: ServerState) -> list[str]:
    """Return all clients that have sent something, in the order of their names."""
    return sorted(group.removeprefix(SLOT) for group in state.slots if group.startswith(SLOT))


def slots(adapters: Mapping[str, Tensors]) -> dict[str, Bundle]:
    """Return clients' adapters as slots of the state."""
    return {f"{SLOT}{name}": Bundle(params) for name, params in adapters.items()}


def changes(updates: Iterable[ClientUpdate]) -> Message:
    """Return every client's change as a group of its own."""
    return Message({f"{SLOT}{update.client}": update.message.groups["params"] for update in updates})


def moved_on(state: ServerState, combined: Message) -> dict[str, Tensors]:
    """Return client -> its adapter with the change of `changes` applied."""
    found: dict[str, Tensors] = {}
    for group, bundle in combined.groups.items():
        if group.startswith(SLOT):
            name = group.removeprefix(SLOT)
            found[name] = tensors.add(kept(state, name), bundle.tensors)
    return found


def signed(memory: Memory, client: str) -> Memory:
    """Return a client's memory with its name in it, by which its adapter is found at the server."""
    return memory if WHO in memory else {**memory, WHO: Bundle(texts={"client": client})}


def signer(memory: Memory) -> str | None:
    """Return whose memory it is; None: of one that never trained."""
    return memory[WHO].texts["client"] if WHO in memory else None


def mixture(weights: Sequence[float], adapters: Sequence[Tensors], base: int) -> Tensors:
    """Return w_b + sum_j weight_j (w_j - w_b), which is w_b exactly where the others are equal to it or weigh nothing.

    Args:
        base: b, which of the adapters.
    """
    mixed = dict(adapters[base])
    for j, weight in enumerate(weights):
        if j != base and weight:
            mixed = tensors.add(mixed, tensors.sub(adapters[j], adapters[base]), alpha=weight)
    return mixed


def inner(adapters: Sequence[Tensors]) -> Tensor:
    """Return (n, n) inner products over all tensors, in float64."""
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in adapters[0] if adapters else ():
        rows = torch.stack([one[name].double().flatten() for one in adapters])
        total += rows @ rows.mT
    return total


def cosines(adapters: Sequence[Tensors]) -> Tensor:
    """Return (n, n) cosines, in float64; that with an adapter of zeros is zero."""
    products = inner(adapters)
    sizes = products.diagonal().clamp_min(0).sqrt()
    both = sizes[:, None] * sizes[None, :]
    return torch.where(both > 0, products / both.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
