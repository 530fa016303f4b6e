"""Performs what algorithms ask for, on the one resident model and the rows of the client that asks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom import cost, seeds
from fedloom.client import fit, generate
from fedloom.client.generate import Decoding
from fedloom.client.trainer import Bench, Rows
from fedloom.cost import Phase, Spent
from fedloom.data.encode import Encoded
from fedloom.data.splits import ClientData
from fedloom.data.texts import TextDesk
from fedloom.types import (
    Bundle,
    DataError,
    Effect,
    Embed,
    Fit,
    Fitted,
    Generate,
    Gradient,
    Losses,
    Pair,
    Score,
    Split,
    Tensors,
    Texts,
)

SERVER = "server"
"""Under which name the server's costs and random streams are booked."""


class Performer:
    """Performs effects.

    Attributes:
        clients: who may ask -> its rows; the server (None) asks on the public rows.
        shapes: what the operations of the model depend on.
        spent: client (or `SERVER`) -> what its effects have cost since that was last taken.
    """

    def __init__(
        self,
        bench: Bench,
        desk: TextDesk,
        encoded: Encoded,
        clients: Mapping[str, ClientData],
        public: np.ndarray,
    ) -> None:
        self.bench, self.desk, self.encoded, self.clients, self.public = bench, desk, encoded, clients, public
        self.spent = defaultdict[str, Spent](Spent)
        self.shapes = cost.shapes_of(bench.model, bench.attached)

    def taken(self, client: str | None) -> Spent:
        """Return what the effects of a client, or of the server, have cost, and begin anew."""
        return self.spent.pop(client or SERVER, Spent())

    def all_taken(self) -> dict[str, Spent]:
        """Return client (or `SERVER`) -> what its effects have cost, and begin anew."""
        found, self.spent = dict(self.spent), defaultdict(Spent)
        return found

    def rows(self, client: str | None, split: Split) -> Rows:
        """Return the rows of one client's split, or the server's public rows."""
        if client is None:
            return Rows(self.encoded, self.public)
        data = self.clients[client]
        return Rows(self.encoded, {"train": data.train, "validation": data.validation, "test": data.test}[split])

    def perform(self, asked: Mapping[int, Effect], who: Sequence[str | None], round_: int) -> dict[int, Any]:
        """Perform what several clients ask for at the same time; fits are trained together where they can be.

        Args:
            asked: lane -> its effect.  who: the client of each lane; None: the server.
        """
        fits = {i: effect for i, effect in asked.items() if isinstance(effect, Fit)}
        answers: dict[int, Any] = self._fit(fits, who, round_)
        for i, effect in asked.items():
            if i not in fits:
                answers[i] = self._alone(effect, who[i], round_)
        return answers

    def _alone(self, effect: Effect, client: str | None, round_: int) -> Any:
        if isinstance(effect, Texts):
            return self.desk.pairs(self.rows(client, effect.split).indices)
        began = time.perf_counter()
        answer, phase, flops = self._priced(effect, client, round_)
        self.spent[client or SERVER].add(phase, flops, time.perf_counter() - began)
        return answer

    def _priced(self, effect: Effect, client: str | None, round_: int) -> tuple[Any, Phase, float]:
        """Return the answer to an effect, and what kind of work it was of how many operations."""
        match effect:
            case Score():
                rows = self.rows(client, effect.split)
                return fit.score(self.bench, rows, effect.params), "score", self._read(rows, effect.params)
            case Losses():
                return self._losses(effect, client)
            case Embed():
                return self._embed(effect, client)
            case Generate():
                return self._generate(effect, client, round_)
            case Gradient():
                return self._gradient(effect, client)
        raise TypeError(f"{type(effect).__name__} is no effect that is performed alone")

    def _read(self, rows: Rows, params: Tensors | None) -> float:
        """Return the operations of the losses of some rows."""
        return cost.of_pass(self.shapes, params, rows.lengths(), rows.labels())

    def _fit(self, effects: Mapping[int, Fit], who: Sequence[str | None], round_: int) -> dict[int, Fitted]:
        """Train together what can be: all that have the same tensors and move the same of them in the same way."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, effect in effects.items():
            moving = tuple(n for n in effect.start if effect.trainable is None or effect.trainable(n))
            groups.setdefault((effect.order, tuple(effect.start), moving), []).append(i)
        done: dict[int, Fitted] = {}
        for group in groups.values():
            began = time.perf_counter()
            jobs = [fit.Job(who[i] or SERVER, round_, self._training(who[i], effects[i]), effects[i]) for i in group]
            done.update(zip(group, fit.fit(self.bench, jobs), strict=True))
            share = (time.perf_counter() - began) / len(jobs)
            for job in jobs:
                self.spent[job.client].add("fit", cost.of_fit(self.shapes, job), share)
        return done

    def _training(self, client: str | None, effect: Fit) -> Rows:
        """Return the rows that a fit draws from: the client's own, and the effect's pairs behind them."""
        own = self.rows(client, "train")
        encoded, indices, numbers = own.encoded, own.indices, np.arange(len(own))
        if effect.pairs:
            new, kept = self.desk.encode(effect.pairs)
            encoded = Encoded.joined([own.encoded.some(own.indices), new])
            indices, numbers = np.arange(len(encoded)), np.concatenate([numbers, len(own) + np.array(kept, np.int64)])
        places = np.arange(len(numbers))
        if effect.rows is not None:
            where = dict(zip(numbers.tolist(), places.tolist(), strict=True))
            places = np.array([where[n] for n in effect.rows.tolist() if n in where], dtype=np.int64)
        weights = None if effect.weights is None else effect.weights.double().numpy()[numbers[places]]
        return Rows(encoded, indices[places], weights)

    def _some(self, client: str | None, effect: Losses | Embed) -> Rows:
        own = self.rows(client, effect.split)
        return own if effect.rows is None else Rows(own.encoded, own.indices[list(effect.rows)])

    def _losses(self, effect: Losses, client: str | None) -> tuple[Bundle, Phase, float]:
        if effect.pairs is None:
            rows = self._some(client, effect)
            return fit.losses(self.bench, rows, effect.params), "score", self._read(rows, effect.params)
        encoded, kept = self.desk.encode(effect.pairs)
        rows = Rows(encoded, np.arange(len(encoded)))
        found = _placed(fit.losses(self.bench, rows, effect.params), kept, effect.pairs)
        return found, "score", self._read(rows, effect.params)

    def _gradient(self, effect: Gradient, client: str | None) -> tuple[dict[str, Tensor], Phase, float]:
        own = self.rows(client, "train")
        if not len(own):
            raise DataError("the server has no rows to take a gradient on; raise data.public, which gives it some")
        rows = Rows(own.encoded, own.indices[: effect.examples])
        flops = cost.of_rows(self.shapes, Fit(effect.params), rows.lengths(), rows.labels())
        return fit.gradient(self.bench, rows, effect.params), "gradient", flops

    def _embed(self, effect: Embed, client: str | None) -> tuple[Tensor, Phase, float]:
        if effect.prompts is None:
            pairs = self.desk.pairs(self._some(client, effect).indices)
            prompts: Sequence[str] = self.desk.prompts(pair.question for pair in pairs)
        else:
            prompts = effect.prompts
        ids = [self.desk.tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
        flops = cost.of_pass(self.shapes, effect.params, [len(one) for one in ids])
        return fit.embeddings(self.bench, ids, effect.params, effect.pool), "embed", flops

    def _generate(self, effect: Generate, client: str | None, round_: int) -> tuple[list[str], Phase, float]:
        prompts = self.desk.prompts(effect.prompts) if effect.questions else list(effect.prompts)
        seed = seeds.derive(self.bench.seed, round_, client, effect.purpose)
        decoding = Decoding(temperature=effect.temperature, top_p=effect.top_p, seed=seed)
        model, attached, tokenizer = self.bench.model, self.bench.attached, self.desk.tokenizer
        if effect.params is not None:
            attached.load([effect.params])
        with nullcontext() if effect.params is not None else attached.off():
            made = generate.answered(model, tokenizer, prompts, effect.max_new_tokens, decoding)
        flops = cost.of_answers(self.shapes, effect.params, [(one.prompt, one.chosen) for one in made])
        return [one.text for one in made], "generate", flops


def _placed(found: Bundle, kept: Sequence[int], pairs: Sequence[Pair]) -> Bundle:
    """Return the losses of all pairs: NaN for those that could not be encoded."""
    tensors = {}
    for name, values in found.tensors.items():
        tensors[name] = torch.full((len(pairs),), float("nan") if name == "nll" else 0.0, dtype=torch.float64)
        tensors[name][list(kept)] = values
    return Bundle(tensors)
