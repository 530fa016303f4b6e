"""The aggregation error of a LoRA round: how far the new global product is from the mean of the clients' products.

    ideal  = sum_k p_k s_k B_k A_k,   p_k the clients' weights
    actual = s B A of the state after the round, plus what the round merged into the base
    error  = ||ideal - actual||_F / ||ideal||_F,  over all modules

Averaging A and B apart is biased, which this makes visible. With a server optimiser other than sgd at lr = 1 the error
holds what the optimiser did on top.

The products are seen through 32 random directions, Z (d_in, 32) with independent entries N(0, 1/32), so that an update
is folded in as it comes and no d_out x d_in matrix exists: E ||X Z||_F^2 = ||X||_F^2. The error is zero exactly where
the true one is; else it is an estimate, within a few percent of the true one over the layers of a real model. Layers
with d_in <= 32 are compared exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedloom import factors
from fedloom.algorithms.base import Algorithm, Server
from fedloom.factors import Factors
from fedloom.types import ClientUpdate, Merge, ServerState

DIRECTIONS = 32


class AggregationError:
    """Watches the updates of one round pass, and compares them with the state after it."""

    def __init__(self, algorithm: Algorithm, server: Server, state: ServerState) -> None:
        self.algorithm, self.server, self.state = algorithm, server, state
        self.known = server.lora is not None
        self._ideal: dict[str, Tensor] = {}
        self._weight = 0.0
        self._directions: dict[int, Tensor] = {}

    def watched(self, updates: Iterator[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Yield the updates as they are."""
        for update in updates:
            if self.known:
                self._add(update)
            yield update

    def against(self, after: ServerState) -> float | None:
        """Return the error of the round that ended in `after`; None: there is no global product, or it is zero."""
        exported = self.algorithm.export(after)
        if not self.known or not self._weight or not exported:
            return None
        scale = self.server.ranks.scale
        actual = {m: self._seen(pair) for m, pair in factors.pairs(next(iter(exported.values())), scale).items()}
        for merge in after.base:
            if all(merge is not old for old in self.state.base) and not merge.whole:
                for module, pair in _pairs_of(merge).items():
                    actual[module] = actual[module] + self._seen(pair)
        ideal = {module: total / self._weight for module, total in self._ideal.items()}
        size = math.fsum(float(t.double().square().sum()) for t in ideal.values())
        apart = math.fsum(float((ideal[m] - actual[m]).double().square().sum()) for m in ideal)
        return math.sqrt(apart / size) if size else None

    def _add(self, update: ClientUpdate) -> None:
        trained = self.algorithm.trained(self.server, self.state, update)
        if trained is None:
            self.known = False
            return
        self._weight += update.weight
        for module, pair in factors.pairs(trained, self.server.ranks.scale).items():
            seen = self._seen(pair) * update.weight
            self._ideal[module] = self._ideal[module] + seen if module in self._ideal else seen

    def _seen(self, pair: Factors) -> Tensor:
        """Return s B A Z, (d_out, 32)."""
        d_in = pair.a.shape[1]
        if d_in <= DIRECTIONS:
            return pair.product()
        if d_in not in self._directions:
            stream = self.server.stream(self.state.round, f"aggregation error:{d_in}")
            drawn = torch.randn(d_in, DIRECTIONS, generator=stream, dtype=torch.float64) / math.sqrt(DIRECTIONS)
            self._directions[d_in] = drawn.to(pair.a.dtype)
        return pair.scale * (pair.b @ (pair.a @ self._directions[d_in]))


def _pairs_of(merge: Merge) -> Mapping[str, Factors]:
    return factors.pairs(merge.tensors, lambda rank: 1.0)
