"""What each algorithm sends, keeps and goes together with, found by running three rounds of it on made-up tensors.

No client trains: every `Fit` is answered with weights drawn around its start. So what is told of messages and memories
is what the code does. Layers of one shape cost the same: one of each is computed and counted as often as it is there.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedloom import seeds
from fedloom.algorithms.base import Algorithm, Client, Server
from fedloom.client.adapters import Lora
from fedloom.client.models import DTYPES, skeleton
from fedloom.factors import Ranks
from fedloom.recipe import Recipe
from fedloom.types import (
    Bundle,
    ClientUpdate,
    Embed,
    Fit,
    Fitted,
    Generate,
    Gradient,
    Losses,
    Memory,
    Message,
    Pair,
    Score,
    Texts,
)

ROUNDS = 3
OWN, PUBLIC = 8, 64
"""Rows of a client, and of the server for each client."""
FEW = 4
"""Numbers along a dimension of a tensor that stands for a larger one."""
TOY = {"layers.0.linear": (64, 64)}
"""A layer to look at where there is no recipe: (d_out, d_in)."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """Layers that stand for all of a model's.

    Attributes:
        layers: one name of each kind -> (d_out, d_in).  counts: of the layers of its kind.
        ranks: of the clients, for these layers; None: the adapter has no LoRA factors.  dtype: of the adapter.
        tensors: instead of layers where there are no factors: one name of each kind -> a shape of few numbers, which
            counts as often as the tensors of its kind have as many numbers.
    """

    layers: Mapping[str, tuple[int, int]]
    counts: Mapping[str, float]
    ranks: Ranks | None
    dtype: torch.dtype
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class Surveyed:
    """What was seen of one algorithm.

    Attributes:
        paper: its arXiv id.  down, up: tensor bytes of one client's message, the mean over rounds after the first.
        shares, keeps: group -> kinds of tensors (A, B, ...) in messages and in a client's memory.
        first: tensor bytes of a client's first message where they differ.
    """

    name: str
    summary: str
    paper: str
    shares: dict[str, set[str]] = field(default_factory=dict)
    keeps: dict[str, set[str]] = field(default_factory=dict)
    down: float = 0.0
    up: float = 0.0
    first: float = 0.0


def shapes_of(recipe: Recipe, clients: Sequence[str]) -> Shapes:
    """Return the layers that a recipe adapts, without loading its model.

    Args:
        clients: whose ranks count.
    """
    resolved = recipe.resolved()
    attached = resolved.adapter.attach(skeleton(resolved.model))
    ranks = resolved.adapter.lora_ranks(attached, clients)
    wide = torch.promote_types(DTYPES[resolved.model.dtype], torch.float32)
    if ranks is None:
        return _of_tensors(attached.shapes(), wide)
    layers: dict[str, tuple[int, int]] = {}
    counts: dict[str, float] = {}
    kinds: dict[tuple[object, ...], str] = {}
    for module, layer in attached.layers.items():
        kind = (layer.d_out, layer.d_in, *(ranks.of(client)[module] for client in clients))
        name = kinds.setdefault(kind, module)
        layers[name], counts[name] = (layer.d_out, layer.d_in), counts.get(name, 0) + 1
    return Shapes(layers, counts, _of(ranks, tuple(layers)), wide)


def _of_tensors(whole: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Shapes:
    kinds: dict[tuple[object, ...], str] = {}
    counts: dict[str, float] = {}
    small: dict[str, tuple[int, ...]] = {}
    for name, shape in whole.items():
        one = kinds.setdefault((name.rpartition(".")[2], *shape), name)
        small[one] = tuple(min(size, FEW) for size in shape)
        counts[one] = counts.get(one, 0.0) + math.prod(shape) / math.prod(small[one])
    return Shapes({}, counts, None, dtype, small)


def toy_shapes(rank: int = 8) -> Shapes:
    """Return one square layer, for what does not depend on a model."""
    lora = Lora(r=rank)
    whole = dict.fromkeys(TOY, rank)
    return Shapes(TOY, dict.fromkeys(TOY, 1), Ranks(whole, lambda client: whole, lora.scale), torch.float32)


def survey(algorithm: Algorithm, recipe: Recipe, clients: Sequence[str], shapes: Shapes) -> Surveyed:
    """Run three rounds of an algorithm with all of `clients` and note what passes.

    Args:
        recipe: gives the server's half.  clients: a cohort, at least 2.
    """
    run = Rehearsal(algorithm, recipe, clients, shapes)
    found = Surveyed(algorithm.part_name, (algorithm.__doc__ or "").splitlines()[0], paper_of(type(algorithm)))
    state = algorithm.init(run.draw(0))
    if algorithm.enrols:
        told = {name: run.drive(algorithm.enrol(run.client(name, 0))) for name in clients}
        state = run.drive(algorithm.admit(run.server, state, told), PUBLIC * len(clients))
    for round_ in range(ROUNDS):
        state = run.drive(algorithm.prepare(run.server, state))
        updates = []
        for client in clients:
            message = algorithm.broadcast(run.server, state, client)
            update, run.memories[client] = run.train(client, round_, message)
            updates.append(update)
            _note(found.shares, message.groups, shapes)
            _note(found.shares, update.message.groups, shapes)
            _note(found.keeps, run.memories[client], shapes)
            down, up = _size(message, shapes) / len(clients), _size(update.message, shapes) / len(clients)
            if round_ == 0:
                found.first += down
            else:
                found.down, found.up = found.down + down / (ROUNDS - 1), found.up + up / (ROUNDS - 1)
        combined = run.drive(algorithm.combine(run.server, state, updates))
        state = run.drive(algorithm.step(run.server, state, combined))
        if algorithm.tells_missed:
            state = replace(state, seen=dict.fromkeys(clients, round_))
    for client in clients if algorithm.finishes else ():
        message = algorithm.broadcast(run.server, state, client)
        _, kept = run.drive(algorithm.finish(run.client(client, ROUNDS), message))
        _note(found.keeps, kept, shapes)
    return found


def paper_of(algorithm: type[Algorithm]) -> str:
    """Return the first arXiv id of the file that defines an algorithm, or an empty string."""
    found = re.search(r"arXiv (\d{4}\.\d{5})", sys.modules[algorithm.__module__].__doc__ or "")
    return found[1] if found else ""


def partners(algorithm: type[Algorithm]) -> list[str]:
    """Return what an algorithm goes together with; `sums alone`: with a server that sees the sum of updates only."""
    found = [] if algorithm.own_step else ["server optimisers"]
    found += [] if algorithm.own_combine else ["robust rules"]
    found += ["sums alone"] if algorithm.combine is Algorithm.combine else []
    return [*found, *(["mixed ranks"] if algorithm.mixed_ranks else [])]


class Rehearsal:
    """Clients and a server that only pretend to train."""

    def __init__(self, algorithm: Algorithm, recipe: Recipe, clients: Sequence[str], shapes: Shapes) -> None:
        self.algorithm, self.shapes = algorithm, shapes
        self.stream = seeds.generator(recipe.seed, None, None, "survey")
        self.memories: dict[str, Memory] = {name: {} for name in clients}
        part = recipe.server
        self.server = Server(
            tuple(clients),
            part.aggregator,
            part.optimizer,
            part.lr,
            self.draw,
            lambda round_, purpose: seeds.generator(recipe.seed, round_, None, purpose),
            shapes.ranks,
        )

    def draw(self, round_: int) -> dict[str, Tensor]:
        """Return an adapter of the layers: A random, B zero, and R where the algorithm trains one."""
        stream, params = seeds.generator(0, round_, None, "survey"), {}
        if self.shapes.ranks is None:
            return {
                name: torch.randn(s, generator=stream).to(self.shapes.dtype) for name, s in self.shapes.tensors.items()
            }
        for module, (d_out, d_in) in self.shapes.layers.items():
            rank = self.shapes.ranks.whole[module]
            params[f"{module}.lora_A"] = torch.randn(rank, d_in, generator=stream).to(self.shapes.dtype)
            params[f"{module}.lora_B"] = torch.zeros(d_out, rank, dtype=self.shapes.dtype)
            if self.algorithm.needs_core:
                params[f"{module}.lora_R"] = torch.zeros(rank, rank, dtype=self.shapes.dtype)
        return params

    def train(self, name: str, round_: int, message: Message) -> tuple[ClientUpdate, Memory]:
        """Run one client's round."""
        done: tuple[ClientUpdate, Memory] = self.drive(self.algorithm.train(self.client(name, round_), message))
        return done

    def client(self, name: str, round_: int) -> Client:
        """Return what a client sees."""
        ranks, draw = self.shapes.ranks, self.draw
        if self.algorithm.mixed_ranks and ranks is not None:
            draw = lambda round_: ranks.cut(self.draw(round_), name)
        return Client(name, round_, self.memories[name], 8, self.algorithm.weight(8), draw(0), draw, ranks)

    def drive(self, steps: Any, rows: int = OWN) -> Any:
        """Run a coroutine to its end with made-up answers, as one who holds so many rows."""
        answer: Any = None
        try:
            while True:
                answer = self._answer(steps.send(answer), rows)
        except StopIteration as stop:
            return stop.value

    def _answer(self, effect: Any, rows: int) -> Any:
        match effect:
            case Fit():
                moving = {n for n in effect.start if effect.trainable is None or effect.trainable(n)}
                params = {n: self._near(t) if n in moving else t for n, t in effect.start.items()}
                kept = Bundle({"moment": torch.zeros(1)}) if effect.optimizer_state is not None else Bundle()
                return Fitted(params, 1, 1e-3, 8, 8, (1.0,), (), kept)
            case Score():
                return Bundle(scalars={"nll": 8.0, "tokens": 8.0, "bytes": 8.0, "examples": 8.0})
            case Gradient():
                return {name: self._near(torch.zeros_like(t)) for name, t in effect.params.items()}
            case Generate():
                return [""] * len(effect.prompts)
        return self._about_rows(effect, rows)

    def _about_rows(self, effect: Any, rows: int) -> Any:
        match effect:
            case Losses():
                count = len(_chosen(effect.rows, rows) if effect.pairs is None else effect.pairs)
                return Bundle({name: torch.ones(count, dtype=torch.float64) for name in ("nll", "tokens", "bytes")})
            case Embed():
                asked = _chosen(effect.rows, rows) if effect.prompts is None else effect.prompts
                return torch.randn(len(asked), 8, generator=self.stream)
            case Texts():
                return tuple(Pair(f"question {i}", f"answer {i}") for i in range(rows))
        raise TypeError(f"{type(effect).__name__} has no made-up answer")

    def _near(self, t: Tensor) -> Tensor:
        return t + 0.01 * torch.randn(t.shape, generator=self.stream).to(t.dtype)


