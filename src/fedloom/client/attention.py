"""Attention over a packed row, piece by piece: on CPUs several times as fast as the fused kernel.

With q of a piece and k, v of the piece and of what it follows, per head, s the scale and M the causal mask:
    P = softmax(s q k^T + M),   o = P v
    dv = P^T do,   dS = P * (do v^T - rowsum(P * do v^T)),   dq = s dS k,   dk = s dS^T q.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fedloom.client.batches import Batch, Piece, Pieces, collate
from fedloom.client.models import hidden_states
from fedloom.data.encode import Example
from fedloom.types import ModelError

NAME = "fedloom_packed"


class _Packed(torch.autograd.Function):
    """q (t, heads, d), k and v (t, key heads, d) -> (t, heads, d); heads / key heads query heads share a key head.

    Further keys come before those of the t tokens: each client's virtual tokens, client after client.
    """

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, scale: float, window: int | None
    ) -> Tensor:
        out, virtual = torch.empty_like(q), (len(k) - len(q)) // pieces.clients
        for piece in pieces.pieces:
            seen, mask = piece.seen(virtual, pieces.clients), pieces.mask(piece, virtual, window, q)
            o = torch.bmm(_probabilities(_queries(q, piece, k.shape[1]), _keys(k, seen), mask, scale), _keys(v, seen))
            _cut(out, piece).copy_(o.view(q.shape[1], piece.length, -1).transpose(0, 1))
        ctx.save_for_backward(q, k, v)
        ctx.pieces, ctx.scale, ctx.window = pieces, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        pieces, virtual = ctx.pieces, (len(k) - len(q)) // ctx.pieces.clients
        for piece in pieces.pieces:
            seen, mask = piece.seen(virtual, pieces.clients), pieces.mask(piece, virtual, ctx.window, q)
            queries, keys = _queries(q, piece, k.shape[1]), _keys(k, seen)
            # made again rather than kept: they would be a fifth of all that a pass keeps, for 2 % of its time
            probabilities = _probabilities(queries, keys, mask, ctx.scale)
            d_out = _queries(do, piece, k.shape[1])
            d_scores = torch.ops.aten._softmax_backward_data(
                torch.bmm(d_out, _keys(v, seen).mT), probabilities, -1, probabilities.dtype
            ).mul_(ctx.scale)
            d_query = torch.bmm(d_scores, keys)
            _cut(dq, piece).copy_(d_query.view(q.shape[1], piece.length, -1).transpose(0, 1))
            _add(dk, seen, torch.bmm(d_scores.mT, queries))
            _add(dv, seen, torch.bmm(probabilities.mT, d_out))
        return dq, dk, dv, None, None, None


def _probabilities(queries: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return a piece's P: (key heads, query heads of one x tokens, tokens that it sees)."""
    scores = torch.bmm(queries * scale, keys.mT)
    per_head = scores.view(-1, *mask.shape)
    return torch.softmax(per_head.add_(mask), -1).view(scores.shape)


def _cut(x: Tensor, piece: Piece) -> Tensor:
    return x[piece.start : piece.start + piece.length]


def _queries(q: Tensor, piece: Piece, groups: int) -> Tensor:
    """Return a piece's queries as (key heads, query heads of one x tokens, d)."""
    return _cut(q, piece).transpose(0, 1).reshape(groups, -1, q.shape[-1])


def _keys(k: Tensor, seen: Sequence[tuple[int, int]]) -> Tensor:
    """Return the keys that a piece sees: (key heads, past + own, d)."""
    parts = [k[start : start + length] for start, length in seen]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).transpose(0, 1)


def _add(grad: Tensor, seen: Sequence[tuple[int, int]], part: Tensor) -> None:
    """Add the gradient of the keys that a piece sees, (key heads, past + own, d)."""
    cuts = part.transpose(0, 1).split([length for _, length in seen])
    for (start, length), cut in zip(seen, cuts, strict=True):
        grad[start : start + length].add_(cut)


def attend(  # noqa: PLR0913, PLR0917
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    pieces: Pieces | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """The signature that transformers calls: query (1, heads, t, d) -> (1, t, heads, d)."""
    if pieces is None or any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ModelError("this model's attention cannot be packed; set trainer.packing=false")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _Packed.apply(q, k, v, pieces, scale, sliding_window)
    return out[None], None


AttentionInterface.register(NAME, attend)


def states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the last hidden states of a batch, flat: (b x t, hidden)."""
    if batch.pieces is None:
        return hidden_states(model, batch.ids).flatten(0, 1)
    with by_piece(model):
        output = model.base_model(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False, pieces=batch.pieces
        )
    hidden: Tensor = output.last_hidden_state
    return hidden.flatten(0, 1)


@contextmanager
def by_piece(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the model attends piece by piece; a backward pass that recomputes layers belongs inside."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME  # under this name transformers builds no mask
    try:
        yield
    finally:
        config._attn_implementation = before


def can_pack(model: PreTrainedModel) -> bool:
    """Return whether packed rows get the hidden states that they get alone.

    No attribute of a model tells, so it is tried out, on a model of the same architecture with few layers and random
    float32 weights, where rounding cannot hide a token that sees what it must not.
    """
    rows = [Example(torch.arange(n) % 7 + 3, torch.ones(n, dtype=torch.bool)) for n in (12, 10, 17)]
    rows[2].ids[9:] += 1
    try:
        tried = small(model)
        with torch.inference_mode():
            batch = collate([rows], tried.device, packed=True)
            packed = states(tried, batch)[batch.at]
            alone = torch.cat([states(tried, collate([[row]], tried.device, packed=False))[:-1] for row in rows])
    except (ModelError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return False  # an architecture that was not made for it; the padded layout serves every model
    return bool((packed - alone).abs().max() <= 1e-3 * alone.abs().max())


def small(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same architecture with few layers, 32 tokens and random float32 weights, on the CPU."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    layers = max(2, *(kinds.index(kind) + 1 for kind in set(kinds))) if kinds else 2
    text.num_hidden_layers, text.vocab_size = min(layers, text.num_hidden_layers), 32
    text.pad_token_id = None
    if kinds:
        text.layer_types = kinds[:layers]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        return type(model)(config).float().eval()
