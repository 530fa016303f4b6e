"""FedProx (Li et al., arXiv 1812.06127).

    client k:  min_w f_k(w) + mu/2 ||w - w^t||^2,  from w^t
    server:    FedAvg

On the wire: as FedAvg.

Differs from the paper in: a fixed number of local steps or epochs instead of an inexactness criterion; the term is
part of the loss, so with AdamW it passes through the preconditioner.
"""

from __future__ import annotations

from pydantic import NonNegativeFloat

from fedloom import tensors
from fedloom.algorithms.base import Client
from fedloom.algorithms.fedavg import FedAvg
from fedloom.types import ClientUpdate, Memory, Message, Steps


class FedProx(FedAvg, name="fedprox"):
    """FedAvg with a pull towards the broadcast weights."""

    mu: NonNegativeFloat = 0.01
    """Strength of the pull; 0 is FedAvg."""

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = message.groups["params"].tensors
        fitted = yield from client.fit(start, penalty=lambda w: 0.5 * self.mu * tensors.sq_dist(w, start))
        return client.update(tensors.sub(fitted.params, start), fitted), client.memory
