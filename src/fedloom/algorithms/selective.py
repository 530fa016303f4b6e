"""Selective layer fine-tuning (arXiv 2408.15600): every client trains and uploads a few layers of its choice.

    client k:  g_kl = ||gradient of layer l|| at w^t on its first rows
    server:    masks m_k of R_k layers that maximise  sum_kl m_kl g_kl - (lambda/2) sum_{j != k} ||m_k - m_j||_1
    client k:  trains the layers of m_k from w^t
    server:    w_l <- w_l + sum_{k in S_l} p_k D_kl / sum_{j in S_l} p_j,   S_l: the cohort's clients with m_kl = 1

A layer is the index in a live name, such as `layers.3`. What an adapter trains outside all layers is trained and sent
by everybody. A layer that nobody trained gets the change zero. Baselines without gradients: `layer_rules`.

On the wire: down all layers, b P, and L bytes for the mask; up the chosen layers and 4 L bytes of scores (none with
rules that do not score). Before round 0 every client sends its scores of the initial adapter, 4 L bytes.

Differs from the paper in: masks are chosen among all clients, at the start of a round, from the scores that each sent
when it last took part, so that a round takes one exchange instead of two and the server need not wait for the cohort;
budgets are spent to the full; lambda counts in units of the mean score; gradients are of the adapter's tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from fedloom import tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.layer_rules import Asked, GradientNorm, LayerRule, layer_of, layers_of, of_layer
from fedloom.server.aggregate import wide
from fedloom.types import (
    Bundle,
    ClientUpdate,
    Gradient,
    Memory,
    Message,
    ServerState,
    Steps,
    Tensors,
    done,
)

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

MASKS, SCORES, LAYERS = "masks", "scores", "layers"
"""Slots with each client's mask and scores; the tensor that holds them in a message."""


class Selective(FedAvg, name="selective"):
    """FedAvg in which every client trains and sends its own choice of layers."""

    enrols: ClassVar[bool] = True
    own_combine: ClassVar[str] = "a layer is averaged over those clients alone that trained it"

    budget: PositiveInt | tuple[PositiveInt, ...] = 4
    """R, layers that a client trains; a list is dealt out in client order, over and over. More than there are: all."""
    rule: LayerRule = GradientNorm()
    """How layers are chosen."""
    examples: PositiveInt = 8
    """Rows of a client, its first ones, that the gradient is taken over."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        if not recipe.adapter.layered:
            yield (
                f"algorithm={self.part_name} chooses among the layers of the adapter, and adapter="
                f"{recipe.adapter.part_name} is one thing for all layers; set adapter=lora, or algorithm=fedavg"
            )

    def check(self, names: Sequence[str]) -> Iterable[str]:
        if all(layer_of(name) is None for name in names):
            yield (
                f"algorithm={self.part_name} finds layers by the number in names such as `layers.3`, and nothing that "
                f"the adapter trains has one (the first: {names[0]}); set adapter=lora, or algorithm=fedavg"
            )

    def enrol(self, client: Client) -> Steps[Message]:
        if not self.rule.scored:
            return Message()
        scores = yield from self._scores(client, client.initial)
        return Message({SCORES: Bundle({LAYERS: scores})})

    def admit(self, server: Server, state: ServerState, told: Mapping[str, Message]) -> Steps[ServerState]:
        scores = {name: word.groups[SCORES].tensors[LAYERS] for name, word in told.items() if SCORES in word.groups}
        return done(replace(state, slots={**state.slots, SCORES: Bundle(scores)}))

    def prepare(self, server: Server, state: ServerState) -> Steps[ServerState]:
        scores = state.slots.get(SCORES, Bundle()).tensors
        known = [name for name in server.clients if name in scores or not self.rule.scored]
        masks = self.masks(server, state, known)
        chosen = {name: mask.to(torch.uint8) for name, mask in zip(known, masks, strict=True)}
        return done(replace(state, slots={**state.slots, MASKS: Bundle(chosen)}))

    def masks(self, server: Server, state: ServerState, clients: list[str]) -> Tensor:
        """Return (clients, layers) bool: what each of some clients trains in this round."""
        told = state.slots.get(SCORES, Bundle()).tensors
        layers = len(layers_of(state.params))
        scores = torch.stack([told[name] for name in clients]) if self.rule.scored else torch.zeros(0, layers)
        budgets = [self.budget_of(server.clients.index(name)) for name in clients]
        return self.rule.masks(Asked(budgets, layers, scores.double(), server.stream(state.round, LAYERS)))

    def budget_of(self, place: int) -> int:
        """Return R of the client at a place of the client order."""
        return self.budget if isinstance(self.budget, int) else self.budget[place % len(self.budget)]

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        groups = dict(super().broadcast(server, state, client).groups)
        masks = state.slots.get(MASKS, Bundle()).tensors
        if client in masks:
            groups[MASKS] = Bundle({LAYERS: masks[client]})
        return Message(groups)

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start, mask = message.groups["params"].tensors, message.groups[MASKS].tensors[LAYERS].tolist()
        chosen = {layer for layer, on in zip(layers_of(start), mask, strict=True) if on}
        told: dict[str, Bundle] = {}
        if self.rule.scored:
            scores = yield from self._scores(client, start)
            told[SCORES] = Bundle({LAYERS: scores})
        fitted = yield from client.fit(start, trainable=lambda name: layer_of(name) in {None, *chosen})
        moved = [name for name in start if layer_of(name) in {None, *chosen}]
        delta = tensors.sub({n: fitted.params[n] for n in moved}, {n: start[n] for n in moved})
        update = client.update(delta, fitted, also=(), **told)
        return replace(update, metrics={**update.metrics, "layers": float(len(chosen))}), client.memory

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return None  # every layer is the mean over clients of its own

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        mean: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        scores: dict[str, Tensor] = {}
        total, count = 0.0, 0
        for update in updates:
            total, count = total + update.weight, count + 1
            if SCORES in update.message.groups:
                scores[update.client] = update.message.groups[SCORES].tensors[LAYERS]
            for name, t in update.message.groups["params"].tensors.items():
                weights[name] = weights.get(name, 0.0) + update.weight
                if name not in mean:
                    mean[name] = wide(t).clone()
                else:
                    mean[name].add_(t.to(mean[name].dtype) - mean[name], alpha=update.weight / weights[name])
        delta = {name: mean.get(name, torch.zeros_like(wide(t))) for name, t in state.params.items()}
        cohort = Bundle(scalars={"clients": float(count), "weight": total})
        return done(Message({"params": Bundle(delta), SCORES: Bundle(scores), "cohort": cohort}))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after = yield from super().step(server, state, combined)
        known = after.slots.get(SCORES, Bundle()).tensors
        newest = Bundle({**known, **combined.groups[SCORES].tensors})
        return replace(after, slots={**after.slots, SCORES: newest})

    def _scores(self, client: Client, params: Tensors) -> Steps[Tensor]:
        """Return (layers,) float32: the scores of an adapter's layers on the client's first rows."""
        gradient: Tensors = yield Gradient(params, self.examples)
        each = [self.rule.score(of_layer(gradient, i), of_layer(params, i)) for i in layers_of(params)]
        return torch.tensor(each, dtype=torch.float32)
