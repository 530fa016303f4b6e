"""FedDQC (arXiv 2410.11540): clients leave out rows whose answers do not follow from their questions, best rows first.

    IRA(q, a) = L(a) - L(a | q),   L: mean loss of an answer's tokens, without and with its question
    client k:  keeps its rows of high IRA, sorts them, cuts them into H stages, and trains on the part of the stage
    server:    FedAvg over the rows that were kept,  p_k = kept_k / sum_j kept_j

IRA is instruction-response alignment: how much the question helps to tell the answer. A row without its question keeps
the template and the system prompt; its user turn is empty. Rows are scored anew in the first round of a stage in which
a client takes part, with the adapter that it was sent; scores stay in its memory. The best row is always kept, and the
last stage lasts until the end.

On the wire: as FedAvg. Each stage costs two passes over the client's rows, forward only.

Differs from the paper in: stages are counted in rounds and not in the clients' own; every stage cuts by the newest
scores, so a row whose place has moved may come twice or never; of a dialogue the first question and answer are scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from fedloom import tensors
from fedloom.algorithms.base import Client
from fedloom.algorithms.fedavg import FedAvg
from fedloom.types import Bundle, ClientUpdate, Losses, Memory, Message, Pair, Steps, Tensors, Texts

QUALITY, IRA, STAGE = "quality", "ira", "stage"
"""The memory group with a client's scores, and its parts."""


class FedDqc(FedAvg, name="feddqc"):
    """FedAvg on the rows whose questions tell most of their answers, the best ones first."""

    keep: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of its rows, those of the highest IRA, that a client keeps; rounded up."""
    threshold: float | None = None
    """Rows of a lower IRA (nats a token) are left out; null: none are."""
    stages: PositiveInt = 3
    """H; 1: all kept rows in every round."""
    stage_rounds: PositiveInt = 3
    """Rounds of a stage; the last one lasts until the end. A run shorter than its stages never sees its worst rows."""

    def stage(self, round_: int) -> int:
        """Return the stage of a round, from 0."""
        return min(round_ // self.stage_rounds, self.stages - 1)

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start, stage = message.groups["params"].tensors, self.stage(client.round)
        memory = client.memory
        if QUALITY not in memory or memory[QUALITY].scalars[STAGE] != stage:
            scores = yield from alignment(start)
            memory = {**memory, QUALITY: Bundle({IRA: scores}, {STAGE: float(stage)})}
        scores = memory[QUALITY].tensors[IRA]
        kept = self.kept(scores)
        fitted = yield from client.fit(start, rows=self.part(kept, stage))
        update = client.update(tensors.sub(fitted.params, start), fitted)
        known = scores[torch.isfinite(scores)]
        told = {"ira": float(known.mean()) if len(known) else math.nan, "kept": float(len(kept)), "stage": float(stage)}
        return replace(update, weight=self.weight(len(kept)), metrics={**update.metrics, **told}), memory

    def kept(self, scores: Tensor) -> list[int]:
        """Return the rows that are kept, the best first; of equal scores the earlier ones."""
        order: list[int] = torch.argsort(scores, descending=True, stable=True).tolist()
        order = order[: math.ceil(self.keep * len(order))]
        passed = [row for row in order if self.threshold is None or float(scores[row]) >= self.threshold]
        return passed or order[:1]

    def part(self, kept: Sequence[int], stage: int) -> Tensor:
        """Return (n,) the rows of one stage, in the client's order; at least one."""
        first, end = (len(kept) * i // self.stages for i in (stage, stage + 1))
        first = min(first, len(kept) - 1)
        return torch.tensor(sorted(kept[first : max(first + 1, end)]), dtype=torch.int64)


def alignment(params: Tensors) -> Steps[Tensor]:
    """Return (n,) float64: the IRA of every training row of whoever asks; -inf where it is not finite."""
    pairs: Sequence[Pair] = yield Texts("train")
    means = []
    for some in (pairs, [Pair("", pair.answer) for pair in pairs]):
        found: Bundle = yield Losses(params, pairs=some)
        # what is too long has no loss and no tokens
        means.append(found.tensors["nll"] / found.tensors["tokens"].clamp(min=1))
    given, bare = means
    return torch.nan_to_num(bare - given, nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
