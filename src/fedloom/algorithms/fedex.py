"""FedEx-LoRA (Singhal et al., arXiv 2410.09432): factors are averaged, and what the average lacks goes into the base.

    client k:  as FedAvg, on W^t
    server:    A = sum_k p_k A_k,  B = sum_k p_k B_k
               R = s (sum_k p_k B_k A_k - B A) = s sum_{k<K} p_k (B_k - B)(A_k - A_K),   W^{t+1} = W^t + R

so that W^{t+1} + s B A is exactly W^t + sum_k p_k s B_k A_k.

On the wire: up as FedAvg; down A, B and R as factors of rank (K - 1) r, b (K - 1) r (d_in + d_out) a layer, for every
round that the client lacks. `truncate=r'` sends the best approximation of R of rank r' instead, which is not exact.

Differs from the paper in: weights p_k instead of uniform ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from pydantic import PositiveInt

from fedloom import baselog, factors
from fedloom.algorithms.base import Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.stacking import mean_of, stack_of, trained_all
from fedloom.factors import Factors
from fedloom.types import Bundle, ClientUpdate, Message, ServerState, Steps, Tensors, done


class FedEx(FedAvg, name="fedex"):
    """Averaged factors, and the rest of the mean product merged into the base."""

    needs_lora: ClassVar[bool] = True
    changes_base: ClassVar[bool] = True
    tells_missed: ClassVar[bool] = True
    own_combine: ClassVar[str] = "the residual needs every client's factors"
    own_step: ClassVar[str] = "the residual fits the mean factors alone"

    truncate: PositiveInt | None = None
    """Rank to which the residual is cut; null: exact."""

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        held = trained_all(self, server, state, updates)
        mean, scale = mean_of(held), server.ranks.scale
        residual = {}
        for module, rank in server.ranks.whole.items():
            parts = [_term(p, params, held[-1][1], mean, module) for p, params in held[:-1]]
            if parts:
                pair = factors.stack(parts).times(scale(rank))
                residual[module] = pair if self.truncate is None else factors.truncate(pair, self.truncate)
        stacked = factors.unpaired(residual, lambda rank: 1.0)
        cohort = Bundle(scalars={"clients": float(len(held))})
        return done(Message({"mean": Bundle(mean), "stack": Bundle(stacked), "cohort": cohort}))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after, residual = state.round + 1, stack_of(combined)
        base = baselog.merged(state.base, after, residual) if residual else state.base
        return done(replace(state, round=after, params=combined.groups["mean"].tensors, base=base))


def _term(p: float, params: Tensors, last: Tensors, mean: Tensors, module: str) -> Factors:
    """Return p_k (B_k - B)(A_k - A_K) of one module."""
    a, b = f"{module}.lora_A", f"{module}.lora_B"
    return Factors(params[a] - last[a], params[b] - mean[b], p)
