"""GSM8K accuracy (arXiv 2110.14168) by greedy generation with the training template."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import PositiveInt

from fedloom import seeds
from fedloom.data.named import Gsm8k
from fedloom.data.rows import Row
from fedloom.evaluate import extract
from fedloom.evaluate.base import Evaluation, Evaluator, Sample, View
from fedloom.types import DataError, Split


class Gsm8kAccuracy(Evaluator, name="gsm8k"):
    """Share of test problems whose final number is right, by three rules.

    `numeric` (ours: exact fractions after the last marker), `strict` and `flexible` (those of lm-evaluation-harness,
    for comparison), and `marked`, the share of outputs that mark their answer.
    """

    primary: ClassVar[str] = "numeric"
    higher_is_better: ClassVar[bool] = True

    limit: PositiveInt | None = 100
    """Problems, drawn with the recipe's seed; null: all 1,319."""
    max_new_tokens: PositiveInt = 256
    """Longest answer."""
    path: Path | None = None
    """The test file; by default it is found as the named set gsm8k is."""

    def problems(self, split: Split, seed: int) -> list[Row]:
        """Return the problems of `split`; those that judge a run in its course are none of those that judge its end.

        Raises:
            DataError: `validation` problems are asked for and too few are left beside the `limit` of the end.
        """
        rows = Gsm8k(split="test", path=self.path).rows(seed)
        order = seeds.numpy_generator(seed, None, None, "gsm8k").permutation(len(rows)).tolist()
        size = len(rows) if self.limit is None else self.limit
        chosen = order[:size] if split == "test" else order[size : 2 * size]
        if not chosen:
            raise DataError(
                f"evaluator gsm8k: all {len(rows)} problems are kept for the end, so none is left for "
                f"`every: {self.every}`; "
                f"set limit to at most {len(rows) // 2}, or every: 0"
            )
        return [rows[i] for i in sorted(chosen)]

    def evaluate(self, view: View) -> Evaluation:
        rows = self.problems(view.split, view.seed)
        prompts = view.prompts([row.turns[:-1] for row in rows])
        golds = [row.turns[-1].text for row in rows]
        samples: list[tuple[str | None, Sample]] = []
        clients: dict[str | None, dict[str, float]] = {}
        for client, adapter in view.adapters.items():
            outputs = view.generate(adapter, prompts, self.max_new_tokens)
            hits: dict[str, list[bool]] = {name: [] for name in (*extract.RULES, "marked")}
            for row, prompt, output, gold in zip(rows, prompts, outputs, golds, strict=True):
                for name, rule in extract.RULES.items():
                    hits[name].append(rule(output, gold))
                hits["marked"].append(extract.has_marker(output))
                found = extract.numeric(output)
                shown = None if found is None else str(found)
                samples.append((client, Sample(row.id, prompt, output, shown, gold, float(hits["numeric"][-1]))))
            clients[client] = {name: float(np.mean(values)) for name, values in hits.items()}
        names = next(iter(clients.values())).keys()
        mean = {name: float(np.mean([one[name] for one in clients.values()])) for name in names}
        return Evaluation(mean, {c: m for c, m in clients.items() if c is not None}, samples)
