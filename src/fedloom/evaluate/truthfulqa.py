"""TruthfulQA (arXiv 2109.07958), multiple choice: does a model find true answers likelier than common errors?

- `mc1`: the share of questions whose best answer is likelier than every false one.
- `mc2`: the mean share of probability, among all answers of a question, that lies on true ones.

Published figures stand behind six worked questions of the authors', which are not repeated here: give their text with
`primer`, or use the harness's own task (evaluator lm_eval).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import PositiveInt

from fedloom.client.likelihood import Likelihood
from fedloom.evaluate.choice import Choice, Question, pairs
from fedloom.evaluate.items import drawn, found, records
from fedloom.types import Split


class TruthfulQa(Choice, name="truthfulqa"):
    """MC1 and MC2 by the likelihood of whole answers; the first of a question's choices is the best one."""

    primary: ClassVar[str] = "mc2"

    limit: PositiveInt | None = 200
    """Questions, drawn with the recipe's seed; null: all."""
    primer: Path | None = None
    """A text file put before every question."""
    path: Path | None = None
    """The authors' table; by default $FEDLOOM_DATA/truthfulqa/TruthfulQA.csv."""

    def questions(self, split: Split, seed: int) -> list[Question]:
        file = found("truthfulqa", self.path, "truthfulqa/TruthfulQA.csv")
        rows = records(file, "Question", "Best Answer", "Correct Answers", "Incorrect Answers")
        primer = found("truthfulqa", self.primer).read_text(encoding="utf-8").rstrip() + "\n\n" if self.primer else ""
        asked = []
        for i in drawn("truthfulqa", len(rows), self.limit, split, seed):
            row = rows[i]
            true = list(dict.fromkeys([row["Best Answer"].strip(), *_listed(row["Correct Answers"])]))
            false = [text for text in _listed(row["Incorrect Answers"]) if text not in true]
            context = f"{primer}Q: {row['Question'].strip()}\nA:"
            choices = tuple(f" {text}" for text in [*true, *false])
            asked.append(Question(f"truthfulqa-{i}", "all", context, choices, tuple(range(len(true)))))
        return asked

    def scores(self, questions: Sequence[Question], likely: Sequence[Sequence[Likelihood]]) -> dict[str, float]:
        every = pairs(questions, likely)
        first = [
            row[0].logprob > max((one.logprob for one in row[len(q.right) :]), default=-np.inf) for q, row in every
        ]
        return {"mc2": float(np.mean([self.contribution(q, row) for q, row in every])), "mc1": float(np.mean(first))}

    def contribution(self, question: Question, likely: Sequence[Likelihood]) -> float:
        """Return the share of probability that lies on true answers."""
        logs = np.array([one.logprob for one in likely])
        weights = np.exp(logs - logs.max())  # so that long answers do not all come to nothing
        return float(weights[: len(question.right)].sum() / weights.sum())


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(";") if part.strip()))
