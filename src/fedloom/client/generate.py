"""Answers of a causal language model: batched and greedy for measurement, streamed and sampled for a chat.

The loop is our own, over transformers' cache, because it is faster than `generate` where it matters, on a CPU: the
prompts' common beginning (the system prompt, the worked examples) is computed once, and a row leaves the batch when
its answer ends. A batch lies in the cache as [common beginning | padding | rest of the prompt | answer].

In float32 a prompt's answer does not depend on the others. In bf16 the batch's shape changes roundings and so, now and
then, a text: compare only what was made from the same prompts with the same `batch_rows`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

from fedloom import seeds
from fedloom.types import DataError, RecipeError


def greedy(  # noqa: PLR0913 - what to answer with, what to answer, when to stop, how fast, and who watches
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    batch_rows: int = 32,
    stop: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Return the most likely continuation of each prompt, token by token.

    Args:
        model: a decoder-only model; its training mode is as before afterwards, and no global random stream moves.
        tokenizer: its end token and those of the model's generation config end an answer.
        prompts: rendered prompts; they are tokenised as they are, without further special tokens.
        max_new_tokens: longest answer, in tokens.  batch_rows: prompts in one forward pass.
        stop: an answer is cut where the first of these begins.
        progress: called with the number of prompts answered so far.

    Returns:
        The answers without special tokens, in the order of `prompts`.

    Raises:
        DataError: a prompt has no tokens.
    """
    ids = _tokenised(tokenizer, prompts)
    ending = _Ending(tokenizer, _end_tokens(model, tokenizer), tuple(stop))
    texts, done = [""] * len(ids), 0
    with _evaluating(model), torch.inference_mode():
        common = _common(model, ids)
        for rows in _by_length(ids, batch_rows):
            batch = _begin([ids[i] for i in rows], common, model.device)
            for i, tokens in zip(rows, _decode(model, batch, ending, max_new_tokens), strict=True):
                texts[i] = cut(tokenizer.decode(tokens, skip_special_tokens=True), stop)
            done += len(rows)
            if progress:
                progress(done)
    return texts


def sample(  # noqa: PLR0913, PLR0917 - the knobs of a chat
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[str]:
    """Return the pieces of one answer as they are drawn; joined, they are the answer.

    Args:
        model, tokenizer, max_new_tokens: as for `greedy`.
        prompt: the rendered prompt.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: draws from the smallest set of tokens whose probabilities sum to at least this, above 0 and at most 1.
        seed: equal seeds give equal answers.

    Raises:
        RecipeError: temperature or top_p is out of its range.
        DataError: the prompt has no tokens.
    """
    if temperature < 0:
        raise RecipeError(f"temperature is {temperature}; allowed: 0 (the most likely token) and above, such as 0.7")
    if not 0 < top_p <= 1:
        raise RecipeError(f"top_p is {top_p}; allowed: above 0 and at most 1, such as 0.95")
    stream = seeds.generator(seed, None, None, "sample")

    def choose(logits: Tensor) -> int:
        return _draw(logits.float().cpu() / temperature, top_p, stream) if temperature else int(logits.argmax())

    [ids] = _tokenised(tokenizer, [prompt])
    return _stream(model, tokenizer, ids, max_new_tokens, choose)


def cut(text: str, stop: Iterable[str]) -> str:
    """Return the text up to where the first of the stop strings begins."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows in the course of being answered: what the next forward pass takes."""

    tokens: Tensor  # [rows, t]
    mask: Tensor  # [rows, cached + t]; 0 at padding
    positions: Tensor  # [rows, t]
    cache: DynamicCache

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Return the logits [rows, vocabulary] of the next token."""
        output = model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def extended(self, tokens: Tensor) -> _Batch:
        """Return the batch with one more token [rows] each."""
        mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return _Batch(tokens[:, None], mask, self.positions[:, -1:] + 1, self.cache)

    def kept(self, rows: Tensor) -> _Batch:
        """Return the batch of these rows; the cache of the others is freed."""
        self.cache.reorder_cache(rows)  # unlike batch_select_indices, every kind of layer has it
        return _Batch(self.tokens[rows], self.mask[rows], self.positions[rows], self.cache)


@dataclass(frozen=True, slots=True)
class _Ending:
    """Tells when an answer is complete."""

    tokenizer: PreTrainedTokenizerFast
    ends: frozenset[int]
    stop: tuple[str, ...]

    def at(self, tokens: Sequence[int]) -> bool:
        """Return whether a stop string ends in the last of these tokens."""
        if not self.stop:
            return False
        reach = max(len(s.encode()) for s in self.stop) + 1  # a token has a byte at least
        tail = self.tokenizer.decode(tokens[-reach:], skip_special_tokens=True)
        return any(s in tail for s in self.stop)


def _tokenised(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[list[int]]:
    if not prompts:
        return []
    ids: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    empty = [i for i, row in enumerate(ids) if not row]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(ids)} prompts have no tokens, the first at index {empty[0]}; give it a text"
        )
    return ids


def _by_length(ids: list[list[int]], batch_rows: int) -> list[list[int]]:
    """Return the prompts' indices in batches, the longest first: similar lengths together need little padding."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    return [order[start : start + batch_rows] for start in range(0, len(order), batch_rows)]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    config = model.generation_config.eos_token_id if model.generation_config else None
    listed = config if isinstance(config, list) else [config]
    return frozenset(token for token in (tokenizer.eos_token_id, *listed) if token is not None)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put every module in evaluation mode, and afterwards back in the mode of its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _common(model: PreTrainedModel, ids: list[list[int]]) -> DynamicCache:
    """Return the cache [1 row] of the prompts' common beginning."""
    cache = DynamicCache(config=model.config)
    # sliding windows and recurrent layers count places in the cache, where padding would follow the beginning
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    length = _shared(ids) if plain and len(ids) > 1 else 0
    if length:
        tokens = torch.tensor([ids[0][:length]], device=model.device)
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _shared(ids: list[list[int]]) -> int:
    """Return with how many equal tokens all prompts begin, leaving each at least one of its own."""
    first, last = min(ids), max(ids)  # in dictionary order, so that what these two share is shared by all
    differ = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return min(next(differ, len(first)), min(map(len, ids)) - 1)


def _begin(ids: Sequence[Sequence[int]], common: DynamicCache, device: torch.device) -> _Batch:
    """Return the batch of these prompts, padded on the left, behind a copy of their common beginning for each."""
    cache, cached = copy.deepcopy(common), common.get_seq_length()
    if cached:
        cache.batch_repeat_interleave(len(ids))
    width = max(map(len, ids)) - cached
    tokens = torch.zeros(len(ids), width, dtype=torch.long)  # padding is masked, so any token serves
    mask = torch.ones(len(ids), cached + width, dtype=torch.long)
    for row, prompt in enumerate(ids):
        padding = cached + width - len(prompt)
        tokens[row, padding:] = torch.tensor(prompt[cached:])
        mask[row, cached : cached + padding] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, cached:]
    return _Batch(tokens.to(device), mask.to(device), positions.to(device), cache)


