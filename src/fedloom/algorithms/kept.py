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
    others = [j for j, weight in enumerate(weights) if j != base and weight]
    if not others:
        return adapters[base]
    mixed = {}
    for name, own in adapters[base].items():
        apart = torch.stack([adapters[j][name] for j in others]).sub_(own).flatten(1)
        mixed[name] = own + (apart.new_tensor([weights[j] for j in others]) @ apart).view_as(own)
    return mixed


def mixtures(weights: Tensor, adapters: Sequence[Tensors]) -> list[dict[str, Tensor]]:
    """Return every adapter's `mixture`, w_k + sum_j weights_kj (w_j - w_k): one matrix product a tensor, in float64.

    Each is w_k exactly where all others are equal to it or weigh nothing.

    Args:
        weights: (n, n); its diagonal is not looked at.  adapters: n > 0 of them.
    """
    alike = torch.tensor([[_equal(one, other) for other in adapters] for one in adapters])
    weights = weights.double().masked_fill(alike, 0)  # rounded products of equal adapters would not cancel
    shift = weights - weights.sum(1).diag()
    mixed: list[dict[str, Tensor]] = [{} for _ in adapters]
    for name, first in adapters[0].items():
        rows = torch.stack([one[name] for one in adapters]).double().flatten(1)
        moved = (rows + shift @ (rows - rows[0])).to(first.dtype)
        for own, row in zip(mixed, moved, strict=True):
            own[name] = row.view_as(first).clone()
    return mixed


def _equal(a: Tensors, b: Tensors) -> bool:
    return a is b or all(torch.equal(t, b[name]) for name, t in a.items())


def inner(adapters: Sequence[Tensors]) -> Tensor:
    """Return (n, n) inner products over all tensors, in float64."""
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in adapters[0] if adapters else ():
        rows = torch.stack([one[name].double().flatten() for one in adapters])
        total += rows @ rows.mT
    return total


def manhattan(adapters: Sequence[Tensors]) -> Tensor:
    """Return (n, n) sums of absolute differences over all tensors, in float64."""
    stacks = [torch.stack([one[name].double().flatten() for one in adapters]) for name in adapters[0]]
    return torch.stack([torch.cdist(rows, rows, p=1) for rows in stacks]).sum(0)


def squared_distances(k: int, adapters: Sequence[Tensors]) -> Tensor:
    """Return (n,) squared Euclidean distances of adapter k to each, over all tensors, in float64."""
    total = torch.zeros(len(adapters), dtype=torch.float64)
    for name in adapters[k]:
        apart = torch.stack([one[name] for one in adapters]).sub_(adapters[k][name]).flatten(1)
        total += torch.linalg.vector_norm(apart, dim=1, dtype=torch.float64).square()
    return total


def cosines_with(k: int, adapters: Sequence[Tensors], start: Tensors) -> Tensor:
    """Return (n,) cosines of adapter k's change since `start` with each one's, in float64; of no change it is 0."""
    products, squares = torch.zeros(2, len(adapters), dtype=torch.float64)
    for name, begun in start.items():
        rows = torch.stack([one[name] for one in adapters]).sub_(begun).double().flatten(1)
        products += rows @ rows[k]
        squares += rows.square().sum(1)
    both = (squares * squares[k]).sqrt()
    return torch.where(both > 0, products / both.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def cosines(adapters: Sequence[Tensors]) -> Tensor:
    """Return (n, n) cosines, in float64; that with an adapter of zeros is zero."""
    products = inner(adapters)
    sizes = products.diagonal().clamp_min(0).sqrt()
    both = sizes[:, None] * sizes[None, :]
    return torch.where(both > 0, products / both.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
