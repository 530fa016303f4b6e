"""Linear layers that keep a copy of their weight as a CPU's product of few rows wants it.

oneDNN reorders a bf16 weight at each product; for the few rows of a step of generation that takes as long as the
product. A weight that was reordered once serves until the context ends, at the cost of its memory once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LARGEST = 1 << 30
"""Bytes of weights; a larger model's are left as they are, since memory is then the scarcer thing."""


@contextmanager
def prepacked(model: PreTrainedModel, rows: int) -> Iterator[int]:
    """Within the context, bf16 linear layers on a CPU multiply by reordered copies of their weights, without gradients.

    Args:
        rows: of most products; others are computed too, only less fast.

    Yields:
        How many layers do.
    """
    # a weight that is cut between processes is of another type
    plain = [m for m in model.modules() if type(m) is nn.Linear and type(m.weight) is nn.Parameter]
    layers = [m for m in plain if m.weight.dtype is torch.bfloat16]
    size = sum(layer.weight.nbytes for layer in layers)
    if model.device.type != "cpu" or size > LARGEST or not _can():
        layers = []
    try:
        for layer in layers:
            layer.forward = _Product(layer, rows)  # type: ignore[method-assign, assignment]
        yield len(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


class _Product:
    """x (..., d_in) -> x W^T + b."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        self.bias = layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


@cache
def _can() -> bool:
    """Return whether this machine and this torch have such products; the operators are torch's, but not documented."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        layer = nn.Linear(16, 8, dtype=torch.bfloat16)
        x = torch.linspace(-1, 1, 64, dtype=torch.bfloat16).view(2, 2, 16)
        with torch.inference_mode():
            difference = _Product(layer, 4)(x) - layer(x)
    except (AttributeError, RuntimeError):
        return False
    return bool(difference.abs().max() <= 0.01)
