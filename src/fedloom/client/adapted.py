"""What takes the place of a frozen linear layer, so that an adapter can compute with it for K clients at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedloom.client.quantize import dense, is_linear, shape
from fedloom.types import ModelError

Spans: TypeAlias = tuple[int, ...] | None
"""Tokens of each client in one pass; None: in equal parts."""


@dataclass(slots=True)
class Owners:
    """Which tokens of the pass belong to which client; shared by all layers of a model."""

    tokens: Spans = None


class Adapted(nn.Module):
    """A frozen linear layer and what an adapter makes of it for K clients.

    Attributes:
        base: the layer that was replaced.  d_in, d_out: its sizes.
        spans: whose tokens a pass holds.
        enabled: False computes the base alone.
    """

    edge: bool = True
    """Whether, where nothing is trained below it, its backward pass needs no product with the weight."""

    def __init__(self, base: nn.Module, owners: Owners) -> None:
        super().__init__()
        self.base, self.spans, self.enabled = base, owners, False
        # a Conv1D keeps its weight transposed
        rows, columns = base.weight.shape if isinstance(base, Conv1D) else reversed(shape(base))
        self.d_out, self.d_in = columns, rows

    def weight(self) -> Tensor:
        """Return the frozen weight as (d_out, d_in)."""
        weight: Tensor = self.base.weight.T if isinstance(self.base, Conv1D) else dense(self.base)
        return weight

    def like_base(self, weight: Tensor) -> Tensor:
        """Return a (d_out, d_in) matrix in the layout of the base weight."""
        return weight.T if isinstance(self.base, Conv1D) else weight

    def by_client(self, x: Tensor, factors: Tensor) -> Tensor:
        """Return x (..., d) times each token's own client's vector: factors (K, d)."""
        if len(factors) == 1:
            return x * factors[0]
        flat = x.reshape(-1, x.shape[-1])
        parts = flat.split(self.spans.tokens or len(flat) // len(factors))
        return torch.cat([part * factor for part, factor in zip(parts, factors, strict=True)]).view(x.shape)


def check_targets(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Raise ModelError unless layers of an adapter can stand for all of these modules."""
    for name in names:
        module = model.get_submodule(name)
        if not (is_linear(module) or isinstance(module, Conv1D)):
            raise ModelError(
                f"adapter.targets: {name} is a {type(module).__name__}; adapters here change linear layers only"
            )
        if module is model.get_output_embeddings():
            raise ModelError(
                f"adapter.targets: {name} is the output head, which is computed in parts, without gradients of its "
                "own; leave it out, or set adapter=full"
            )
