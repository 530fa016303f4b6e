"""Objectives: what a client minimises, and the batches it is computed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from fedloom.client.models import hidden_states, logits
from fedloom.data.encode import Example
from fedloom.parts import Part

LOGIT_ROWS = 256
"""Label positions whose logits exist at a time: 256 x 49,152 float32 logits are 50 MB."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded examples and where their labels are.

    With causal attention a token never sees what is to its right, so right padding needs no mask.

    Attributes:
        ids: (b, t) token ids.  lengths: (b,) real tokens of each row.
        where: (n, 2) row and position of the token *before* each label.  labels: (n,) token ids.
    """

    ids: Tensor
    lengths: Tensor
    where: Tensor
    labels: Tensor

    @property
    def tokens(self) -> int:
        """Real input tokens, padding aside."""
        return int(self.lengths.sum())


def collate(examples: Sequence[Example], device: torch.device) -> Batch:
    """Pad examples to the longest of them.

    Args:
        examples: encoded rows.
        device: where the batch is needed.
    """
    lengths = torch.tensor([len(one.ids) for one in examples])
    ids = torch.zeros(len(examples), int(lengths.max()), dtype=torch.long)
    train = torch.zeros(ids.shape, dtype=torch.bool)
    for row, one in enumerate(examples):
        ids[row, : len(one.ids)], train[row, : len(one.ids)] = one.ids, one.train
    where = train[:, 1:].nonzero()  # position p predicts token p + 1
    labels = ids[where[:, 0], where[:, 1] + 1]
    return Batch(ids.to(device), lengths.to(device), where.to(device), labels.to(device))


def nll(logits_of: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
    """Return -log p of each label, in nats, in at least float32, keeping few logits at a time.

    Args:
        logits_of: maps hidden states (m, d) to logits (m, vocabulary).
        hidden: (n, d) last hidden states at the positions before the labels.
        labels: (n,) token ids.

    Returns:
        (n,) losses; differentiable in `hidden`.
    """
    return _ChunkedNll.apply(hidden, labels, logits_of)  # type: ignore[no-any-return]


class _ChunkedNll(torch.autograd.Function):
    """Row i of the losses depends on row i of `hidden` alone, so its gradient is made while its logits exist."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        grads = torch.empty_like(hidden) if wanted else None
        for first in range(0, len(hidden), LOGIT_ROWS):
            rows = slice(first, first + LOGIT_ROWS)
            with torch.set_grad_enabled(wanted):
                part = hidden[rows].detach().requires_grad_(wanted)
                loss = functional.cross_entropy(logits_of(part).to(losses.dtype), labels[rows], reduction="none")
            losses[rows] = loss.detach()
            if grads is not None:
                (grads[rows],) = torch.autograd.grad(loss, part, torch.ones_like(loss))
        ctx.grads = grads
        return losses

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.grads * dloss.unsqueeze(1)).to(ctx.grads.dtype), None, None


class Objective(Part, family=True):
    """A loss that sums over a batch, and the count that it is divided by."""

    def loss(self, model: PreTrainedModel, batch: Batch, reference: bool = False) -> Tensor:
        """Return the loss summed over the batch, a scalar in at least float32."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int:
        """Return what the summed loss of a step is divided by: additive over batches."""
        raise NotImplementedError


class Sft(Objective, name="sft"):
    """Supervised fine-tuning: -log p of every assistant token, its end token included."""

    def loss(self, model: PreTrainedModel, batch: Batch, reference: bool = False) -> Tensor:
        row, position = batch.where.unbind(1)
        if reference:
            full = model(input_ids=batch.ids, use_cache=False).logits[row, position]
            full = full.to(torch.promote_types(full.dtype, torch.float32))
            return functional.cross_entropy(full, batch.labels, reduction="sum")
        hidden = hidden_states(model, batch.ids)[row, position]
        return nll(lambda h: logits(model, h), hidden, batch.labels).sum()

    def count(self, batch: Batch) -> int:
        return len(batch.labels)
