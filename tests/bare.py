"""A server and its surroundings without any model, for algorithms and aggregators driven by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fedloom import seeds
from fedloom.algorithms import Server
from fedloom.factors import Ranks
from fedloom.server.aggregate import Aggregator, Around, Mean
from fedloom.server.optim import ServerOptimizer, ServerSgd
from fedloom.types import Bundle, Tensors


def bare_server(
    clients: Sequence[str],
    *,
    aggregator: Aggregator | None = None,
    optimizer: ServerOptimizer | None = None,
    lr: float = 1.0,
    lora: Ranks | None = None,
    draw: Any = None,
) -> Server:
    """Return a server of some clients; `draw` is needed by algorithms that draw adapters anew."""
    return Server(
        tuple(clients),
        aggregator or Mean(),
        optimizer or ServerSgd(),
        lr,
        draw or _nothing,
        lambda round_, purpose: seeds.generator(0, round_, None, purpose),
        lora,
    )


def bare_around(params: Tensors | None = None, scale: Any = None, kept: Bundle | None = None) -> Around:
    """Return what an aggregator knows beside the updates."""
    return Around(params or {}, scale, kept or Bundle(), seeds.generator(0, 0, None, "aggregator"))


def _nothing(round_: int) -> dict[str, Tensor]:
    return {}
