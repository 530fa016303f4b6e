"""Adapters of virtual tokens in the tiny model, for several test files."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from fedloom.client.adapters import Adapter
from fedloom.client.attached import Attached
from fedloom.client.p_tuning import PTuning
from fedloom.client.prefix_tuning import PrefixTuning
from fedloom.client.prompt_tuning import PromptTuning
from fedloom.client.virtual import EMBEDDINGS

M = 5
PARTS: dict[str, Adapter] = {
    "prompt": PromptTuning(tokens=M),
    "prefix": PrefixTuning(tokens=M),
    "encoder": PTuning(tokens=M, hidden=12),
    "embeddings": PTuning(tokens=M, hidden=12, share="embeddings"),
}
IDS = torch.arange(3, 43).view(2, 20)
each = pytest.mark.parametrize("kind", PARTS)


def attached(kind: str, dtype: torch.dtype = torch.float64) -> tuple[PreTrainedModel, Attached]:
    model = tiny_model(dtype).requires_grad_(False)
    return model, PARTS[kind].attach(model)


def some(adapter: Attached, seed: int = 0, scale: float = 0.3) -> dict[str, Tensor]:
    """Return the starting point, moved at random."""
    stream, start = torch.Generator().manual_seed(seed), adapter.init(0, torch.float64)
    return {name: t + scale * torch.randn(t.shape, generator=stream, dtype=t.dtype) for name, t in start.items()}


def tokens_of(params: dict[str, Tensor]) -> Tensor:
    """Return what peft saves of an adapter, (m, width)."""
    if EMBEDDINGS in params:
        return params[EMBEDDINGS]
    x = params["prompt_encoder.embedding"]
    for i, layer in enumerate((0, 2, 4)):
        name = f"prompt_encoder.mlp_head.{layer}"
        x = torch.nn.functional.linear(torch.relu(x) if i else x, params[f"{name}.weight"], params[f"{name}.bias"])
    return x
