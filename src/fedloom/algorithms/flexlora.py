"""FlexLoRA (Bai et al., arXiv 2402.11505): clients of any rank, averaged as products and cut apart again by SVD.

    server:    W = sum_k p_k s_k B_k A_k,   W = U S V^T
    client k:  starts from B = U_{:r_k} S_{:r_k} / s_k,  A = V^T_{:r_k};   s_k the scale of rank r_k

On the wire: down and up b r_k (d_in + d_out) a layer. What the global rank r cuts off is part of the aggregation error.

Differs from the paper in: the SVD is that of stacked factors (QR of both, SVD of the small core), so no d x d matrix is
built while the summed rank is below d; clients send the change of their factors; where W = 0 the old A is kept, since
its V is arbitrary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from fedloom import factors
from fedloom.algorithms.base import Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.stacking import combined_stack, stack_of
from fedloom.factors import Factors
from fedloom.types import Bundle, ClientUpdate, Message, ServerState, Steps, done


class FlexLora(FedAvg, name="flexlora"):
    """The SVD of the clients' mean product, cut to each client's rank."""

    needs_lora: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True
    own_combine: ClassVar[str] = "products are averaged, not factors"
    own_step: ClassVar[str] = "the mean product replaces the adapter"

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        scale, own = server.ranks.scale, server.ranks.of(client)
        whole = factors.pairs(state.params, scale)
        # the first directions of the global SVD are the best approximation of any smaller rank
        cut = {module: factors.resized(pair, own[module]) for module, pair in whole.items()}
        return Message({"params": Bundle(factors.unpaired(cut, scale))})

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        return done(combined_stack(self, server, state, updates))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        scale, old = server.ranks.scale, factors.pairs(state.params, server.ranks.scale)
        new = {}
        for module, pair in stack_of(combined).items():
            best = factors.truncate(pair, server.ranks.whole[module])
            new[module] = best if bool(best.b.any()) else Factors(old[module].a, best.b)
        return done(replace(state, round=state.round + 1, params=factors.unpaired(new, scale)))
