"""FedSVD (Lee et al., arXiv 2505.12805): B is trained on an A whose rows are orthonormal, renewed every round by SVD.

    client k:  trains B_k from B^t, on A^t
    server:    B = sum_k p_k B_k,   B A^t = U S V^T
               A^{t+1} = V^T,   B^{t+1} = U S

The mean is exact, as in FFA-LoRA, and the new factors have the same product. V^T spans the rows that A spans, in the
order in which the update needs them: the row space stays that of the first A.

On the wire: down b r (d_in + d_out) a layer, up b r d_out.

Differs from the paper in: the first A is made orthonormal too; the SVD is that of thin factors; all of A and B are sent
every round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from fedloom import factors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.halves import applied, change, half, moves, product_problems
from fedloom.types import ClientUpdate, Memory, Message, ServerState, Steps, Tensors

if TYPE_CHECKING:
    from fedloom.recipe import Recipe


class FedSvd(FedAvg, name="fedsvd"):
    """FedAvg of B on the right singular vectors of the product so far."""

    needs_lora: ClassVar[bool] = True
    own_step: ClassVar[str] = "the basis of B is another one in every round"

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        yield from product_problems(self.part_name, recipe)
        if recipe.server.aggregator.remembers:
            yield (
                f"server.aggregator={recipe.server.aggregator.part_name} compares updates with earlier ones, and "
                f"{self.own_step} of algorithm=fedsvd; set server.aggregator to one that does not, or "
                "algorithm=ffa-lora"
            )

    def init(self, params: Tensors) -> ServerState:
        return ServerState(0, _orthonormal(params))

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = message.groups["params"].tensors
        fitted = yield from client.fit(start, trainable=moves("lora_B"))
        return client.update(change(fitted.params, start, "lora_B"), fitted), client.memory

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return applied(state.params, update.message.groups["params"].tensors)

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after = yield from super().step(server, replace(state, params=half(state.params, "lora_B")), combined)
        return replace(after, params=_orthonormal({**state.params, **after.params}))


def _orthonormal(params: Tensors) -> Tensors:
    """Return the adapter of the same products whose A has orthonormal rows (where the rank is below the dimensions)."""
    best = {m: factors.truncate(pair, pair.rank) for m, pair in factors.pairs(params, _one).items()}
    return factors.unpaired(best, _one)


def _one(rank: int) -> float:
    return 1.0