def _chosen(asked: Sequence[int] | None, rows: int) -> Sequence[int]:
    """Return which of so many rows an effect asks about."""
    return range(rows) if asked is None else asked


def _of(ranks: Ranks, modules: Iterable[str]) -> Ranks:
    """Return the ranks of some modules alone."""
    chosen = list(modules)
    whole = {module: ranks.whole[module] for module in chosen}
    return Ranks(whole, lambda client: {module: ranks.of(client)[module] for module in chosen}, ranks.scale)


def _module(name: str, shapes: Shapes) -> str | None:
    if shapes.tensors:
        return max((one for one in shapes.tensors if one in name), key=len, default=None)
    return next((module for module in shapes.layers if f"{module}." in name), None)


def _size(message: Message, shapes: Shapes) -> float:
    """Return the tensor bytes of a message, for the whole model."""
    total = 0.0
    for bundle in message.groups.values():
        for name, t in bundle.tensors.items():
            module = _module(name, shapes)
            total += t.numel() * t.element_size() * (shapes.counts[module] if module else 1)
    return total


def _note(seen: dict[str, set[str]], groups: Mapping[str, Bundle], shapes: Shapes) -> None:
    for group, bundle in groups.items():
        kinds = {name.rpartition(".")[2].removeprefix("lora_") for name in bundle.tensors}
        kinds |= {"texts"} if bundle.texts else set()
        kinds |= {"scalars"} if bundle.scalars and not kinds else set()
        seen.setdefault(group, set()).update(kinds)
