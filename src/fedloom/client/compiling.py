"""Decoder layers through `torch.compile`: what lies between the matrix products becomes fewer passes over memory.

LoRA products and packed attention stay as they are: their shapes differ from pass to pass, so a compiler would only
meet them anew each time. The first steps pay for the compilation.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fedloom.client import attention
from fedloom.client.adapted import Adapted
from fedloom.types import ModelError


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the model's decoder layers, in place, each with any number of tokens; the adapter is attached before.

    Raises:
        ModelError: the model has no decoder layers that could be found.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"model.compile=true: no decoder layers were found in a {model.config.model_type} model (allowed: false)"
        )
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.attend))
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, Adapted):
                module.forward = torch.compiler.disable(module.forward)
        layer.compile(dynamic=True)
