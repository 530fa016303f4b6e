"""A small group of tasks that shows breadth, from files that can be had offline.

It is not HELM's "mini" suite, whose scenarios download their data while they run, and its figures must not be
compared with that suite's. Members: mmlu (5-shot, 114 questions), truthfulqa (100), pubmedqa (100), bbh (5 problems
of each task at hand), gsm8k (zero-shot, 50). With these numbers it finds what broke; it does not rank methods.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import numpy as np

from fedloom.evaluate.base import Evaluation, Evaluator, Sample, View
from fedloom.evaluate.bbh import Bbh
from fedloom.evaluate.gsm8k import Gsm8kAccuracy
from fedloom.evaluate.mmlu import Mmlu
from fedloom.evaluate.pubmedqa import PubMedQa
from fedloom.evaluate.scored import answered, items, primary
from fedloom.evaluate.truthfulqa import TruthfulQa

MEMBERS: tuple[Evaluator, ...] = (
    Mmlu(limit=114),
    TruthfulQa(limit=100),
    PubMedQa(limit=100),
    Bbh(limit=5),
    Gsm8kAccuracy(limit=50, max_new_tokens=200),
)


class Mini(Evaluator, name="mini"):
    """The mean over the items of each member, scored by its main metric, under its name, and their `mean`."""

    primary: ClassVar[str] = "mean"
    higher_is_better: ClassVar[bool] = True

    def check(self, seed: int) -> None:
        for one in MEMBERS:
            one.check(seed)

    def evaluate(self, view: View) -> Evaluation:
        parts = {one.part_name: (one, one.evaluate(view)) for one in MEMBERS}
        # a member counts once, whatever its own strata
        samples = [(c, replace(s, stratum=name)) for name, (_, found) in parts.items() for c, s in found.samples]
        clients = {
            client: _means(s for c, s in samples if c == client) for client in dict.fromkeys(c for c, _ in samples)
        }
        names = next(iter(clients.values())).keys()
        return Evaluation(
            {name: float(np.mean([one[name] for one in clients.values()])) for name in names},
            {client: metrics for client, metrics in clients.items() if client is not None},
            samples,
            settings={name: {**one.dump(), **found.settings} for name, (one, found) in parts.items()},
        )


def _means(samples: Iterable[Sample]) -> dict[str, float]:
    """Return the mean over strata, and each one's."""
    every = items(answered(samples))
    strata = dict.fromkeys(one.stratum for one in every.values())
    by_name = {name: primary({i: one for i, one in every.items() if one.stratum == name}) for name in strata}
    return {"mean": primary(every), **by_name}
