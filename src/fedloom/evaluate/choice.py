"""Questions with given answers, of which the likeliest counts as chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import PositiveInt

from fedloom.client.likelihood import Likelihood
from fedloom.evaluate.base import Evaluation, Evaluator, Sample, Using, View
from fedloom.evaluate.items import Scored, over_adapters
from fedloom.types import Split


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its answers.

    Attributes:
        group: what it is reported with; the questions of a group begin alike.
        context, choices: bare texts; a choice begins with the space that parts it from the context.
        right: which choices are.
    """

    id: str
    group: str
    context: str
    choices: tuple[str, ...]
    right: tuple[int, ...]


class Choice(Evaluator):
    """Share of questions whose likeliest answer is right; ties go to the first."""

    primary: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    limit: PositiveInt | None = 200
    """Questions, drawn with the recipe's seed; null: all."""

    def questions(self, split: Split, seed: int) -> list[Question]:
        """Return the questions that are asked, group by group.

        Raises:
            DataError: the data cannot be found or read.
        """
        raise NotImplementedError

    def check(self, seed: int) -> None:
        self.questions("validation", seed)

    def scores(self, questions: Sequence[Question], likely: Sequence[Sequence[Likelihood]]) -> dict[str, float]:
        """Return the metrics.

        Args:
            likely: of each question's choices.
        """
        hits = [self.contribution(question, row) for question, row in pairs(questions, likely)]
        return {"accuracy": float(np.mean(hits)), **by_group("accuracy", questions, hits)}

    def contribution(self, question: Question, likely: Sequence[Likelihood]) -> float:
        """Return what one question adds to the primary metric, which is the mean of it."""
        return float(np.argmax([one.logprob for one in likely]) in question.right)

    def evaluate(self, view: View) -> Evaluation:
        questions = self.questions(view.split, view.seed)
        contexts = view.texts([q.context for q in questions])
        groups = list(dict.fromkeys(q.group for q in questions))

        def score(adapter: Using) -> Scored:
            likely: list[list[Likelihood]] = [[] for _ in questions]
            for group in groups:
                places = [(i, c) for i, q in enumerate(questions) if q.group == group for c in q.choices]
                found = view.likelihoods(adapter, [(contexts[i], choice) for i, choice in places])
                for (i, _), one in zip(places, found, strict=True):
                    likely[i].append(one)
            columns = zip(questions, contexts, likely, strict=True)
            samples = [_sample(q, context, row, self.contribution(q, row)) for q, context, row in columns]
            return self.scores(questions, likely), samples

        return over_adapters(view, score, {"items": len(questions)})


def pairs(
    questions: Sequence[Question], likely: Sequence[Sequence[Likelihood]]
) -> list[tuple[Question, Sequence[Likelihood]]]:
    """Return each question with its choices' likelihoods."""
    return list(zip(questions, likely, strict=True))


def by_group(name: str, questions: Sequence[Question], hits: Sequence[float]) -> dict[str, float]:
    """Return `<name>_macro`, the mean over groups, and `<name>/<group>` of each; nothing where there is one group."""
    groups: dict[str, list[float]] = {}
    for question, hit in zip(questions, hits, strict=True):
        groups.setdefault(question.group, []).append(hit)
    if len(groups) < 2:
        return {}
    means = {group: float(np.mean(values)) for group, values in groups.items()}
    return {f"{name}_macro": float(np.mean(list(means.values()))), **{f"{name}/{g}": m for g, m in means.items()}}


def _sample(question: Question, context: str, likely: Sequence[Likelihood], score: float) -> Sample:
    """The output shows every choice with its log-probability, so that other scores can be made of it."""
    best = int(np.argmax([one.logprob for one in likely]))
    told = "\n".join(f"{one.logprob:.4f}\t{c.strip()}" for c, one in zip(question.choices, likely, strict=True))
    reference = " | ".join(question.choices[i].strip() for i in question.right)
    return Sample(question.id, context, told, question.choices[best].strip(), reference, score)
