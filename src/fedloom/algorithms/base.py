"""The contract of a federated algorithm: pure methods over explicit state; the defaults are FedAvg (arXiv 1602.05629).

Client methods are coroutines that yield effects (`Fit`, `Score`, ...), so one file runs wherever a runtime can perform
them. A method must read only its arguments and what effects return, never live weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch

from fedloom import baselog, seeds, tensors
from fedloom.factors import Ranks
from fedloom.parts import Part
from fedloom.server.aggregate import Aggregator, Around
from fedloom.server.optim import ServerOptimizer
from fedloom.types import (
    Bundle,
    ClientUpdate,
    Fit,
    Fitted,
    Losses,
    Memory,
    Message,
    Score,
    ServerState,
    Split,
    Steps,
    Tensors,
    done,
)

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

Rows = TypeVar("Rows")


@dataclass(frozen=True, slots=True)
class Client:
    """What a client's half of an algorithm sees.

    Attributes:
        name: the client.  round: the current round, from 0.
        memory: the client's private groups as of its last finished round; empty before the first.
        examples: true number of its training rows.  weight: its weight in the mean.
        initial: the adapter that every participant starts from (`init`, or drawn from the seed), in its own ranks.
        draw: round -> a fresh adapter (A random, B zero) that every participant draws alike, in its own ranks.
        lora: what ranks mean; None: the adapter has no LoRA factors.
        steps: optimiser steps that the trainer gives it in this round.
        seed: of the run; see `stream`.
        lr: of its fits, unless they say otherwise; None: the trainer's.
    """

    name: str
    round: int
    memory: Memory
    examples: int
    weight: float
    initial: Tensors
    draw: Callable[[int], Tensors]
    lora: Ranks | None = None
    steps: int = 1
    seed: int = 0
    lr: float | None = None

    def stream(self, purpose: str, round_: int | None = None) -> torch.Generator:
        """Return the client's own random stream for a purpose; the same in every round unless it is of one."""
        return seeds.generator(self.seed, round_, self.name, purpose)

    def fit(self, start: Tensors, **how: Any) -> Steps[Fitted]:
        """Train on the client's rows, from `start`.

        Args:
            how: further fields of `Fit`.
        """
        fitted: Fitted = yield Fit(start, **{"lr": self.lr, **how})
        return fitted

    def score(self, params: Tensors | None, split: Split) -> Steps[Bundle]:
        """Return the loss sums (nll, tokens, bytes, examples) of `params` (None: the base) on the rows of `split`."""
        sums: Bundle = yield Score(params, split)
        return sums

    def losses(self, params: Tensors | None, split: Split, rows: Sequence[int] | None = None) -> Steps[Bundle]:
        """Return the loss of `params` on each row of `split`, or on some of them; see `Losses`."""
        found: Bundle = yield Losses(params, split, rows=rows)
        return found

    def update(self, delta: Tensors, fitted: Fitted, *, also: Iterable[Fitted] = (), **groups: Bundle) -> ClientUpdate:
        """Pack a change of the shared weights, and further groups, as this client's update.

        Args:
            delta: trained minus broadcast weights.
            fitted: gives the metrics `loss`, `examples`, `tokens`, `steps`, `lr`.
            also: what else was trained in this round: its steps, examples and tokens count too.
            groups: further groups of the message.
        """
        every = [fitted, *also]
        loss = sum(fitted.losses) / max(1, len(fitted.losses))
        metrics = {
            "loss": loss,
            "loss_first": fitted.losses[0] if fitted.losses else float("nan"),
            "examples": sum(one.examples for one in every),
            "tokens": sum(one.tokens for one in every),
            "steps": sum(one.steps for one in every),
            "lr": fitted.lr,
        }
        message = Message({"params": Bundle(delta), **groups})
        return ClientUpdate(self.name, self.weight, message, metrics)


@dataclass(frozen=True, slots=True)
class Suited:
    """Which adapter serves which prompt.

    Attributes:
        keys: one a prompt; prompts of one key have one adapter.  make: a key -> its adapter.
    """

    keys: Sequence[Hashable]
    make: Callable[[Any], Tensors]


