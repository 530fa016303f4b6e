"""HetLoRA (Cho et al., arXiv 2401.06432): clients of any rank, padded with zeros; ranks that do no good are given up.

    client k:  starts from the first r_k rows of A and columns of B
               adds lambda ||A_tail|| ||B_tail|| to its loss; the tail is what lies beyond rank max(1, floor(gamma r_k))
               gives up the tail of a module if ||A_tail|| ||B_tail|| is smaller after training than before
    server:    A = sum_k q_k pad(A_k),  B = sum_k q_k pad(B_k),   q_k = ||s_k B_k A_k|| / sum_j ||s_j B_j A_j||

Norms are Frobenius norms, in q_k over all modules together. A rank that was given up stays so: the server remembers it
from the update, and sends no more of it.

On the wire: down b r_k (d_in + d_out) a layer, up the same, without what was given up.

Averaging factors is biased, as in FedAvg; the aggregation error is measured against the mean by `weighting`. The tail
of a small federation fades, since clients of small rank pull it to zero.

Differs from the paper in: s_k = alpha / r_k depends on the rank, so factors are padded and cut times the square root of
the ratio of scales, each, and keep their product; the change of the padded factors is what is combined, so that robust
rules and server optimisers apply; rows that no client of the cohort has are left alone (zero in both factors could
never move again), and rows that no client at all has are zero.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from fedloom import factors, tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.factors import Factors, Scale
from fedloom.types import Bundle, ClientUpdate, Memory, Message, Penalty, ServerState, Steps, Tensors, done

RANKS = "ranks"
"""Name of the slot with the ranks that clients have come down to: `<client>/<module>` -> rank."""


class HetLora(FedAvg, name="hetlora"):
    """FedAvg of padded factors, with clients that prune their ranks."""

    needs_lora: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True

    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Share of its rank, rounded down, that a client keeps when it prunes; never below 1."""
    prune_penalty: NonNegativeFloat = 1e-3
    """lambda, the pull on the tail; 0: nothing is pruned."""
    by_norm: bool = True
    """Weigh clients by the norms of their products, as the paper does; else as `weighting` says."""

    def prepare(self, server: Server, state: ServerState) -> Steps[ServerState]:
        begun = yield from super().prepare(server, state)
        return begun if begun.round else self._within(server, begun)

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        return Message({"params": Bundle(self._cut(server, state, self.ranks(server, state, client)))})

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        if client.lora is None:
            raise TypeError("the adapter has no LoRA factors")
        start, scale = message.groups["params"].tensors, client.lora.scale
        fitted = yield from client.fit(start, penalty=self.penalty(start))
        ranks = self.kept(start, fitted.params)
        ended, begun = (_sized(params, ranks, scale) for params in (fitted.params, start))
        update = client.update(tensors.sub(ended, begun), fitted)
        metrics = {**update.metrics, "rank": sum(ranks.values()) / len(ranks)}
        return replace(update, metrics=metrics), client.memory

    def penalty(self, start: Tensors) -> Penalty | None:
        """Return what pulls on the tails of an adapter of these shapes; None: nothing does."""
        if not self.prune_penalty or not self._tails(start):
            return None
        return lambda params: self.prune_penalty * torch.stack(list(self._tails(params).values())).sum()

    def kept(self, start: Tensors, ended: Tensors) -> dict[str, int]:
        """Return module -> the rank that a client goes on with.

        Args:
            start, ended: its adapter before and after training.
        """
        ranks = {m: pair.rank for m, pair in factors.pairs(start, _one).items()}
        if self.prune_penalty:
            before, after = self._tails(start), self._tails(ended)
            ranks |= {m: self._core(ranks[m]) for m in before if float(after[m]) < float(before[m])}
        return ranks

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors:
        delta = update.message.groups["params"].tensors
        return tensors.add(self._cut(server, state, _ranks_of(delta)), delta)

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        fewer: dict[str, float] = {}
        largest = dict.fromkeys(server.ranks.whole, 0)
        padded = self._padded(server, state, updates, fewer, largest)
        combined = server.aggregator.combine(padded, self.around(server, state))
        delta = _cleared(combined.groups["params"].tensors, largest)
        return done(Message({**combined.groups, "params": Bundle(delta), RANKS: Bundle(scalars=fewer)}))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after = yield from super().step(server, state, combined)
        ranks = {**state.slots.get(RANKS, Bundle()).scalars, **combined.groups[RANKS].scalars}
        slots = {**after.slots, RANKS: Bundle(scalars=ranks)} if ranks else after.slots
        return self._within(server, replace(after, slots=slots))

    @staticmethod
    def ranks(server: Server, state: ServerState, client: str) -> Mapping[str, int]:
        """Return module -> the rank that a client has come down to."""
        own, slot = server.ranks.of(client), state.slots.get(RANKS, Bundle()).scalars
        return {m: int(slot.get(f"{client}/{m}", rank)) for m, rank in own.items()} if slot else own

    def _padded(
        self,
        server: Server,
        state: ServerState,
        updates: Iterable[ClientUpdate],
        fewer: dict[str, float],
        largest: dict[str, int],
    ) -> Iterator[ClientUpdate]:
        """Yield the updates as changes of padded factors; note the ranks given up, and the cohort's largest ones."""
        scale = server.ranks.scale
        for update in updates:
            trained = self.trained(server, state, update)
            before = self.ranks(server, state, update.client)
            for module, rank in _ranks_of(trained).items():
                largest[module] = max(largest[module], rank)
                if rank < before[module]:
                    fewer[f"{update.client}/{module}"] = float(rank)
            change = tensors.sub(_sized(trained, server.ranks.whole, scale), state.params)
            weight = _norm(trained, scale) if self.by_norm else update.weight
            groups = {**update.message.groups, "params": Bundle(change)}
            yield replace(update, weight=weight, message=Message(groups))

    def _cut(self, server: Server, state: ServerState, ranks: Mapping[str, int]) -> dict[str, Tensor]:
        return _sized(state.params, ranks, server.ranks.scale)

    def _within(self, server: Server, state: ServerState) -> ServerState:
        """Return the state with zeros in the rows that no client has."""
        # clients of the same ranks mostly share one mapping
        held = {id(one): one for one in (self.ranks(server, state, name) for name in server.clients)}.values()
        largest = {m: max(one[m] for one in held) for m in server.ranks.whole}
        return replace(state, params=_cleared(state.params, largest))

    def _core(self, rank: int) -> int:
        # 0.9 of 10 is 9, whatever the rounding of the product
        return max(1, math.floor(self.gamma * rank + 1e-9))

    def _tails(self, params: Tensors) -> dict[str, Tensor]:
        """Return module -> ||A_tail|| ||B_tail||, differentiable, of the modules that have a tail."""
        found = {}
        for module, pair in factors.pairs(params, _one).items():
            core = self._core(pair.rank)
            if core < pair.rank:
                # the gradient of this norm at zero is zero
                found[module] = torch.linalg.vector_norm(pair.a[core:]) * torch.linalg.vector_norm(pair.b[:, core:])
        return found


