"""FedEM (Marfoq et al., arXiv 2108.10252): every client is a mixture of M shared components, in shares of its own.

    client k, E-step:  q_im = pi_km exp(-nll_im) / sum_m' pi_km' exp(-nll_im')   for each row i, nll_im of component m
              M-step:  pi_km = mean_i q_im,   theta_km = local steps on sum_i q_im / pi_km nll_im, from theta_m
    server:            theta_m <- theta_m + eta_s sum_k p_k pi_km (theta_km - theta_m),   each component by itself

A row is likely as a whole: nll_im is the sum over its answer, and so is the mixture's, which is what is measured:

    nll_i = -log sum_m pi_km exp(-nll_im)

pi stays with its client, which multiplies its changes by it. Answers are generated with the component of the largest
pi, since a mixture of sequences is not a mixture of next tokens. A client that never trained has equal shares. Where
a client is adapted, steps are E-steps: its shares move, the components do not; the loss is that of the mixture in the
new shares, answers are of the component with the largest.

Component 0 begins where FedAvg does and component m > 0 with the adapter that is drawn for round m, as equal components
would stay equal. M = 1 is FedAvg.

On the wire: M times FedAvg's bytes each way. A client passes over its rows M times, and takes M times the steps.

Differs from the paper in: sequences instead of labels; components begin apart by their draws; pi_km stands outside the
local steps. The paper steps on sum_i q_im nll_im and averages with p_k alone. With one step of plain SGD that is the
same, and with several to first order in the learning rate, as the factor is taken out of the loss and put before the
change. An optimiser that normalises gradients, such as AdamW, would lose the factor: a component would move as far at a
client that has no share in it as at those that it serves. The sum is not divided by sum_k p_k pi_km: that would take
the shares to the server, and make a component's pace the same however few use it. With equal shares all move at 1/M of
FedAvg's pace, for which `server.lr` can make up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from fedloom import tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.types import (
    Bundle,
    ClientUpdate,
    Fitted,
    Memory,
    Message,
    RecipeError,
    ServerState,
    Split,
    Steps,
    Tensors,
)

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

SHARES = "mixture"
"""Name of the memory group that holds a client's pi."""


