"""What evaluators look at: one regime of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedloom import cost
from fedloom.algorithms.base import Client, Suited
from fedloom.client.generate import GREEDY, Decoding, answered
from fedloom.client.likelihood import Likelihood, likelihoods
from fedloom.cost import Phase, Shapes
from fedloom.data.federation import Federation
from fedloom.data.rows import Turn
from fedloom.data.templates import bos, with_system
from fedloom.evaluate import scored, vllm_engine
from fedloom.evaluate.base import Evaluation, Evaluator, Own, Using
from fedloom.evaluate.stats import client_bootstrap, worst_share
from fedloom.recipe import Recipe
from fedloom.runtime.effects import SERVER
from fedloom.runtime.engine import Engine
from fedloom.types import Bundle, Message, Pair, ServerState, Split, Steps, Tensors

T = TypeVar("T")
ADAPTED = " adapted"
"""What follows a regime's name where clients take some steps on their own rows before they are measured."""


@dataclass(frozen=True)
class RegimeView:
    """`evaluate.base.View` of a state: the base, the clients that trained, or those kept out of training."""

    engine: Engine
    federation: Federation
    recipe: Recipe
    state: ServerState
    regime: str
    split: Split

    @property
    def seed(self) -> int:
        """The recipe's seed."""
        return self.recipe.seed

    @cached_property
    def adapters(self) -> Mapping[str | None, Using]:
        """Client -> its adapter, or None -> the one of all."""
        algorithm = self.recipe.algorithm
        if self.regime == "base":
            return {None: None}
        if algorithm.personal or self._adapting:
            return {name: Own(name) for name in self._who()}
        return {None: next(iter(algorithm.export(self.state).values()))}

    def losses(self) -> Mapping[str, Bundle]:
        """Return client -> loss sums on its own rows; clients without rows in the split are left out."""
        who = [name for name in self._who() if len(self.engine.hands.rows(name, self.split))]
        if self.regime == "base":
            round_ = self.state.round
            return {n: self.engine.drive(self.engine.client(n, round_).score(None, self.split), n, round_) for n in who}
        if self._adapting:
            return {name: self.engine.at_client(self.state, name, self._scored_adapted) for name in who}
        return {name: self.engine.evaluate(self.state, name, self.split) for name in who}

    def own_rows(self) -> Mapping[str, Sequence[Pair]]:
        """Return client -> its own rows of `split` as pairs; clients without any are left out."""
        hands = self.engine.hands
        found = {name: hands.desk.pairs(hands.rows(name, self.split).indices) for name in self._who()}
        return {name: pairs for name, pairs in found.items() if pairs}

    @property
    def _adapting(self) -> bool:
        return self.regime.endswith(ADAPTED)

    def _adapted(self, client: Client, message: Message) -> Steps[Tensors]:
        return self.recipe.algorithm.adapt(replace(client, lr=self.recipe.adapt_lr), message, self.recipe.adapt_steps)

    def _scored_adapted(self, client: Client, message: Message) -> Steps[Bundle]:
        who, steps = replace(client, lr=self.recipe.adapt_lr), self.recipe.adapt_steps
        return (yield from self.recipe.algorithm.evaluate_adapted(who, message, self.split, steps))

    def _suited(self, client: str, prompts: Sequence[str]) -> Suited:
        """Return which adapter of a client serves which prompt."""
        if self._adapting:
            adapted = self.engine.at_client(self.state, client, self._adapted)
            return Suited([0] * len(prompts), lambda _: adapted)
        suited = self.recipe.algorithm.suited
        return self.engine.at_client(self.state, client, lambda who, message: suited(who, message, prompts))

    def _by_prompt(
        self, using: Using, prompts: Sequence[str], do: Callable[[Tensors | None, list[int]], Sequence[T]]
    ) -> list[T]:
        """Return what `do` finds for each prompt, with the adapter that serves it and the prompts' numbers."""
        if not isinstance(using, Own):
            return list(do(using, list(range(len(prompts)))))
        suited = self._suited(using.client, prompts)
        found: dict[int, T] = {}
        for key in dict.fromkeys(suited.keys):
            numbers = [i for i, one in enumerate(suited.keys) if one == key]
            found.update(zip(numbers, do(suited.make(key), numbers), strict=True))
        return [found[i] for i in range(len(prompts))]

    def prompts(self, conversations: Sequence[Sequence[Turn]]) -> list[str]:
        """Render conversations up to where the assistant answers, as in training."""
        template, tokenizer = self.recipe.data.template, self.engine.stage.desk.tokenizer
        return [template.prompt(with_system(turns, self.recipe.data.system), tokenizer) for turns in conversations]

    def texts(self, texts: Sequence[str]) -> list[str]:
        """Return bare texts behind bos where the tokenizer adds one."""
        begin = bos(self.engine.stage.desk.tokenizer)
        return [begin + text for text in texts]

    def generate(
        self, params: Using, prompts: Sequence[str], max_new_tokens: int, decoding: Decoding = GREEDY
    ) -> list[str]:
        """Return answers, greedy unless `decoding` says otherwise."""

        def some(adapter: Tensors | None, numbers: list[int]) -> list[str]:
            asked = [prompts[i] for i in numbers]
            with self._loaded(adapter) as (model, tokenizer):
                if vllm_engine.chosen(self.recipe, model):
                    attached = self.engine.stage.bench.attached
                    made = vllm_engine.answered(model, tokenizer, attached, adapter, asked, max_new_tokens, decoding)
                else:
                    made = answered(model, tokenizer, asked, max_new_tokens, decoding)
            self._book("generate", cost.of_answers(self._shapes, adapter, [(one.prompt, one.chosen) for one in made]))
            return [one.text for one in made]

        return self._by_prompt(params, prompts, some)

    def likelihoods(self, params: Using, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Return how likely each continuation is after its context."""

        def some(adapter: Tensors | None, numbers: list[int]) -> list[Likelihood]:
            with self._loaded(adapter) as (model, tokenizer):
                found = likelihoods(model, tokenizer, [pairs[i] for i in numbers])
            read = [one for one in found if one.read]
            lengths, labels = [one.read for one in read], [one.tokens for one in read]
            self._book("score", cost.of_pass(self._shapes, adapter, lengths, labels))
            return found

        return self._by_prompt(params, [context for context, _ in pairs], some)

    @contextmanager
    def model(self, params: Using) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """Lend the resident model with an adapter in its layers; a client's own is the one for most prompts."""
        if isinstance(params, Own):
            find = self._adapted if self._adapting else self.recipe.algorithm.own
            params = self.engine.at_client(self.state, params.client, find)
        count = cost.counting(self.engine.stage.bench.model, self._shapes, params, partial(self._book, "score"))
        with self._loaded(params) as lent, count:
            yield lent

    @property
    def _shapes(self) -> Shapes:
        return self.engine.hands.shapes

    def _book(self, phase: Phase, flops: float) -> None:
        """Book what an evaluator's own work takes; the time of all of it is told as that of evaluation."""
        self.engine.hands.spent[SERVER].add(phase, flops, 0.0)

    @contextmanager
    def _loaded(self, params: Tensors | None) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        self.engine.at(self.state)
        bench, tokenizer = self.engine.stage.bench, self.engine.stage.desk.tokenizer
        if params is None:
            with bench.attached.off():
                yield bench.model, tokenizer
            return
        bench.attached.load([params])
        yield bench.model, tokenizer

    def settings(self) -> Mapping[str, Any]:
        """Return what the figures depend on beside prompts and adapter."""
        model, resident = self.recipe.model, self.engine.stage.bench.model
        return {
            "engine": vllm_engine.name() if vllm_engine.chosen(self.recipe, resident) else "fedloom",
            "model": model.name,
            "dtype": str(self.engine.stage.bench.model.dtype).removeprefix("torch."),
            "quantize": model.quantize,
            "attention": model.attention,
            "compile": model.compile,
            "device": self.engine.stage.bench.model.device.type,
            "batch_rows": GREEDY.batch_rows,
            "template": self.recipe.data.template.dump(),
            "system": self.recipe.data.system,
            "versions": {name: version(name) for name in ("fedloom", "torch", "transformers")},
        }

    def _who(self) -> list[str]:
        """Return the clients of the regime: those that trained, or those kept out of training."""
        unseen = set(self.federation.unseen)
        asked = self.regime.removesuffix(ADAPTED) == "unseen"
        return [name for name in self.federation.clients if (name in unseen) == asked]


def interval(evaluator: Evaluator, found: Evaluation) -> dict[str, float]:
    """Return the ends of the 95 % interval of the primary metric, or nothing where none can be told.

    Where clients are measured apart it is over clients (bootstrap), else over items (`scored.estimate`).
    """
    if found.clients:
        every = {client: metrics.get(evaluator.primary, math.nan) for client, metrics in found.clients.items()}
        values = {client: value for client, value in every.items() if math.isfinite(value)}
        if len(values) < 2:
            return {}
        ends = client_bootstrap(list(values.values()), [found.weights.get(c, 1.0) for c in values])
    else:
        told = scored.estimate(scored.items(scored.answered(one for _, one in found.samples)))
        if told is None:
            return {}
        ends = told.interval
    return {f"{evaluator.primary}_low": ends.low, f"{evaluator.primary}_high": ends.high}


def spread(evaluator: Evaluator, clients: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return each metric's mean over the worst tenth of the clients (`_worst10`) and its variance (`_variance`).

    Values that are not finite or not there are in neither; `Evaluation.invalid` counts clients of the first kind.
    """
    if not clients:
        return {}
    found = {}
    for name in dict.fromkeys(name for metrics in clients.values() for name in metrics):
        values = np.array([v for metrics in clients.values() if np.isfinite(v := metrics.get(name, np.nan))])
        if not len(values):
            continue
        found[f"{name}_worst10"] = worst_share(values, higher_is_better=evaluator.higher_is_better)
        found[f"{name}_variance"] = float(values.var())
    return found
