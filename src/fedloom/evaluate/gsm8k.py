"""GSM8K accuracy (arXiv 2110.14168) by greedy generation: zero-shot with the training template, or by worked examples.

With `shots`, the prompt is bare text as in the literature (arXiv 2201.11903): questions and worked answers that end in
"The answer is N.", then the question. The examples are the first of the training file, so that nobody's prompt is
repeated here; to compare with figures that stand behind other examples, give these with `examples`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field, PositiveInt

from fedloom.client.generate import GREEDY, Decoding
from fedloom.data.named import Gsm8k
from fedloom.data.rows import Row
from fedloom.evaluate import extract
from fedloom.evaluate.base import Evaluation, Evaluator, Sample, Using, View
from fedloom.evaluate.items import Scored, drawn, over_adapters
from fedloom.types import DataError, Split


class Gsm8kAccuracy(Evaluator, name="gsm8k"):
    """Share of test problems whose final number is right, by three rules.

    `numeric` (ours: exact fractions after the last marker), `strict` and `flexible` (those of lm-evaluation-harness,
    for comparison); `marked`, the share of outputs that mark their answer; `unparseable`, that of outputs without any
    number.
    """

    primary: ClassVar[str] = "numeric"
    higher_is_better: ClassVar[bool] = True

    limit: PositiveInt | None = 100
    """Problems, drawn with the recipe's seed; null: all 1,319."""
    shots: int = Field(default=0, ge=0, le=32)
    """Worked examples before each problem, as bare text; 0: the training template; the literature has 8."""
    max_new_tokens: PositiveInt = 256
    """Longest answer."""
    path: Path | None = None
    """The test file; by default it is found as the named set gsm8k is."""
    examples: Path | None = None
    """A file of worked examples (question, answer); by default the training file of the named set gsm8k."""

    def problems(self, split: Split, seed: int) -> list[Row]:
        """Return the problems of `split`; those that judge a run in its course are none of those that judge its end.

        Raises:
            DataError: `validation` problems are asked for and none is left beside those of the end.
        """
        rows = Gsm8k(split="test", path=self.path).rows(seed)
        return [rows[i] for i in drawn("gsm8k", len(rows), self.limit, split, seed)]

    def check(self, seed: int) -> None:
        self.problems("validation", seed)

    def prompts(self, rows: list[Row], view: View) -> list[str]:
        """Return the prompts of problems."""
        if not self.shots:
            return view.prompts([row.turns[:-1] for row in rows])
        worked = Gsm8k(split="train", path=self.examples).rows(view.seed)[: self.shots]
        if len(worked) < self.shots:
            raise DataError(f"evaluator gsm8k: {len(worked)} worked examples for shots={self.shots}; set it lower")
        head = "".join(f"Q: {row.turns[0].text}\nA: {_chain(row.turns[-1].text)}\n\n" for row in worked)
        return view.texts([f"{head}Q: {row.turns[0].text}\nA:" for row in rows])

    def evaluate(self, view: View) -> Evaluation:
        rows = self.problems(view.split, view.seed)
        prompts = self.prompts(rows, view)
        decoding = Decoding(stop=("Q:",)) if self.shots else GREEDY
        rules = extract.CHAIN_RULES if self.shots else extract.RULES

        def score(adapter: Using) -> Scored:
            outputs = view.generate(adapter, prompts, self.max_new_tokens, decoding)
            hits: dict[str, list[bool]] = {name: [] for name in (*rules, "marked", "unparseable")}
            samples = []
            for row, prompt, output in zip(rows, prompts, outputs, strict=True):
                gold, number = row.turns[-1].text, extract.numeric(output)
                for name, rule in rules.items():
                    hits[name].append(rule(output, gold))
                hits["marked"].append(extract.has_marker(output))
                hits["unparseable"].append(number is None)
                shown = None if number is None else str(number)
                samples.append(Sample(row.id, prompt, output, shown, gold, float(hits["numeric"][-1])))
            return {name: float(np.mean(values)) for name, values in hits.items()}, samples

        return over_adapters(view, score, {"items": len(rows)})


def _chain(answer: str) -> str:
    """Return a worked answer in prose: without the calculator's marks, its last line a sentence."""
    steps, _, number = re.sub(r"<<[^<>]*>>", "", answer).rpartition("####")
    return f"{steps.strip()} The answer is {number.strip()}." if steps.strip() else answer.strip()
