"""DiLoCo (Douillard et al., arXiv 2311.08105): many inner steps of an optimiser that goes on, Nesterov's outside.

    client k:  w_k = H steps (`trainer.steps`) of AdamW from w, its moments those after the client's last round
    server:    D = mean_k(w_k) - w,   v <- mu v + D,   w <- w + eta (D + mu v)       (eta = 0.7, mu = 0.9)

On the wire: as FedAvg. The inner moments, two values a parameter with AdamW, stay in the client's memory.

Differs from the paper in: it fine-tunes; clients may be sampled, and one that was absent goes on with the moments that
it had.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from fedloom import tensors
from fedloom.algorithms.base import Client
from fedloom.algorithms.fedavg import FedAvg
from fedloom.server.optim import Nesterov
from fedloom.types import Bundle, ClientUpdate, Memory, Message, Steps

if TYPE_CHECKING:
    from fedloom.recipe import Recipe


class DiLoCo(FedAvg, name="diloco"):
    """FedAvg whose clients keep their optimiser's state, under an outer Nesterov momentum."""

    weighting: Literal["examples", "uniform"] = "uniform"
    """Weight of a client in the mean: 1, as in the paper, or its true number of training rows."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        outer = recipe.server.optimizer
        if not isinstance(outer, Nesterov):
            yield (
                f"server.optimizer={outer.part_name}: algorithm=diloco needs Nesterov's momentum at the server; set "
                "server.optimizer=nesterov and server.lr=0.7 (the paper's)"
            )

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = message.groups["params"].tensors
        fitted = yield from client.fit(start, optimizer_state=client.memory.get("optimizer", Bundle()))
        memory = {**client.memory, "optimizer": fitted.optimizer_state}
        return client.update(tensors.sub(fitted.params, start), fitted), memory