class FedEm(FedAvg, name="fedem"):
    """Shared components, which every client mixes in its own shares."""

    personal: ClassVar[bool] = True

    components: PositiveInt = 3
    """M, how many adapters are shared; 1 is FedAvg."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        if self.components > 1 and recipe.init is not None:
            yield (
                "init: all components of algorithm=fedem would begin with that adapter and stay equal; remove it, or "
                "set algorithm.components=1"
            )

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        return Message({_group(m): Bundle(self._component(server, state, m)) for m in range(self.components)})

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        if self.components == 1:
            return (yield from super().train(client, message))
        responsible = yield from self._expected(client, message, _shares(client, self.components))
        shares = responsible.mean(0)
        weights = responsible / shares.clamp_min(torch.finfo(shares.dtype).tiny)  # of mean one
        fits, deltas = list[Fitted](), list[Tensors]()
        for m, start in enumerate(self._held(message)):
            fitted = yield from client.fit(start, weights=weights[:, m])
            fits.append(fitted)
            deltas.append(tensors.scale(tensors.sub(fitted.params, start), float(shares[m])))
        further = {_group(m): Bundle(deltas[m]) for m in range(1, self.components)}
        update = client.update(deltas[0], fits[0], also=fits[1:], **further)
        update = replace(update, changes=tuple(map(_group, range(self.components))))
        return update, {**client.memory, SHARES: Bundle({"pi": shares})}

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after = yield from super().step(server, state, combined)
        slots = dict(after.slots)
        for m in range(1, self.components):
            group, memo = _group(m), f"server_optimizer{m}"
            before, delta = self._component(server, state, m), combined.groups[group].tensors
            params, kept = server.optimizer.step(before, delta, state.slots.get(memo, Bundle()), server.lr)
            slots[group] = Bundle(params)
            if kept != Bundle():
                slots[memo] = kept
        return replace(after, slots=slots)

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return super().trained(server, state, update) if self.components == 1 else None

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return self._largest(message, _shares(client, self.components))
        yield

    def adapt(self, client: Client, message: Message, steps: int) -> Steps[Tensors]:
        if self.components == 1:
            return (yield from super().adapt(client, message, steps))
        return self._largest(message, (yield from self._adapted(client, message, steps)))

    def evaluate(self, client: Client, message: Message, split: Split) -> Steps[Bundle]:
        if self.components == 1:
            return (yield from super().evaluate(client, message, split))
        return (yield from self._mixtures_loss(client, message, split, _shares(client, self.components)))

    def evaluate_adapted(self, client: Client, message: Message, split: Split, steps: int) -> Steps[Bundle]:
        if self.components == 1:
            return (yield from super().evaluate_adapted(client, message, split, steps))
        shares = yield from self._adapted(client, message, steps)
        return (yield from self._mixtures_loss(client, message, split, shares))

    def _adapted(self, client: Client, message: Message, steps: int) -> Steps[Tensor]:
        """Return the client's pi after some E-steps on its training rows."""
        shares = _shares(client, self.components)
        nll = yield from self._nll(client, message, "train")
        for _ in range(steps):
            shares = _responsible(nll, shares).mean(0)
        return shares

    def _mixtures_loss(self, client: Client, message: Message, split: Split, shares: Tensor) -> Steps[Bundle]:
        """Return the loss sums of the mixture of all components in some shares."""
        found = []
        for component in self._held(message):
            found.append((yield from client.losses(component, split)).tensors)
        nll = torch.stack([one["nll"] for one in found], 1)
        mixed = -torch.logsumexp(shares.log() - nll, 1)
        sums = {"nll": mixed, "tokens": found[0]["tokens"], "bytes": found[0]["bytes"]}
        return Bundle(scalars={**{name: float(t.sum()) for name, t in sums.items()}, "examples": float(len(mixed))})

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        if memory is None:
            return {"shared": state.params} if self.components == 1 else {}
        m = int(memory[SHARES].tensors["pi"].argmax()) if SHARES in memory else 0
        return {"personal": state.slots[_group(m)].tensors if m else state.params}

    def _component(self, server: Server, state: ServerState, m: int) -> Tensors:
        """Return theta_m, as it is drawn before anybody has trained it.

        Raises:
            RecipeError: the adapter is drawn without chance, so that components would be equal.
        """
        if not m:
            return state.params
        if _group(m) in state.slots:
            return state.slots[_group(m)].tensors
        drawn = server.draw(m)
        if not state.round and all(torch.equal(t, drawn[name]) for name, t in state.params.items()):
            raise RecipeError(
                f"algorithm.components={self.components}: the adapter begins without chance, so that all components "
                "would begin and stay equal; set adapter=lora, or algorithm.components=1"
            )
        return drawn

    def _held(self, message: Message) -> list[Tensors]:
        return [message.groups[_group(m)].tensors for m in range(self.components)]

    def _nll(self, client: Client, message: Message, split: Split) -> Steps[Tensor]:
        """Return (rows, M) losses."""
        found = []
        for component in self._held(message):
            found.append((yield from client.losses(component, split)).tensors["nll"])
        return torch.stack(found, 1)

    def _expected(self, client: Client, message: Message, shares: Tensor) -> Steps[Tensor]:
        """Return (rows, M) which component is how likely to have made each training row."""
        nll = yield from self._nll(client, message, "train")
        return _responsible(nll, shares)

    def _largest(self, message: Message, shares: Tensor) -> Tensors:
        return self._held(message)[int(shares.argmax())]


def _group(m: int) -> str:
    return f"component{m}" if m else "params"


def _shares(client: Client, components: int) -> Tensor:
    """Return a client's pi, in float64."""
    if SHARES in client.memory:
        return client.memory[SHARES].tensors["pi"]
    return torch.full((components,), 1 / components, dtype=torch.float64)


def _responsible(nll: Tensor, shares: Tensor) -> Tensor:
    return torch.softmax(shares.log() - nll, 1)
