"""FedDPA (Yang et al., arXiv 2403.19211): a global and a local adapter, mixed anew for every question.

    layer        y = W_0 x + w s B_P A_P x + (1 - w) s B_G A_G x,     P_k: private, G: shared
    feddpa-t     client k:  P_k <- local steps with G^t frozen beside it, w = `local_weight`;  then G alone, as FedAvg
    feddpa-f     client k:  G alone, as FedAvg;  after the last round P_k <- local steps from G, once, alone
    server       FedAvg of G
    in use       w(x) = scale mean_i cos(e(x), e(x_i)),  not below 0,  over some of its own training questions x_i

e is the last hidden state of a question's last token with P_k in the layers. In its first round a client of feddpa-t
begins P_k with what it has made of G, so that the server, which is sent that, knows P_k until the client trains it
further. A client without P_k (unseen; feddpa-f before its end) uses G.

w is rounded to a multiple of `grid`, so that questions are answered side by side. Where one adapter must serve for all
questions (`fedloom chat`, a saved adapter), w is `local_weight`.

On the wire: as FedAvg, G. P_k never travels. What feddpa-f adds at the end is each client's broadcast of G, once more.

Differs from the paper in: w is rounded and not below 0; feddpa-t begins P_k in a client's first round, whichever it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch.nn import functional

from fedloom import slots, tensors
from fedloom.algorithms.base import Client, Suited
from fedloom.algorithms.fedavg import FedAvg
from fedloom.types import (
    Bundle,
    ClientUpdate,
    Embed,
    Fitted,
    Memory,
    Message,
    ServerState,
    Split,
    Steps,
    Tensors,
    done,
)

OWN = "local"
"""Name of the memory group that holds a client's P."""
Share = Annotated[float, Field(ge=0, le=1)]


class _FedDpa(FedAvg):
    """What both variants share: how P and G are mixed."""

    needs_lora: ClassVar[bool] = True
    personal: ClassVar[bool] = True

    local_weight: Share = 0.5
    """w where one adapter serves for all questions; with feddpa-t, while P is trained as well."""
    local_steps: PositiveInt | None = None
    """Optimiser steps on P each time that it is trained; null: as many as the trainer's in one round."""
    instances: PositiveInt = 5
    """Own training questions that a question is compared with, drawn once a client."""
    scale: Share = 0.5
    """w of a question that equals all of them."""
    grid: Share = 0.05
    """w is rounded to a multiple of it; 0: exact, every question alone."""

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return done(self._mixed(client.memory, message.groups["params"].tensors, self.local_weight))

    def suited(self, client: Client, message: Message, prompts: Sequence[str]) -> Steps[Suited]:
        shared = message.groups["params"].tensors
        if OWN not in client.memory:
            return Suited([0] * len(prompts), lambda _: shared)
        weights = yield from self._weights(client, "train", prompts)
        return Suited(weights, lambda weight: self._mixed(client.memory, shared, weight))

    def evaluate(self, client: Client, message: Message, split: Split) -> Steps[Bundle]:
        if OWN not in client.memory:
            return (yield from super().evaluate(client, message, split))
        weights = yield from self._weights(client, split, None)
        sums = {"nll": 0.0, "tokens": 0.0, "bytes": 0.0, "examples": float(len(weights))}
        for weight in sorted(set(weights)):
            rows = [row for row, one in enumerate(weights) if one == weight]
            adapter = self._mixed(client.memory, message.groups["params"].tensors, weight)
            found = yield from client.losses(adapter, split, rows)
            for name, values in found.tensors.items():
                sums[name] += float(values.sum())
        return Bundle(scalars=sums)

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        if memory is None:
            return {"shared": state.params}
        return {"personal": self._mixed(memory, state.params, self.local_weight)}

    def _weights(self, client: Client, split: Split, prompts: Sequence[str] | None) -> Steps[list[float]]:
        """Return w of each prompt, or (None) of each own row of `split`."""
        drawn = torch.randperm(client.examples, generator=client.stream("instances"))[: self.instances]
        local = client.memory[OWN].tensors
        known = yield Embed(local, rows=drawn.tolist())
        asked = yield Embed(local, split, prompts)
        cosines = functional.normalize(asked.double(), dim=1) @ functional.normalize(known.double(), dim=1).mT
        exact: list[float] = (self.scale * cosines.mean(1)).clamp(0, 1).tolist()
        return [min(1.0, round(one / self.grid) * self.grid) for one in exact] if self.grid else exact

    @staticmethod
    def _mixed(memory: Memory, shared: Tensors, weight: float) -> Tensors:
        if OWN not in memory:
            return shared
        return slots.beside(memory[OWN].tensors, shared, weights=(weight, 1 - weight))

    def _range(self) -> range | None:
        return None if self.local_steps is None else range(self.local_steps)


class FedDpaT(_FedDpa, name="feddpa-t"):
    """A local adapter trained in every round beside the frozen global one, mixed by question."""

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = message.groups["params"].tensors
        before: list[Fitted] = []
        own: Tensors = {}
        if OWN in client.memory:
            local = yield from self._fit_local(client, client.memory[OWN].tensors, start, self._range())
            before, own = [local], slots.main(local.params)
        fitted = yield from client.fit(start)
        update = client.update(tensors.sub(fitted.params, start), fitted, also=before)
        return update, {**client.memory, OWN: Bundle(own or fitted.params)}

    def adapt(self, client: Client, message: Message, steps: int) -> Steps[Tensors]:
        shared = message.groups["params"].tensors
        own = client.memory.get(OWN, Bundle(shared)).tensors
        return (yield from self._fit_local(client, own, shared, range(steps))).params

    def _fit_local(self, client: Client, own: Tensors, shared: Tensors, steps: range | None) -> Steps[Fitted]:
        mixture = slots.beside(own, shared, weights=(self.local_weight, 1 - self.local_weight))
        return (yield from client.fit(mixture, trainable=slots.is_main, steps=steps))


class FedDpaF(_FedDpa, name="feddpa-f"):
    """FedAvg, then a local adapter trained once from the global one, mixed by question."""

    finishes: ClassVar[bool] = True

    def finish(self, client: Client, message: Message) -> Steps[tuple[Mapping[str, float], Memory]]:
        start = message.groups["params"].tensors
        fitted = yield from client.fit(start, steps=self._range())
        return client.update({}, fitted).metrics, {**client.memory, OWN: Bundle(fitted.params)}

    def adapt(self, client: Client, message: Message, steps: int) -> Steps[Tensors]:
        shared = message.groups["params"].tensors
        fitted = yield from client.fit(client.memory.get(OWN, Bundle(shared)).tensors, steps=range(steps))
        return self._mixed({OWN: Bundle(fitted.params)}, shared, self.local_weight)
