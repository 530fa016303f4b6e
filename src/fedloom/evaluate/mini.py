"""A small group of tasks that shows breadth, from files that can be had offline.

It is not HELM's "mini" suite, whose scenarios download their data while they run, and its figures must not be
compared with that suite's. Members: mmlu (5-shot, 114 questions), truthfulqa (100), pubmedqa (100), bbh (5 problems
of each task at hand), gsm8k (zero-shot, 50). With these numbers it finds what broke; it does not rank methods.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedloom.evaluate.base import Evaluation, Evaluator, Sample, View
from fedloom.evaluate.bbh import Bbh
from fedloom.evaluate.gsm8k import Gsm8kAccuracy
from fedloom.evaluate.mmlu import Mmlu
from fedloom.evaluate.pubmedqa import PubMedQa
from fedloom.evaluate.truthfulqa import TruthfulQa

MEMBERS: tuple[Evaluator, ...] = (
    Mmlu(limit=114),
    TruthfulQa(limit=100),
    PubMedQa(limit=100),
    Bbh(limit=5),
    Gsm8kAccuracy(limit=50, max_new_tokens=200),
)


class Mini(Evaluator, name="mini"):
    """The main metric of each member under the member's name, and their `mean`."""

    primary: ClassVar[str] = "mean"
    higher_is_better: ClassVar[bool] = True

    def evaluate(self, view: View) -> Evaluation:
        parts = {one.part_name: (one, one.evaluate(view)) for one in MEMBERS}
        samples: list[tuple[str | None, Sample]] = [one for _, found in parts.values() for one in found.samples]
        clients = next(iter(parts.values()))[1].clients
        settings = {name: {**one.dump(), **found.settings} for name, (one, found) in parts.items()}
        return Evaluation(
            _main({name: found.metrics[one.primary] for name, (one, found) in parts.items()}),
            {c: _main({name: found.clients[c][one.primary] for name, (one, found) in parts.items()}) for c in clients},
            samples,
            settings=settings,
        )


def _main(values: dict[str, float]) -> dict[str, float]:
    return {"mean": float(np.mean(list(values.values()))), **values}
