"""PubMedQA (arXiv 1909.06146): does an abstract answer its question with yes, no or maybe?

Only the 500 questions of the authors' test half are asked; the others are for training.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveInt

from fedloom.client.likelihood import Likelihood
from fedloom.evaluate.choice import Choice, Question, pairs
from fedloom.evaluate.items import drawn, found
from fedloom.types import DataError, Split

ANSWERS = ("yes", "no", "maybe")


class PubMedQa(Choice, name="pubmedqa"):
    """Accuracy and macro F1 by the likelihood of the three answers, behind the abstract and the question."""

    limit: PositiveInt | None = 200
    """Questions, drawn with the recipe's seed; null: all 500."""
    path: Path | None = None
    """The folder of ori_pqal.json(.gz) and test_ground_truth.json; by default $FEDLOOM_DATA/pubmedqa."""

    def questions(self, split: Split, seed: int) -> list[Question]:
        folder = found("pubmedqa", self.path, "pubmedqa")
        every, golds = _read(folder, "ori_pqal"), _read(folder, "test_ground_truth")
        names = [name for name in golds if name in every]
        asked = []
        for i in drawn("pubmedqa", len(names), self.limit, split, seed):
            record, gold = every[names[i]], golds[names[i]]
            if missing := [key for key in ("CONTEXTS", "QUESTION") if key not in record] or gold not in ANSWERS:
                raise DataError(f"{folder}: record {names[i]}: lacks {missing}, or its answer {gold!r} is not known")
            abstract = "\n".join(record["CONTEXTS"])
            context = f"Abstract: {abstract}\nQuestion: {record['QUESTION']}\nAnswer:"
            choices = tuple(f" {answer}" for answer in ANSWERS)
            asked.append(Question(f"pubmedqa-{names[i]}", "all", context, choices, (ANSWERS.index(gold),)))
        return asked

    def scores(self, questions: Sequence[Question], likely: Sequence[Sequence[Likelihood]]) -> dict[str, float]:
        said = np.array([int(np.argmax([one.logprob for one in row])) for _, row in pairs(questions, likely)])
        gold = np.array([question.right[0] for question in questions])
        f1 = []
        for answer in sorted(set(gold.tolist()) | set(said.tolist())):
            both = ((said == answer) & (gold == answer)).sum()
            f1.append(2 * both / ((said == answer).sum() + (gold == answer).sum()))
        return {"accuracy": float((said == gold).mean()), "macro_f1": float(np.mean(f1))}


def _read(folder: Path, stem: str) -> dict[str, Any]:
    for name in (f"{stem}.json", f"{stem}.json.gz"):
        if (folder / name).is_file():
            raw = (folder / name).read_bytes()
            try:
                found: Any = json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)
            except (json.JSONDecodeError, UnicodeDecodeError, OSError, EOFError) as error:
                raise DataError(f"{folder / name}: damaged or not JSON ({error}); copy it again") from None
            if not isinstance(found, dict):
                raise DataError(f"{folder / name}: expected an object of records by their number")
            return found
    raise DataError(f"evaluator pubmedqa: {folder} holds no {stem}.json or {stem}.json.gz")
