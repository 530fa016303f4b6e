"""BIG-Bench Hard (arXiv 2210.09261), answers only: exact match behind worked examples.

The examples of each task are the first of its file, which are then not asked; the authors' chains of thought are not
used. A task's examples are computed once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field, PositiveInt

from fedloom.client.generate import Decoding
from fedloom.evaluate.base import Evaluation, Evaluator, Sample, Using, View
from fedloom.evaluate.items import Scored, chosen, drawn, found, over_adapters
from fedloom.types import DataError, Split


class Bbh(Evaluator, name="bbh"):
    """Mean over tasks of the share of answers that equal the reference, and each share (`exact_match/<task>`)."""

    primary: ClassVar[str] = "exact_match"
    higher_is_better: ClassVar[bool] = True

    limit: PositiveInt | None = 20
    """Problems of each task, drawn with the recipe's seed; null: all."""
    shots: int = Field(default=3, ge=0, le=20)
    """Worked examples before each problem."""
    tasks: tuple[str, ...] | None = None
    """Which tasks; the default is every file of the folder."""
    max_new_tokens: PositiveInt = 48
    """Longest answer."""
    path: Path | None = None
    """The folder of <task>.json files; by default $FEDLOOM_DATA/bbh."""

    def problems(self, split: Split, seed: int) -> dict[str, list[tuple[str, str, str]]]:
        """Return task -> (id, prompt, answer).

        Raises:
            DataError: the data cannot be found or read, or a task is not there.
        """
        folder = found("bbh", self.path, "bbh")
        names = chosen(self.tasks, sorted(path.stem for path in folder.glob("*.json")), "task of BBH")
        every = {}
        for name in names:
            examples = _read(folder / f"{name}.json")
            head = "".join(f"Q: {one['input']}\nA: {one['target']}\n\n" for one in examples[: self.shots])
            rest = examples[self.shots :]
            every[name] = [
                (f"{name}-{i + self.shots}", f"{head}Q: {rest[i]['input']}\nA:", rest[i]["target"])
                for i in drawn("bbh", len(rest), self.limit, split, seed)
            ]
        return every

    def check(self, seed: int) -> None:
        self.problems("validation", seed)

    def evaluate(self, view: View) -> Evaluation:
        problems = self.problems(view.split, view.seed)
        decoding = Decoding(stop=("\n\n", "\nQ:"))

        def score(adapter: Using) -> Scored:
            samples, shares = [], {}
            for name, asked in problems.items():
                prompts = view.texts([prompt for _, prompt, _ in asked])
                outputs = view.generate(adapter, prompts, self.max_new_tokens, decoding)
                hits = []
                for (id_, _, gold), prompt, output in zip(asked, prompts, outputs, strict=True):
                    hits.append(float(output.strip() == gold.strip()))
                    samples.append(Sample(id_, prompt, output, output.strip(), gold, hits[-1], stratum=name))
                shares[f"exact_match/{name}"] = float(np.mean(hits))
            return {"exact_match": float(np.mean(list(shares.values()))), **shares}, samples

        return over_adapters(view, score, {"items": sum(map(len, problems.values()))})


def _read(path: Path) -> list[dict[str, str]]:
    try:
        examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
        return [{"input": str(one["input"]), "target": str(one["target"])} for one in examples]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a task of BIG-Bench Hard ({type(error).__name__}: {error}); "
            "needed: an object with examples, each with input and target"
        ) from None
