"""Objectives: what a client minimises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fedloom.client.attention import states
from fedloom.client.batches import Batch
from fedloom.client.models import logits
from fedloom.parts import Part

LOGIT_ROWS = 128
"""Label positions whose logits exist at a time: 128 x 49,152 float32 logits are 25 MB."""


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


def nll_again(logits_of: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
    """Return what `nll` does, differentiable in the output embeddings too: logits are computed again when needed."""

    def chunk(part: Tensor, chosen: Tensor) -> Tensor:
        out = logits_of(part)
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        return functional.cross_entropy(wide, chosen, reduction="none")

    cuts = zip(hidden.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True)
    return torch.cat([checkpoint(chunk, part, chosen, use_reentrant=False) for part, chosen in cuts])


class _ChunkedNll(torch.autograd.Function):
    """Row i of the losses depends on row i of `hidden` alone, so its gradient is made while its logits exist.

    The gradient of -log p_y in the logits is p - e_y: made in place of the log-probabilities.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        grads = torch.empty_like(hidden) if wanted else None
        for first in range(0, len(hidden), LOGIT_ROWS):
            rows = slice(first, first + LOGIT_ROWS)
            with torch.set_grad_enabled(wanted):
                part = hidden[rows].detach().requires_grad_(wanted)
                out = logits_of(part)
            logs = torch.log_softmax(out.detach().to(wide), -1)
            chosen = labels[rows, None]
            losses[rows] = -logs.gather(1, chosen)[:, 0]
            if grads is not None:
                slope = logs.exp_().scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=wide))
                (grads[rows],) = torch.autograd.grad(out, part, slope.to(out.dtype))
        ctx.grads = grads
        return losses

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.grads * dloss.unsqueeze(1)).to(ctx.grads.dtype), None, None


class Objective(Part, family=True):
    """A loss that sums over each client's rows, and the counts that the sums are divided by."""

    def losses(self, model: PreTrainedModel, batch: Batch, reference: bool = False) -> Tensor:
        """Return (K,) losses, each summed over one client's rows of the batch, in at least float32."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return the K numbers that a step's summed losses are divided by: additive over batches."""
        raise NotImplementedError


class Sft(Objective, name="sft"):
    """Supervised fine-tuning: -log p of every assistant token, its end token included."""

    def losses(self, model: PreTrainedModel, batch: Batch, reference: bool = False) -> Tensor:
        if reference:
            full = model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)[batch.at]
            full = full.to(torch.promote_types(full.dtype, torch.float32))
            return batch.by_client(functional.cross_entropy(full, batch.labels, reduction="none"))
        hidden = states(model, batch)[batch.at]
        head: Any = model.get_output_embeddings()
        moves = torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters())
        losses = nll_again if moves else nll
        return batch.by_client(losses(lambda h: logits(model, h), hidden, batch.labels))

    def counts(self, batch: Batch) -> tuple[int, ...]:
        return batch.terms