@dataclass(frozen=True, slots=True)
class Server:
    """What a server's half of an algorithm sees.

    Attributes:
        clients: who may take part, sampled or not, in client order.
        aggregator: how updates are combined.  optimizer: how a combined update is applied.
        lr: the server's learning rate.
        draw: round -> a fresh adapter (A random, B zero), as every client draws it.
        stream: (round, purpose) -> the random stream of the server for it.
        lora: the clients' ranks and what they mean; None: the adapter has no LoRA factors.
    """

    clients: Sequence[str]
    aggregator: Aggregator
    optimizer: ServerOptimizer
    lr: float
    draw: Callable[[int], Tensors]
    stream: Callable[[int, str], torch.Generator]
    lora: Ranks | None = None

    @property
    def ranks(self) -> Ranks:
        """The clients' ranks, for algorithms that declare `needs_lora`.

        Raises:
            TypeError: the adapter has no LoRA factors.
        """
        if self.lora is None:
            raise TypeError("the adapter has no LoRA factors")
        return self.lora


class Algorithm(Part, family=True):
    """A federated method; every default is FedAvg's."""

    regime: ClassVar[str] = "federated"
    """Under which name its results are reported."""
    personal: ClassVar[bool] = False
    """Whether clients end with adapters of their own, kept in their memories."""
    needs_others: ClassVar[str] = ""
    """What it does that takes other clients, so that a federation of one is refused; empty: nothing."""
    mirrored: ClassVar[str] = ""
    """What clients and server both add the sent changes to, each on its own side, so that transforms, which change what
    is sent alone, are refused; empty: nothing."""
    enrols: ClassVar[bool] = False
    """Whether every client has a word with the server before the first round (`enrol`, `admit`)."""
    finishes: ClassVar[bool] = False
    """Whether every client works on by itself after the last round (`finish`)."""
    alone: ClassVar[str] = ""
    """Why its clients must be trained one after another; empty: they need not."""
    needs_lora: ClassVar[bool] = False
    """Whether it works on LoRA factors, so that other adapters are refused."""
    needs_core: ClassVar[bool] = False
    """Whether it trains R of B R A alone; only such algorithms and such adapters (`Adapter.core`) go together."""
    mixed_ranks: ClassVar[bool] = False
    """Whether clients may have ranks of their own (`adapter.ranks`)."""
    own_combine: ClassVar[str] = ""
    """Why it combines updates in its own way, so that robust rules are refused; empty: the aggregator does it."""
    own_step: ClassVar[str] = ""
    """Why its server applies what was combined in its own way, so that server optimisers are refused."""
    by_tensor: ClassVar[str] = ""
    """What it does that takes gradients of the very tensors that it sends (`Fit.correct`, zeroth order); empty: no."""
    changes_base: ClassVar[bool] = False
    """Whether it merges into the base weights."""
    tells_missed: ClassVar[bool] = False
    """Whether a client is told what it missed since it was last seen, so that `ServerState.seen` must be kept."""

    weighting: Literal["examples", "uniform"] = "examples"
    """Weight of a client in the mean: its true number of training rows, or 1."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        """Yield why this algorithm cannot run with other parts of the recipe, one sentence each."""
        return ()

    def check(self, names: Sequence[str]) -> Iterable[str]:
        """Yield why this algorithm cannot run with an adapter of these trained tensors, one sentence each.

        What a recipe alone does not tell: it is asked once the adapter is in the model, before anything is trained.
        """
        return ()

    def check_clients(self, clients: int) -> Iterable[str]:
        """Yield why this algorithm cannot run with so many clients that train, one sentence each.

        It is asked when the recipe is read, where that tells their number, and again once the rows are given out,
        before anything is trained.
        """
        if self.needs_others and clients == 1:
            yield (
                f"algorithm={self.part_name} {self.needs_others}, and there are no others; let more clients train "
                "(data.clients, data.partition, data.unseen), or set algorithm=local"
            )

    def population(self, clients: Mapping[str, Rows], join: Callable[[Iterable[Rows]], Rows]) -> Mapping[str, Rows]:
        """Return who trains on what; the default is every client on its own rows.

        Args:
            clients: client -> its rows.
            join: makes one set of rows of several.
        """
        return clients

    def weight(self, examples: int) -> float:
        """Return the weight of a client with `examples` training rows."""
        return float(examples) if self.weighting == "examples" else 1.0

    def init(self, params: Tensors) -> ServerState:
        """Return the state before round 0; `params` is the initial adapter."""
        return ServerState(0, params)

    def enrol(self, client: Client) -> Steps[Message]:
        """Return what a client tells the server before the first round, if the algorithm `enrols`."""
        return done(Message())

    def admit(self, server: Server, state: ServerState, told: Mapping[str, Message]) -> Steps[ServerState]:
        """Return the state before round 0, given what every client told the server."""
        return done(state)

    def prepare(self, server: Server, state: ServerState) -> Steps[ServerState]:
        """Return the state with which a round begins; effects are performed on the server's public rows."""
        return done(state)

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        """Return what the server sends to one client of the cohort."""
        return Message({"params": Bundle(state.params), **self.news(state, client)})

    def news(self, state: ServerState, client: str) -> Mapping[str, Bundle]:
        """Return the message group that brings the merges into the base that a client lacks; mostly empty."""
        return baselog.news(state.base, state.seen.get(client))

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        """Run one client's round: local steps from the broadcast weights, their change as the update."""
        start = message.groups["params"].tensors
        fitted = yield from client.fit(start)
        return client.update(tensors.sub(fitted.params, start), fitted), client.memory

    def finish(self, client: Client, message: Message) -> Steps[tuple[Mapping[str, float], Memory]]:
        """Return a client's metrics and memory after the last round, if the algorithm `finishes`; nothing is sent.

        Every client is asked, sampled or not. A run that goes on with further rounds forgets what was kept.

        Args:
            message: what the server would send to it now.
        """
        return done(({}, client.memory))

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        """Combine the cohort's updates, taken one at a time in client order: the only place where they meet.

        Updates of weight 0 are left out; where there is no other, the combined change is zero.
        """
        weighty = (update for update in updates if update.weight > 0)
        first = next(weighty, None)
        if first is None:
            return done(Message({"params": Bundle(tensors.zeros_like(state.params))}))
        return done(server.aggregator.combine(chain([first], weighty), self.around(server, state)))

    def around(self, server: Server, state: ServerState) -> Around:
        """Return what an aggregator may know beside the updates."""
        scale = server.lora.scale if server.lora else None
        kept = state.slots.get("aggregator", Bundle())
        return Around(state.params, scale, kept, server.stream(state.round, "aggregator"))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        """Apply the combined update to the state with the server optimiser; the round is then finished."""
        delta = combined.groups["params"].tensors
        kept = state.slots.get("server_optimizer", Bundle())
        params, kept = server.optimizer.step(state.params, delta, kept, server.lr)
        slots = {**state.slots, "server_optimizer": kept} if kept != Bundle() else {**state.slots}
        if "aggregator" in combined.groups:
            slots["aggregator"] = combined.groups["aggregator"]
        return done(replace(state, round=state.round + 1, params=params, slots=slots))

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        """Return the adapter that a client ended the round with, as far as the server knows; None: it does not.

        The aggregation error of a round is measured against the weighted mean of the products of these.
        """
        groups = self.broadcast(server, state, update.client).groups
        if "params" not in groups or "params" not in update.message.groups:
            return None
        return tensors.add(groups["params"].tensors, update.message.groups["params"].tensors)

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        """Return the adapter that this client would use, given what the server would send it now."""
        return done(message.groups["params"].tensors)

    def suited(self, client: Client, message: Message, prompts: Sequence[str]) -> Steps[Suited]:
        """Return which adapter this client would use for each rendered prompt; mostly its own for all."""
        own = yield from self.own(client, message)
        return Suited([0] * len(prompts), lambda _: own)

    def adapt(self, client: Client, message: Message, steps: int) -> Steps[Tensors]:
        """Return the client's own adapter after some more steps on its own rows, before it is used."""
        own = yield from self.own(client, message)
        fitted = yield from client.fit(own, steps=range(steps))
        return fitted.params

    def evaluate(self, client: Client, message: Message, split: Split) -> Steps[Bundle]:
        """Return the loss sums of what this client would use, on its own rows of `split`; only sums leave it."""
        own = yield from self.own(client, message)
        return (yield from client.score(own, split))

    def evaluate_adapted(self, client: Client, message: Message, split: Split, steps: int) -> Steps[Bundle]:
        """Return the loss sums of what `adapt` makes of what this client would use, on its own rows of `split`."""
        adapted = yield from self.adapt(client, message, steps)
        return (yield from client.score(adapted, split))

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        """Return the adapters that result, by slot name.

        Args:
            state: the final state.
            memory: None asks for the global adapter (empty where there is none); a client's memory for its own.
        """
        return {"shared": state.params}
