"""Any task of lm-evaluation-harness, on our loaded model with the adapter in its layers (extra `eval`).

The model is handed over as an object, never as a path beside an adapter's path: given both, the harness reads the
adapter of a path alone and silently measures the base for an object. It also puts the model in evaluation mode and
seeds the global random streams, which is undone here, so that a run trains on as if it had not been there.
"""

from __future__ import annotations

import importlib.util
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

    Tasks that load data from the hub need it in its cache where there is no network; a folder of task files whose
    `dataset_path` is `json` works everywhere.
    """

    primary: ClassVar[str] = "mean"
    higher_is_better: ClassVar[bool] = True

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
            first = []
            for task in self.tasks:
                with view.model(adapter) as (model, tokenizer):
                    try:
                        result = run(self, task, known, model, tokenizer)
                    except _OFFLINE as error:
                        missing[task] = f"{task}: its data cannot be had here ({type(error).__name__}: {error})"
                        continue
                metrics |= _metrics(result["results"])
                samples += _samples(result["samples"])
                first.append(_first(result["results"].get(task, {}), metrics))
            return ({"mean": float(np.mean(first)), **metrics} if first else {}), samples

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
    metrics = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, rule = key.partition(",")
            if isinstance(value, int | float) and rule and not metric.endswith("_stderr"):
                metrics[f"{task}/{metric}" if rule == "none" else f"{task}/{key}"] = float(value)
    return metrics


def _first(values: Mapping[str, Any], metrics: Mapping[str, float]) -> float:
    own = [float(v) for k, v in values.items() if "," in k and "_stderr" not in k and isinstance(v, int | float)]
    return own[0] if own else next(iter(metrics.values()))


def _samples(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Sample]:
    """Return a sample an item; the harness has one an item and filter, of which the first is kept."""
    samples = []
    for task, every in rows.items():
        seen = set()
        for row in every:
            if row["doc_id"] in seen:
                continue
            seen.add(row["doc_id"])
            score = next((float(row[m]) for m in row.get("metrics", ()) if isinstance(row.get(m), int | float)), 0.0)
            prompt = (
                row["arguments"]["gen_args_0"]["arg_0"]
                if isinstance(row["arguments"], dict)
                else row["arguments"][0][0]
            )
            outputs, kept = "\n".join(map(str, row["resps"])), "\n".join(map(str, row["filtered_resps"]))
            samples.append(Sample(f"{task}-{row['doc_id']}", str(prompt), outputs, kept, str(row["target"]), score))
    return samples
