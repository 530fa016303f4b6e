"""FedAMP and HeurFedAMP (Huang et al., arXiv 2007.03797): every client is drawn to those that are like it.

    server:    keeps the latest w_k of every client;  u_k = sum_j xi_kj w_j
               xi_kj = alpha exp(-||w_k - w_j||^2 / sigma) / sigma  for j != k,   xi_kk = 1 - sum_j xi_kj
    client k:  min_w f_k(w) + lambda / (2 alpha) ||w - u_k||^2,  from its own w_k

HeurFedAMP takes cosines, as distances say little in many dimensions:

               xi_kj = (1 - xi) softmax_{j != k}(sigma cos(w_k, w_j)),   xi_kk = xi

w_k is what client k uses; one that has never trained uses the mean of all kept. u_k counts every client that has sent
something, absent ones as they were last. lambda = 0 is local training; with sigma near 0, u_k is w_k.

On the wire: down u_k, up the change of w_k: b P bytes each, of every client by itself, so that the server sees the
clients' adapters and keeps N of them.

Differs from the paper in: clients may be absent; alpha is constant. Unless it is given, N equal clients weigh the same
(xi_kj is 1/N at most, as with alpha = sigma / N) and the pull is lambda/2 ||w - u_k||^2: lambda N / (2 sigma), which
that alpha would make of it, grows with the federation until local steps diverge. Cosines are of the changes since the
common start, as A of a LoRA adapter begins equal everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from fedloom import tensors
from fedloom.algorithms import kept
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.phases import moved
from fedloom.client.optimizers import Sgd
from fedloom.types import Bundle, ClientUpdate, Memory, Message, Penalty, ServerState, Steps, Tensors, done

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

OWN = "personal"
"""Name of the memory group that holds a client's w."""


class FedAmp(FedAvg, name="fedamp"):
    """Every client is drawn to a mixture of all adapters, in which near ones weigh more."""

    personal: ClassVar[bool] = True
    needs_others: ClassVar[str] = "draws every client to those that are like it"
    mirrored: ClassVar[str] = "each client's own adapter"
    own_combine: ClassVar[str] = "every client is sent a mixture of its own"
    own_step: ClassVar[str] = "there is no global adapter"

    weighting: Literal["uniform"] = "uniform"
    """Every client counts the same."""
    lam: NonNegativeFloat = 0.1
    """lambda, strength of the pull to the mixture; 1 / alpha of it where alpha is given; 0 is local training."""
    sigma: PositiveFloat = 1.0
    """Squared distance over which likeness falls by a factor of e."""
    alpha: PositiveFloat | None = None
    """How much the others weigh, and what lambda is divided by; null: N equal clients weigh the same, and lambda is
    taken as it is."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        trainer = recipe.trainer
        if isinstance(trainer.optimizer, Sgd) and trainer.lr * self.pull >= 2:
            yield (
                f"trainer.lr x the pull of algorithm={self.part_name} (algorithm.lam / algorithm.alpha) is "
                f"{trainer.lr * self.pull:g}: from 2 on steps go ever further past the mixture; lower algorithm.lam or "
                "trainer.lr, or raise algorithm.alpha, to a product of at most 1"
            )

    def check_clients(self, clients: int) -> Iterable[str]:
        yield from super().check_clients(clients)
        others = clients - 1
        if self.alpha is not None and others > 0 and self.alpha * others > self.sigma:
            yield (
                f"algorithm.alpha={self.alpha:g}: {others} near clients would weigh "
                f"{self.alpha * others / self.sigma:g} together, and must not weigh more than 1; lower it to at most "
                f"{self.sigma / others:g}, raise algorithm.sigma, or set algorithm.alpha=null"
            )

    @property
    def pull(self) -> float:
        """lambda / alpha, or lambda."""
        return self.lam if self.alpha is None else self.lam / self.alpha

    def attention(self, own: int, adapters: Sequence[Tensors], start: Tensors, clients: int) -> list[float]:
        """Return xi_kj of the other adapters; the place of its own is not looked at.

        Args:
            own: k.  start: where all began.  clients: N.
        """
        share = 1 / clients if self.alpha is None else self.alpha / self.sigma
        apart = kept.squared_distances(own, adapters).tolist()
        return [share * math.exp(-distance / self.sigma) for distance in apart]

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        names = kept.everyone(state)
        if client in names:
            held = [kept.kept(state, name) for name in names]
            own = names.index(client)
            weights = self.attention(own, held, state.params, len(server.clients))
            towards = kept.mixture(weights, held, own)
        else:
            towards = kept.mean(state)
        return Message({"params": Bundle(towards)})

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        own = client.memory[OWN].tensors if OWN in client.memory else client.initial
        fitted = yield from client.fit(own, penalty=self._pull(message))
        update = client.update(tensors.sub(fitted.params, own), fitted)
        apart = tensors.norm(tensors.sub(own, message.groups["params"].tensors))
        update = replace(update, metrics={**update.metrics, "mixture_distance": apart})
        return update, {**client.memory, OWN: Bundle(moved(own, fitted))}

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        return done(kept.changes(updates))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        slots = {**state.slots, **kept.slots(kept.moved_on(state, combined))}
        return done(replace(state, round=state.round + 1, slots=slots))

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return None  # there is no global product

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return done(client.memory.get(OWN, message.groups["params"]).tensors)

    def adapt(self, client: Client, message: Message, steps: int) -> Steps[Tensors]:
        own = yield from self.own(client, message)
        fitted = yield from client.fit(own, steps=range(steps), penalty=self._pull(message))
        return fitted.params

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        if memory is None:
            return {}
        return {"personal": memory[OWN].tensors if OWN in memory else kept.mean(state)}

    def _pull(self, message: Message) -> Penalty:
        towards = message.groups["params"].tensors
        return lambda w: 0.5 * self.pull * tensors.sq_dist(w, towards)


class HeurFedAmp(FedAmp, name="heurfedamp"):
    """FedAMP with weights from a softmax of cosines, and a fixed weight of a client's own adapter."""

    sigma: PositiveFloat = 1.0
    """How much cosines count: the factor before the softmax."""
    alpha: PositiveFloat | None = None
    """What lambda is divided by; null: it is taken as it is."""
    self_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """xi, the weight of a client's own adapter."""

    def check_clients(self, clients: int) -> Iterable[str]:
        return super(FedAmp, self).check_clients(clients)  # the weights sum to one whatever alpha is

    def attention(self, own: int, adapters: Sequence[Tensors], start: Tensors, clients: int) -> list[float]:
        scores = [math.exp(self.sigma * cosine) for cosine in kept.cosines_with(own, adapters, start).tolist()]
        total = sum(score for j, score in enumerate(scores) if j != own)
        return [(1 - self.self_weight) * score / total if total else 0.0 for score in scores]
