"""Attention over a cache by plain matrix products: on CPUs several times as fast as the fused kernel.

Per key head, with the queries q of all query heads that share it, M the mask:   o = softmax(s q k^T + M) v.
For one new token a row the fused kernel takes most of a step, since it hands out its work by blocks of queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

NAME = "fedloom_cached"
LARGEST = 1 << 27
"""Scores of one product; above that the fused kernel, which does not hold them, is taken."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """The signature that transformers calls: query (b, heads, t, d), keys (b, key heads, n, d) -> (b, t, heads, d)."""
    b, heads, t, d = query.shape
    groups, n = key.shape[1], key.shape[2]
    odd = any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if odd or attention_mask is None or b * heads * t * n > LARGEST or key.shape != value.shape:
        out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)[0]
        return out, None
    q = query.reshape(b * groups, -1, d) * (d**-0.5 if scaling is None else scaling)
    scores = torch.bmm(q, key.reshape(b * groups, n, d).mT).view(b, heads, t, n)
    probabilities = scores.add_(attention_mask[:, :, :, :n]).softmax(dim=-1)
    found = torch.bmm(probabilities.view(b * groups, -1, n), value.reshape(b * groups, n, d))
    return found.view(b, heads, t, d).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def by_products(model: PreTrainedModel) -> Iterator[None]:
    """Within the context a model on a CPU that would take the fused kernel attends by plain products."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before == "sdpa" and model.device.type == "cpu":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
