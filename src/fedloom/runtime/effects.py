"""Performs what algorithms ask for, on the one resident model and the rows of the client that asks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom import cost, seeds
from fedloom.client import fit, generate
from fedloom.client.generate import Decoding
from fedloom.client.trainer import Bench, Rows
from fedloom.data.encode import Encoded
from fedloom.data.splits import ClientData
from fedloom.data.texts import TextDesk
from fedloom.types import (
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
    Texts,
)


@dataclass(slots=True)
class Spent:
    """What was spent since it was last asked.

    Attributes:
        fit_seconds: in `Fit` effects.  flops: client (or `server`) -> operations of its `Fit` effects.
    """

    fit_seconds: float
    flops: dict[str, float]


class Performer:
    """Performs effects.

    Attributes:
        clients: who may ask -> its rows; the server (None) asks on the public rows.
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
        self.spent = Spent(0.0, {})
        self._shapes = cost.shapes_of(bench.model, bench.attached)

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
        match effect:
            case Score():
                return fit.score(self.bench, self.rows(client, effect.split), effect.params)
            case Losses():
                return self._losses(effect, client)
            case Embed():
                return self._embed(effect, client)
            case Texts():
                return self.desk.pairs(self.rows(client, effect.split).indices)
            case Generate():
                return self._generate(effect, client, round_)
            case Gradient():
                rows = self.rows(client, "train")
                if not len(rows):
                    raise DataError(
                        "the server has no rows to take a gradient on; raise data.public, which gives it some"
                    )
                return fit.gradient(self.bench, Rows(rows.encoded, rows.indices[: effect.examples]), effect.params)
        raise TypeError(f"{type(effect).__name__} is no effect that is performed alone")

    def _fit(self, effects: Mapping[int, Fit], who: Sequence[str | None], round_: int) -> dict[int, Fitted]:
        """Train together what can be: all that have the same tensors and move the same of them in the same way."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, effect in effects.items():
            moving = tuple(n for n in effect.start if effect.trainable is None or effect.trainable(n))
            groups.setdefault((effect.order, tuple(effect.start), moving), []).append(i)
        done: dict[int, Fitted] = {}
        began = time.perf_counter()
        for group in groups.values():
            jobs = [fit.Job(who[i] or "server", round_, self._training(who[i], effects[i]), effects[i]) for i in group]
            done.update(zip(group, fit.fit(self.bench, jobs), strict=True))
            for job in jobs:
                self.spent.flops[job.client] = self.spent.flops.get(job.client, 0.0) + cost.of_fit(self._shapes, job)
        self.spent.fit_seconds += time.perf_counter() - began
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

    def _losses(self, effect: Losses, client: str | None) -> Any:
        if effect.pairs is None:
            return fit.losses(self.bench, self._some(client, effect), effect.params)
        encoded, kept = self.desk.encode(effect.pairs)
        found = fit.losses(self.bench, Rows(encoded, np.arange(len(encoded))), effect.params)
        return _placed(found, kept, effect.pairs)

    def _embed(self, effect: Embed, client: str | None) -> Tensor:
        if effect.prompts is None:
            pairs = self.desk.pairs(self._some(client, effect).indices)
            prompts: Sequence[str] = self.desk.prompts(pair.question for pair in pairs)
        else:
            prompts = effect.prompts
        ids = [self.desk.tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
        return fit.embeddings(self.bench, ids, effect.params, effect.pool)

    def _generate(self, effect: Generate, client: str | None, round_: int) -> list[str]:
        prompts = self.desk.prompts(effect.prompts) if effect.questions else list(effect.prompts)
        seed = seeds.derive(self.bench.seed, round_, client, effect.purpose)
        decoding = Decoding(temperature=effect.temperature, top_p=effect.top_p, seed=seed)
        model, attached = self.bench.model, self.bench.attached
        if effect.params is None:
            with attached.off():
                return generate.answers(model, self.desk.tokenizer, prompts, effect.max_new_tokens, decoding)
        attached.load([effect.params])
        return generate.answers(model, self.desk.tokenizer, prompts, effect.max_new_tokens, decoding)


def _placed(found: Any, kept: Sequence[int], pairs: Sequence[Pair]) -> Any:
    """Return the losses of all pairs: NaN for those that could not be encoded."""
    tensors = {}
    for name, values in found.tensors.items():
        tensors[name] = torch.full((len(pairs),), float("nan") if name == "nll" else 0.0, dtype=torch.float64)
        tensors[name][list(kept)] = values
    return type(found)(tensors)
