"""Token-weighted loss, perplexity and bits per byte on the clients' own rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

from pydantic import NonNegativeInt

from fedloom.evaluate.base import Evaluation, Evaluator, View
from fedloom.types import Bundle


class Loss(Evaluator, name="loss"):
    """Negative log-likelihood of the held-out answers, measured where the rows are."""

    own_rows: ClassVar[bool] = True
    every: NonNegativeInt = 1

    def evaluate(self, view: View) -> Evaluation:
        sums = view.losses()
        if not sums:
            return Evaluation({}, not_run=f"no client has rows of its own in {view.split}; raise data.splits")
        clients = {name: metrics_of([one]) for name, one in sums.items()}
        valid = {name: one for name, one in sums.items() if math.isfinite(clients[name]["loss"])}
        invalid = len(sums) - len(valid)
        metrics = (
            metrics_of(valid.values()) if valid else dict.fromkeys(("loss", "perplexity", "bits_per_byte"), math.nan)
        )
        return Evaluation(
            metrics, clients, invalid=invalid, weights={name: one.scalars["tokens"] for name, one in valid.items()}
        )


def metrics_of(sums: Iterable[Bundle]) -> Mapping[str, float]:
    """Return loss (nats per trained token), perplexity (its exponential) and bits per byte of the answers.

    Args:
        sums: bundles whose scalars hold `nll`, `tokens` and `bytes`; sums add up exactly over clients and batches.
    """
    total = dict.fromkeys(("nll", "tokens", "bytes"), 0.0)
    for one in sums:
        for key in total:
            total[key] += one.scalars[key]
    loss = total["nll"] / total["tokens"] if total["tokens"] else math.nan
    # exp overflows above 709; such a loss is reported as an infinite perplexity
    perplexity = math.exp(loss) if loss < 700 else (math.nan if math.isnan(loss) else math.inf)
    bits = total["nll"] / math.log(2) / total["bytes"] if total["bytes"] else math.nan
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits}