def _decode(model: PreTrainedModel, batch: _Batch, ending: _Ending, max_new_tokens: int) -> list[list[int]]:
    """Return each row's new tokens, its end token left out."""
    answers: list[list[int]] = [[] for _ in range(len(batch.tokens))]
    live = list(range(len(answers)))
    for _ in range(max_new_tokens):
        chosen = batch.logits(model).max(dim=-1).indices  # twice as fast as argmax in bf16 on a CPU
        going = []
        for place, token in enumerate(chosen.tolist()):
            if token not in ending.ends:
                answers[live[place]].append(token)
                if not ending.at(answers[live[place]]):
                    going.append(place)
        if not going:
            break
        if len(going) < len(live):
            live = [live[place] for place in going]
            rows = torch.tensor(going, device=chosen.device)
            batch, chosen = batch.kept(rows), chosen[rows]
        batch = batch.extended(chosen)
    return answers


def _stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    ids: Sequence[int],
    max_new_tokens: int,
    choose: Callable[[Tensor], int],
) -> Iterator[str]:
    tokens: list[int] = []
    sent, text, ends = 0, "", _end_tokens(model, tokenizer)
    batch = _begin([ids], DynamicCache(config=model.config), model.device)
    with _evaluating(model):
        for _ in range(max_new_tokens):
            with torch.inference_mode():  # not around the yield, where it would hold for the caller as well
                token = choose(batch.logits(model)[0])
                batch = batch.extended(torch.tensor([token], device=model.device))
            if token in ends:
                break
            tokens.append(token)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            # a text that ends so may still lack bytes of its last character
            if text[sent:] and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[sent:]
                sent = len(text)
    if text[sent:]:
        yield text[sent:]


def _draw(logits: Tensor, top_p: float, stream: torch.Generator) -> int:
    """Draw from the smallest set of tokens whose probabilities sum to at least `top_p`."""
    probabilities, tokens = logits.softmax(dim=-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    nucleus = probabilities * (before < top_p)  # the first token is always in it
    return int(tokens[torch.multinomial(nucleus, 1, generator=stream)])
