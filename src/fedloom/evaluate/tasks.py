"""Exact match on held-out items of the built-in task suite."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import PositiveInt

from fedloom.data import tasks
from fedloom.data.rows import Turn
from fedloom.data.tasks import Item
from fedloom.evaluate.base import Evaluation, Evaluator, Sample, View


class TaskSuite(Evaluator, name="tasks"):
    """Greedy answers to items that no client has seen, scored exactly and by containment.

    Metrics are means over categories of the category's mean: `exact_match` (the answer and nothing else) and
    `contained` (the answer stands somewhere in the output), which tells the skill from the answer's form.
    """

    primary: ClassVar[str] = "exact_match"
    higher_is_better: ClassVar[bool] = True

    items_per_category: PositiveInt = 21
    """Held-out items of each category."""
    categories: tuple[str, ...] | None = None
    """Which categories; the default is all."""
    max_new_tokens: PositiveInt = 24
    """Longest answer."""

    def items(self, split: str, seed: int) -> list[Item]:
        """Return the items of `split`, category by category."""
        names = self.categories or tasks.CATEGORIES
        return [item for name in names for item in tasks.items(name, split, self.items_per_category, seed)]

    def evaluate(self, view: View) -> Evaluation:
        items = self.items(view.split, view.seed)
        prompts = view.prompts([(Turn("user", item.prompt),) for item in items])
        samples: list[tuple[str | None, Sample]] = []
        clients: dict[str | None, dict[str, float]] = {}
        for client, adapter in view.adapters.items():
            outputs = view.generate(adapter, prompts, self.max_new_tokens)
            clients[client] = self._score(items, outputs)
            for item, prompt, output in zip(items, prompts, outputs, strict=True):
                exact = float(tasks.exact_match(output, item.answer))
                one = Sample(item.id, prompt, output, output.strip(), item.answer, exact, stratum=item.category)
                samples.append((client, one))
        names = next(iter(clients.values())).keys()
        mean = {name: float(np.mean([one[name] for one in clients.values()])) for name in names}
        return Evaluation(mean, {c: m for c, m in clients.items() if c is not None}, samples)

    @staticmethod
    def _score(items: list[Item], outputs: list[str]) -> dict[str, float]:
        metrics = {}
        for name, rule in (("exact_match", tasks.exact_match), ("contained", tasks.contained)):
            by_category: dict[str, list[bool]] = {}
            for item, output in zip(items, outputs, strict=True):
                by_category.setdefault(item.category, []).append(rule(output, item.answer))
            metrics[name] = float(np.mean([np.mean(hits) for hits in by_category.values()]))
        return metrics
