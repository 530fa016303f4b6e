"""Each client's own adapter answers the client's own held-out rows; only sums leave the client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

from pydantic import PositiveInt

from fedloom.data import tasks
from fedloom.data.rows import Turn
from fedloom.data.similar import rouge_l
from fedloom.evaluate.base import Evaluation, Evaluator, View
from fedloom.types import Pair

RULES: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": tasks.exact_match,
    "contained": tasks.contained,
    "rouge_l": rouge_l,
}
Sums = Mapping[str, float]


class OwnAnswers(Evaluator, name="own-answers"):
    """Greedy answers to the clients' own rows of the split, scored as the task suite's are.

    Metrics are means over all clients' rows: `exact_match` (the answer and nothing else), `contained` (the answer
    stands somewhere in the output) and `rouge_l` (the words that both share, in their order), for free text. Of a
    dialogue the first question is asked. There are no samples, as rows are private.
    """

    primary: ClassVar[str] = "exact_match"
    higher_is_better: ClassVar[bool] = True
    own_rows: ClassVar[bool] = True

    limit: PositiveInt | None = None
    """Rows of a client, its first ones; null: all."""
    max_new_tokens: PositiveInt = 24
    """Longest answer."""

    def evaluate(self, view: View) -> Evaluation:
        adapters, sums = view.adapters, dict[str, Sums]()
        for client, pairs in view.own_rows().items():
            asked = pairs[: self.limit]
            prompts = view.prompts([(Turn("user", pair.question),) for pair in asked])
            # regimes with one model for all have no adapter of the client's own
            using = adapters[client] if client in adapters else adapters[None]
            sums[client] = _sums(asked, view.generate(using, prompts, self.max_new_tokens))
        if not sums:
            return Evaluation({}, not_run=f"no client has rows of its own in {view.split}; raise data.splits")
        return Evaluation(
            _shares(sums.values()),
            {client: _shares([one]) for client, one in sums.items()},
            weights={client: one["rows"] for client, one in sums.items()},
        )


def _sums(pairs: Sequence[Pair], outputs: Sequence[str]) -> Sums:
    """Return what each rule gives the answers in all, and how many there are."""
    both = list(zip(outputs, pairs, strict=True))
    hits = {name: float(sum(rule(output, pair.answer) for output, pair in both)) for name, rule in RULES.items()}
    return {**hits, "rows": float(len(both))}


def _shares(sums: Iterable[Sums]) -> dict[str, float]:
    every = list(sums)
    rows = sum(one["rows"] for one in every)
    return {name: sum(one[name] for one in every) / rows for name in RULES}
