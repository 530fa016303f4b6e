"""Code matching in the style of CoSQA (arXiv 2105.13239): does a function do what a search query asks for?"""

from __future__ import annotations

from pathlib import Path

from fedloom.evaluate.choice import Choice, Question
from fedloom.evaluate.items import drawn, found, records
from fedloom.types import DataError, Split


class CodeMatch(Choice, name="code_match"):
    """Accuracy of yes or no by likelihood, for pairs of a query and a function."""

    path: Path | None = None
    """A file with the columns doc, code and label (1: the code answers the query; 0: it does not); by default
    $FEDLOOM_DATA/cosqa/cosqa-dev.json."""

    def questions(self, split: Split, seed: int) -> list[Question]:
        file = found("code_match", self.path, "cosqa/cosqa-dev.json")
        rows = records(file, "doc", "code", "label")
        asked = []
        for i in drawn("code_match", len(rows), self.limit, split, seed):
            row = rows[i]
            if str(row["label"]) not in {"0", "1"}:
                raise DataError(f"{file}, record {i + 1}: label is {row['label']!r}; allowed: 0 and 1")
            context = f"Query: {row['doc']}\n\nCode:\n{row['code']}\n\nDoes the code answer the query?\nAnswer:"
            asked.append(Question(f"code_match-{i}", "all", context, (" no", " yes"), (int(row["label"]),)))
        return asked
