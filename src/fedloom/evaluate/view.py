"""What evaluators look at: one regime of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedloom.client.generate import GREEDY, Decoding, answers
from fedloom.client.likelihood import Likelihood, likelihoods
from fedloom.data.federation import Federation
from fedloom.data.rows import Turn
from fedloom.data.templates import bos, with_system
from fedloom.evaluate.base import Evaluator
from fedloom.evaluate.stats import worst_share
from fedloom.recipe import Recipe
from fedloom.runtime.engine import Engine
from fedloom.types import Bundle, ServerState, Split, Tensors


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
    def adapters(self) -> Mapping[str | None, Tensors | None]:
        """Client -> its adapter, or None -> the one of all."""
        algorithm = self.recipe.algorithm
        if self.regime == "base":
            return {None: None}
        if not algorithm.personal:
            return {None: next(iter(algorithm.export(self.state).values()))}
        memories = ((name, self.engine.stage.memories.load(name)) for name in self._trained())
        return {name: next(iter(algorithm.export(self.state, memory).values())) for name, memory in memories}

    def losses(self) -> Mapping[str, Bundle]:
        """Return client -> loss sums on its own rows; clients without rows in the split are left out."""
        who = self.federation.unseen if self.regime == "unseen" else self._trained()
        who = [name for name in who if len(self.engine.hands.rows(name, self.split))]
        if self.regime == "base":
            round_ = self.state.round
            return {n: self.engine.drive(self.engine.client(n, round_).score(None, self.split), n, round_) for n in who}
        return {name: self.engine.evaluate(self.state, name, self.split) for name in who}

    def prompts(self, conversations: Sequence[Sequence[Turn]]) -> list[str]:
        """Render conversations up to where the assistant answers, as in training."""
        template, tokenizer = self.recipe.data.template, self.engine.stage.desk.tokenizer
        return [template.prompt(with_system(turns, self.recipe.data.system), tokenizer) for turns in conversations]

    def texts(self, texts: Sequence[str]) -> list[str]:
        """Return bare texts behind bos where the tokenizer adds one."""
        begin = bos(self.engine.stage.desk.tokenizer)
        return [begin + text for text in texts]

    def generate(
        self, params: Tensors | None, prompts: Sequence[str], max_new_tokens: int, decoding: Decoding = GREEDY
    ) -> list[str]:
        """Return answers, greedy unless `decoding` says otherwise."""
        with self.model(params) as (model, tokenizer):
            return answers(model, tokenizer, prompts, max_new_tokens, decoding)

    def likelihoods(self, params: Tensors | None, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Return how likely each continuation is after its context."""
        with self.model(params) as (model, tokenizer):
            return likelihoods(model, tokenizer, pairs)

    @contextmanager
    def model(self, params: Tensors | None) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """Lend the resident model with an adapter in its layers."""
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
        model = self.recipe.model
        return {
            "engine": "fedloom",
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

    def _trained(self) -> list[str]:
        unseen = set(self.federation.unseen)
        return [name for name in self.federation.clients if name not in unseen]


def spread(evaluator: Evaluator, clients: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return each metric's mean over the worst tenth of the clients (`_worst10`) and its variance (`_variance`).

    Values that are not finite are in neither; `Evaluation.invalid` counts their clients.
    """
    if not clients:
        return {}
    found = {}
    for name in next(iter(clients.values())):
        values = np.array([v for metrics in clients.values() if np.isfinite(v := metrics[name])])
        if not len(values):
            continue
        found[f"{name}_worst10"] = worst_share(values, higher_is_better=evaluator.higher_is_better)
        found[f"{name}_variance"] = float(values.var())
    return found
