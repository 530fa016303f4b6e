"""Any task of lm-evaluation-harness, on our loaded model with the adapter in its layers (extra `eval`).

The model is handed over as an object, never as a path beside an adapter's path: given both, the harness reads the
adapter of a path alone and silently measures the base for an object. It also puts the model in evaluation mode and
seeds the global random streams, which is undone here, so that a run trains on as if it had not been there.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedloom.evaluate.base import Evaluation, Evaluator, Sample, Using, View
from fedloom.evaluate.items import Scored, found, over_adapters
from fedloom.types import DataError, suggest

_OFFLINE = (OSError, ConnectionError, ValueError, KeyError)
"""What the harness raises where a task's data cannot be had: `datasets` has no error of its own for it."""


class LmEval(Evaluator, name="lm_eval"):
    """Metrics `<task>/<metric>` (`<task>/<metric>,<filter>` if it has filters), and `mean` of each task's first.

    A group that has no metric of its own, and a tag, count as their tasks.
    Tasks that load data from the hub need it in its cache where there is no network; a folder of task files whose
    `dataset_path` is `json` works everywhere.
    """

    primary: ClassVar[str] = "mean"
    higher_is_better: ClassVar[bool] = True
    judges: ClassVar[bool] = False  # the harness takes the first items of a task at each time, those of the end too

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks, groups or tags of the harness."""
    include: Path | None = None
    """A folder of further task files, which go before the harness's own."""
    limit: PositiveInt | None = 100
    """The first so many items of each task; null: all."""
    shots: NonNegativeInt | None = None
    """Worked examples before each item; null: as the task says."""
    chat: bool = False
    """Put the prompts into the tokenizer's chat template, worked examples as turns."""
    batch_rows: PositiveInt = 16
    """Rows of one forward pass."""

    @model_validator(mode="after")
    def _installed(self) -> Self:
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError(
                "evaluator lm_eval needs lm-evaluation-harness, which is not installed: pip install 'fedloom[eval]'"
            )
        return self

    def evaluate(self, view: View) -> Evaluation:
        missing: dict[str, str] = {}
        known = catalogue(self)

        def score(adapter: Using) -> Scored:
            metrics: dict[str, float] = {}
            samples: list[Sample] = []
            first: dict[str, float] = {}
            for task in self.tasks:
                with view.model(adapter) as (model, tokenizer):
                    try:
                        result = run(self, task, known, model, tokenizer)
                    except _OFFLINE as error:
                        missing[task] = f"{task}: its data cannot be had here ({type(error).__name__}: {error})"
                        continue
                metrics |= _metrics(result["results"])
                for leaf, members in leaves(task, result).items():
                    metric, rule, first[leaf] = main(leaf, result["results"][leaf])
                    rows = {name: [r for r in result["samples"][name] if r["filter"] == rule] for name in members}
                    samples += _samples(leaf, metric, rows)
            return ({"mean": float(np.mean(list(first.values()))), **metrics} if first else {}), settled(samples, first)

        whole = over_adapters(view, score, {"engine": "lm-eval", "lm_eval": version("lm-eval")})
        return Evaluation(
            whole.metrics, whole.clients, whole.samples, settings=whole.settings, not_run="; ".join(missing.values())
        )


def catalogue(asked: LmEval) -> Any:
    """Return the harness's manager of the tasks asked for.

    Raises:
        DataError: there is no such task, or no such folder.
    """
    from lm_eval.tasks import TaskManager

    folder = None if asked.include is None else str(found("lm_eval", asked.include))
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(asked.tasks) <= set(own.all_tasks):
            return own  # to index the harness's own thousands takes long
    every = TaskManager(include_path=folder)
    for task in asked.tasks:
        if task not in every.all_tasks:
            near = suggest(task, every.all_tasks)
            raise DataError(f"lm-evaluation-harness has no task named {task!r}{near} ({len(every.all_tasks)} known)")
    return every


def run(
    asked: LmEval, task: str, known: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Mapping[str, Any]:
    """Return the harness's own result of one task of `known`, the `catalogue`."""
    with untouched(model):
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=asked.batch_rows, device=str(model.device))
        result = evaluator.simple_evaluate(
            model=wrapped,
            tasks=[task],
            num_fewshot=asked.shots,
            limit=asked.limit,
            bootstrap_iters=0,  # intervals are ours
            apply_chat_template=asked.chat,
            log_samples=True,
            task_manager=known,
        )
    if result is None:
        raise DataError(
            f"lm-evaluation-harness returned nothing for task {task!r}; is this process not the first rank?"
        )
    return dict(result)


@contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    """Afterwards every module's mode and parameters' gradients, the random streams and the log are as before."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        for module, training in modes:
            module.training = training
        for parameter, grad in grads:
            parameter.requires_grad_(grad)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return `<task>/<metric>` -> value of a result, without standard errors and names."""
    return {
        f"{task}/{key.removesuffix(',none')}": value
        for task, values in results.items()
        for key, value in _numbers(values).items()
    }


def leaves(task: str, result: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what a task asked for counts as -> the tasks whose items it holds."""
    if _numbers(result["results"].get(task, {})):
        return {task: list(result["samples"])}
    return {name: [name] for name in result["samples"]}


def main(task: str, values: Mapping[str, Any]) -> tuple[str, str, float]:
    """Return a task's first metric, its filter, and its value.

    Raises:
        DataError: it has none.
    """
    for key, value in _numbers(values).items():
        metric, _, rule = key.partition(",")
        return metric, rule, value
    raise DataError(f"lm-evaluation-harness reports no figure for task {task!r} (there: {', '.join(values)})")


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return `<metric>,<filter>` -> value of one task."""
    return {
        key: float(value)
        for key, value in values.items()
        if "," in key and not key.partition(",")[0].endswith("_stderr") and isinstance(value, int | float)
    }


def _samples(leaf: str, metric: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Sample]:
    """Return a sample an item, scored by one metric."""
    samples = []
    for task, every in rows.items():
        for row in every:
            value = row.get(metric)
            score = float(value) if isinstance(value, int | float) else None
            arguments = row["arguments"]
            prompt = arguments["gen_args_0"]["arg_0"] if isinstance(arguments, dict) else arguments[0][0]
            outputs, kept = "\n".join(map(str, row["resps"])), "\n".join(map(str, row["filtered_resps"]))
            id_, reference = f"{task}-{row['doc_id']}", str(row["target"])
            samples.append(Sample(id_, str(prompt), outputs, kept, reference, score, stratum=leaf))
    return samples


def settled(samples: list[Sample], first: Mapping[str, float]) -> list[Sample]:
    """Return the samples, without scores where these do not add up to the `mean`.

    Corpus metrics, such as BLEU or perplexity, are no means over items, and a score must not pass for them.

    Args:
        samples: with the stratum of each.  first: stratum -> the harness's own figure.
    """
    odd = []
    for stratum, value in first.items():
        scores = [one.score for one in samples if one.stratum == stratum]
        known = [score for score in scores if score is not None]
        if len(known) < len(scores) or not known or not math.isclose(float(np.mean(known)), value, abs_tol=1e-9):
            odd.append(stratum)
    if not odd:
        return samples
    why = f"the figure of {', '.join(odd)} is no mean over items"
    return [replace(one, score=None, verdict=why) for one in samples]
