"""AFL, agnostic federated learning (Mohri et al., arXiv 1902.00146): the best weights for the worst mixture of clients.

    minimise   max_lambda sum_k lambda_k F_k(w),   lambda >= 0, sum lambda = 1
    client k:  F_k = its mean training loss at w;  D_k = w_k - w after local steps
    server:    w <- w + eta_s sum_k lambda_k D_k / sum_{j in cohort} lambda_j
               lambda <- projection onto the simplex of lambda + gamma (N/K) F,   F_k = 0 for clients outside the cohort

K clients of N take part; lambda starts uniform. A client whose lambda is 0 has no say in w until its loss has raised
it; if that holds for the whole cohort, w stays.

On the wire: as FedAvg, and up F_k, 8 bytes. Every client passes over its training rows once more, forward only.

Differs from the paper in: the local steps of FedAvg instead of one gradient step (equal for one step of SGD); the loss
of all training rows instead of a sample's; the result is the last w instead of the mean over all rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat

from fedloom import tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.types import Bundle, ClientUpdate, Memory, Message, ServerState, Steps, Tensors, done


class Afl(FedAvg, name="afl"):
    """FedAvg whose weights follow the clients' losses, for the best worst case."""

    own_combine: ClassVar[str] = "clients are weighted by a mixture that follows their losses"

    weighting: Literal["uniform"] = "uniform"
    """The mixture alone weights the clients."""
    gamma: NonNegativeFloat = 0.1
    """Learning rate of the mixture; 0 keeps it uniform."""

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = message.groups["params"].tensors
        sums = (yield from client.score(start, "train")).scalars
        loss = sums["nll"] / max(1.0, sums["tokens"])
        fitted = yield from client.fit(start)
        told = Bundle({"train": torch.tensor(loss, dtype=torch.float64)})
        update = client.update(tensors.sub(fitted.params, start), fitted, loss=told)
        return replace(update, metrics={**update.metrics, "loss_at_start": loss}), client.memory

    def mixture(self, server: Server, state: ServerState) -> Mapping[str, float]:
        """Return client -> lambda."""
        kept = state.slots.get("mixture")
        return kept.scalars if kept is not None else dict.fromkeys(server.clients, 1 / len(server.clients))

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        losses: dict[str, float] = {}
        weighted = _weighted(updates, self.mixture(server, state), losses)
        first = next(weighted, None)
        combined = Message({"params": Bundle(tensors.zeros_like(state.params))})
        if first is not None:
            combined = server.aggregator.combine(chain([first], weighted), self.around(server, state))
        return done(Message({**combined.groups, "losses": Bundle(scalars=losses)}))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after = yield from super().step(server, state, combined)
        old, losses = self.mixture(server, state), combined.groups["losses"].scalars
        rate = self.gamma * len(server.clients) / len(losses)
        raised = [old[name] + rate * losses.get(name, 0.0) for name in server.clients]
        new = dict(zip(server.clients, simplex(raised), strict=True))
        return replace(after, slots={**after.slots, "mixture": Bundle(scalars=new)})

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return None  # the weights of the mean that counts are the mixture's, not those of the updates


def _weighted(
    updates: Iterable[ClientUpdate], mixture: Mapping[str, float], losses: dict[str, float]
) -> Iterator[ClientUpdate]:
    """Yield the updates that have a weight in the mixture, with it, and note the losses of all."""
    for update in updates:
        groups = dict(update.message.groups)
        losses[update.client] = float(groups.pop("loss").tensors["train"])
        if mixture[update.client] > 0:
            yield replace(update, weight=mixture[update.client], message=Message(groups))


def simplex(values: Sequence[float]) -> list[float]:
    """Return the nearest point with non-negative coordinates of sum 1: every value less one threshold, cut at 0."""
    total, threshold = 0.0, 0.0
    for count, value in enumerate(sorted(values, reverse=True), 1):
        total += value
        if value <= (total - 1) / count:
            break  # this value and all below it become 0
        threshold = (total - 1) / count
    return [max(0.0, value - threshold) for value in values]
