"""What methods share that need the clients' products: the factors of their weighted mean, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedloom import factors, tensors
from fedloom.algorithms.base import Algorithm, Server
from fedloom.factors import Factors
from fedloom.types import Bundle, ClientUpdate, Message, ServerState, Tensors


def trained_all(
    algorithm: Algorithm, server: Server, state: ServerState, updates: Iterable[ClientUpdate]
) -> list[tuple[float, Tensors]]:
    """Return (p_k, trained adapter) of every client, with sum_k p_k = 1.

    Raises:
        ValueError: there is no update, or the server cannot tell what a client ended with.
    """
    held = [(update.weight, algorithm.trained(server, state, update)) for update in updates]
    total = sum(weight for weight, _ in held)
    if not held or any(params is None for _, params in held):
        raise ValueError("there is no update to combine, or one without an adapter")
    return [(weight / total, params) for weight, params in held if params is not None]


def mean_of(held: Sequence[tuple[float, Tensors]]) -> Tensors:
    """Return the weighted mean of the adapters, folded so that one adapter gives exactly itself."""
    total, mean = held[0]
    for p, params in held[1:]:
        total += p
        mean = tensors.add(mean, tensors.sub(params, mean), alpha=p / total)
    return mean


def combined_stack(
    algorithm: Algorithm, server: Server, state: ServerState, updates: Iterable[ClientUpdate]
) -> Message:
    """Return sum_k p_k s_k B_k A_k as factors of summed rank (group `stack`, scale 1)."""
    scale = server.ranks.scale
    parts = [(p, factors.pairs(params, scale)) for p, params in trained_all(algorithm, server, state, updates)]
    stacked = factors.unpaired(factors.stack_all(parts), lambda rank: 1.0)
    return Message({"stack": Bundle(stacked), "cohort": Bundle(scalars={"clients": float(len(parts))})})


def stack_of(combined: Message) -> dict[str, Factors]:
    """Return module -> the factors that `combined_stack` put side by side."""
    return factors.pairs(combined.groups["stack"].tensors, lambda rank: 1.0)
