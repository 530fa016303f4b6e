"""Prompts in a cache: tokenised, sorted by length, padded on the left, behind their common beginning.

A batch lies in the cache as [padding | common beginning | padding | rest of the prompt | answer]; the common beginning
(the system prompt, the worked examples) is computed once, and rows may leave a batch and others take their place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from fedloom.client.cached import NAME as BY_PRODUCTS
from fedloom.client.cached import by_products
from fedloom.types import DataError

ROOM = 32
"""Tokens for which a cache has room ahead, so that it is copied once for so many."""
ROOMY = (BY_PRODUCTS, "eager", "sdpa")
"""Implementations of attention whose mask may cover places of a cache that are still empty."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a cache, and what the next forward pass takes."""

    tokens: Tensor  # [rows, t]
    mask: Tensor  # [rows, cached + t]; 0 at padding
    positions: Tensor  # [rows, t]
    cache: DynamicCache

    def logits(self, model: PreTrainedModel, last: int = 1) -> Tensor:
        """Return the logits [rows, last, vocabulary] that follow the last tokens, and put all tokens in the cache."""
        output = model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last,
        )
        return output.logits  # type: ignore[no-any-return]

    def extended(self, tokens: Tensor) -> Batch:
        """Return the batch with one more token [rows] each."""
        mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return Batch(tokens[:, None], mask, self.positions[:, -1:] + 1, self.cache)

    def kept(self, rows: Tensor) -> Batch:
        """Return the batch of these rows; the cache of the others is freed."""
        self.cache.reorder_cache(rows)  # unlike batch_select_indices, every kind of layer has it
        return Batch(self.tokens[rows], self.mask[rows], self.positions[rows], self.cache)

    def joined(self, other: Batch) -> Batch:
        """Return the batch of both's rows, each about to take one token; their caches must be `plain`.

        Padding goes to the left of the shorter one, and columns that are padding in all rows go.
        """
        width = max(self.mask.shape[1], other.mask.shape[1])
        masks = [pad(one.mask, (width - one.mask.shape[1], 0)) for one in (self, other)]
        mask = torch.cat(masks)
        empty = int(mask.any(dim=0).int().argmax())
        for mine, its in zip(self.cache.layers, other.cache.layers, strict=True):
            pairs = ((mine.keys, its.keys), (mine.values, its.values))
            seen, length = (mine.length, its.length), width - 1 - empty
            mine.keys, mine.values = (_stacked(pair, seen, length, mine.room) for pair in pairs)
            mine.length = length
        tokens, positions = (
            torch.cat(both) for both in ((self.tokens, other.tokens), (self.positions, other.positions))
        )
        return Batch(tokens, mask[:, empty:], positions, self.cache)


class _Roomy(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache that is copied once for many tokens, and whose products find their memory in one piece.

    Attributes:
        keys, values: (rows, heads, places, d), zeros from place `length` on; a mask covers all places.
        room: places that are added beyond those needed, whenever there are too few.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.length = room, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; return all places."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.keys = self._appended(self.keys, key_states, end)
        self.values = self._appended(self.values, value_states, end)
        self.length = end
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys `update` will return, and how many are gone."""
        return self._places(self.length + query_length), 0

    def _places(self, end: int) -> int:
        there = self.keys.shape[-2] if self.length else 0
        return there if end <= there else end + self.room

    def _appended(self, seen: Tensor, new: Tensor, end: int) -> Tensor:
        places = self._places(end)
        if not self.length or places > seen.shape[-2]:
            grown = new.new_zeros(*new.shape[:2], places, new.shape[-1])
            if self.length:
                grown[:, :, : self.length] = seen[:, :, : self.length]
            seen = grown
        seen[:, :, self.length : end] = new
        return seen


def _stacked(pair: tuple[Tensor, Tensor], seen: tuple[int, int], length: int, room: int) -> Tensor:
    """Return the rows of two (rows, heads, places, d), both cut or padded on the left to `length`, and room behind."""
    (a, b), first = pair, len(pair[0])
    out = a.new_zeros(first + len(b), a.shape[1], length + room, a.shape[3])
    for rows, one, end in ((slice(None, first), a, seen[0]), (slice(first, None), b, seen[1])):
        kept = one[:, :, max(0, end - length) : end]
        out[rows, :, length - kept.shape[2] : length] = kept
    return out


def tokenised(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of prompts as they are, without further special tokens.

    Raises:
        DataError: a prompt has no tokens.
    """
    if not prompts:
        return []
    ids: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    empty = [i for i, row in enumerate(ids) if not row]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(ids)} prompts have no tokens, the first at index {empty[0]}; give it a text"
        )
    return ids


def by_length(ids: Sequence[Sequence[int]]) -> list[int]:
    """Return the prompts' indices, the longest first: similar lengths together need little padding."""
    return sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put every module in evaluation mode with attention made for caches; afterwards all is as it was."""
    training = [module for module in model.modules() if module.training]
    # the last tokens of a batch do not lie side by side, and torch would multiply them by a copy of the head for each
    # row, since it folds the rows of such a batch for trainable heads alone
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:])) if head else None
    model.eval()
    try:
        with by_products(model):
            yield
    finally:
        if hook:
            hook.remove()
        for module in training:
            module.training = True


def plain(cache: DynamicCache) -> bool:
    """Return whether all layers keep every token.

    Sliding windows and recurrent layers count places in the cache, so that padding must come first and nowhere else.
    """
    return all(type(layer) in (DynamicLayer, _Roomy) for layer in cache.layers)


def beginning(model: PreTrainedModel, ids: Sequence[Sequence[int]], most: int | None = None) -> DynamicCache:
    """Return the cache [1 row] of the prompts' common beginning; it is empty where they share nothing.

    Args:
        most: tokens that it may have; None: all but one of the shortest prompt.
    """
    cache = DynamicCache(config=model.config)
    if plain(cache):
        # flash attention's kernels know no places that are still empty
        room = ROOM if model.config.get_text_config()._attn_implementation in ROOMY else 0
        cache.layers = [_Roomy(room) for _ in cache.layers]
    length = _shared(ids) if plain(cache) and len(ids) > 1 else 0
    length = length if most is None else min(length, most)
    if length:
        tokens = torch.tensor([list(ids[0][:length])], device=model.device)
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _shared(ids: Sequence[Sequence[int]]) -> int:
    """Return with how many equal tokens all prompts begin, leaving each at least one of its own."""
    first, last = (
        min(map(list, ids)),
        max(map(list, ids)),
    )  # in dictionary order, so that what these two share is shared by all
    differ = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return min(next(differ, len(first)), min(map(len, ids)) - 1)


def begin(ids: Sequence[Sequence[int]], common: DynamicCache, device: torch.device) -> Batch:
    """Return the batch of these prompts, padded on the left, behind a copy of their common beginning for each."""
    cache, cached = copy.deepcopy(common), common.get_seq_length()
    if cached:
        cache.batch_repeat_interleave(len(ids))
    width = max(map(len, ids)) - cached
    tokens = torch.zeros(len(ids), width, dtype=torch.long)  # padding is masked, so any token serves
    mask = torch.ones(len(ids), cached + width, dtype=torch.long)
    for row, prompt in enumerate(ids):
        padding = cached + width - len(prompt)
        tokens[row, padding:] = torch.tensor(list(prompt[cached:]))
        mask[row, cached : cached + padding] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, cached:]
    return Batch(tokens.to(device), mask.to(device), positions.to(device), cache)