def _sized(params: Tensors, ranks: Mapping[str, int], scale: Scale) -> dict[str, Tensor]:
    """Return an adapter cut or padded to ranks, with the same products where nothing is cut off."""
    sized = {}
    for module, pair in factors.pairs(params, scale).items():
        one = factors.resized(pair, ranks[module])
        ratio = math.sqrt(one.scale / scale(one.rank))
        sized[module] = Factors(one.a * ratio, one.b * ratio) if ratio != 1 else one
    return factors.unpaired({m: Factors(p.a, p.b) for m, p in sized.items()}, _one)


def _cleared(params: Tensors, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Return an adapter of the same shapes with zeros beyond the given ranks."""
    found = {m: factors.resized(pair, ranks[m]) for m, pair in factors.pairs(params, _one).items()}
    whole = _ranks_of(params)
    return factors.unpaired({m: factors.resized(pair, whole[m]) for m, pair in found.items()}, _one)


def _ranks_of(params: Tensors) -> dict[str, int]:
    return {m: pair.rank for m, pair in factors.pairs(params, _one).items()}


def _norm(params: Tensors, scale: Scale) -> float:
    """Return ||s B A|| over all modules; a number above zero, so that clients without any product weigh the same."""
    norms = (factors.norm(pair) for pair in factors.pairs(params, scale).values())
    return max(math.hypot(*norms), sys.float_info.min)


def _one(rank: int) -> float:
    return 1.0
