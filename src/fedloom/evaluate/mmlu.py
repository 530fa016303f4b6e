"""MMLU (arXiv 2009.03300): four-way questions of 57 subjects; the letters' likelihood decides.

The prompt is that of the literature, bare of any chat template: a line that names the subject, worked examples, and
the question. A subject's examples are computed once for all its questions, and one pass gives all four letters.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, PositiveInt

from fedloom.data.files import Record
from fedloom.evaluate.choice import Choice, Question
from fedloom.evaluate.items import chosen, drawn, found, records
from fedloom.types import DataError, Split

LETTERS = "ABCD"


class Mmlu(Choice, name="mmlu"):
    """Accuracy over all questions, its mean over subjects (`accuracy_macro`), and by subject (`accuracy/<subject>`)."""

    FIELDS: ClassVar[tuple[str, ...]] = ("subject", "question", "choices", "answer")

    limit: PositiveInt | None = 500
    """Questions, drawn with the recipe's seed; null: all 14,042."""
    shots: int = Field(default=5, ge=0, le=5)
    """Worked examples before each question, of its subject."""
    subjects: tuple[str, ...] | None = None
    """Which subjects; the default is all."""
    path: Path | None = None
    """The folder of mmlu_test.jsonl(.gz) and mmlu_dev.jsonl; by default $FEDLOOM_DATA/mmlu."""

    def questions(self, split: Split, seed: int) -> list[Question]:
        folder = found("mmlu", self.path, "mmlu")
        rows = _read(folder, "mmlu_test")
        names = chosen(self.subjects, (row["subject"] for row in rows), "subject of MMLU")
        wanted = [(i, row) for i, row in enumerate(rows) if row["subject"] in names]
        asked = [wanted[i] for i in drawn("mmlu", len(wanted), self.limit, split, seed)]
        heads = {name: _head(name) for name in names}
        for row in _read(folder, "mmlu_dev") if self.shots else ():
            name = row["subject"]
            if name in heads and heads[name].count("\nAnswer: ") < self.shots:
                heads[name] += f"{_text(row)} {LETTERS[row['answer']]}\n\n"
        letters = tuple(f" {letter}" for letter in LETTERS)
        return [
            Question(f"mmlu-{i}", row["subject"], heads[row["subject"]] + _text(row), letters, (row["answer"],))
            for i, row in sorted(asked, key=lambda pair: (names.index(pair[1]["subject"]), pair[0]))
        ]


def _read(folder: Path, stem: str) -> list[Record]:
    file = next(
        (folder / f"{stem}{end}" for end in (".jsonl", ".jsonl.gz") if (folder / f"{stem}{end}").exists()), None
    )
    if file is None:
        raise DataError(f"evaluator mmlu: {folder} holds no {stem}.jsonl or {stem}.jsonl.gz")
    rows = records(file, *Mmlu.FIELDS)
    for place, row in enumerate(rows, 1):
        if not isinstance(row["choices"], list) or len(row["choices"]) != 4 or row["answer"] not in range(4):
            raise DataError(f"{file}, record {place}: needed: four choices and an answer from 0 to 3")
    return rows


def _head(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def _text(row: Record) -> str:
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}{choices}\nAnswer:"
