"""Gradient checkpointing (arXiv 1604.06174): keep what enters each decoder layer, compute the rest again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def checkpointed(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Within the context, if `wanted`, the model's decoder layers keep their inputs alone for the backward pass."""
    layers = [m for m in model.modules() if wanted and isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        # transformers asks for training mode; set on the layer alone, so that no dropout below it begins
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False
