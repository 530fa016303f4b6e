"""Embeddings of texts by a small encoder of one's own, apart from the resident model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from fedloom.types import ModelError

BATCH = 32


@lru_cache(1)
def _loaded(folder: Path) -> tuple[Any, Any]:
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the embedder in {folder} cannot be loaded: {error}") from error


@torch.inference_mode()
def embedded(folder: Path, texts: Sequence[str]) -> Tensor:
    """Return (n, d) float32: mean last hidden states of texts, cut at what the encoder can read.

    Args:
        folder: of a model and its tokenizer, as transformers saves them.

    Raises:
        ModelError: they cannot be loaded.
    """
    model, tokenizer = _loaded(folder)
    found = [torch.zeros(0, model.config.hidden_size)]
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    for i in range(0, len(texts), BATCH):
        batch = tokenizer(
            list(texts[i : i + BATCH]), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.float()
        real = batch["attention_mask"][..., None]
        found.append((hidden * real).sum(1) / real.sum(1).clamp(min=1))
    return torch.cat(found)
