"""Answers of a causal language model: batched for measurement, streamed for a chat, greedy or sampled by seed.

The loop is our own, over transformers' cache, because it is faster than `generate` where it matters, on a CPU: the
prompts' common beginning is computed once, a row leaves the batch when its answer ends, and waiting prompts take its
place.

In float32 a prompt's answer does not depend on the others. In bf16 the batch's shape changes roundings and so, now and
then, a text: compare only what was made from the same prompts with the same `batch_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from fedloom import seeds
from fedloom.client.prepacked import prepacked
from fedloom.client.prompts import Batch, begin, beginning, by_length, evaluating, plain, tokenised
from fedloom.types import RecipeError

NUCLEUS = 1024
"""So many tokens are sorted to find the nucleus; the whole vocabulary only where they do not hold it."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are chosen, when an answer ends, and how many are made side by side.

    Attributes:
        stop: an answer is cut where the first of these begins.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: draws from the smallest set of tokens whose probabilities sum to at least this, above 0 and at most 1.
        seed: equal seeds give equal answers; equal prompts of one call are drawn apart.
        batch_rows: prompts in one forward pass.
    """

    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_rows: int = 32

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise RecipeError(
                f"temperature is {self.temperature}; allowed: 0 (the most likely token) and above, such as 0.7"
            )
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"top_p is {self.top_p}; allowed: above 0 and at most 1, such as 0.95")


GREEDY = Decoding()


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and what it took.

    Attributes:
        text: without special tokens.  prompt: tokens of the prompt.  chosen: tokens chosen, an end token included.
    """

    text: str
    prompt: int
    chosen: int


def greedy(  # noqa: PLR0913 - what to answer with, what to answer, when to stop, how fast, and who watches
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    batch_rows: int = 32,
    stop: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Return the most likely continuation of each prompt, token by token; see `answers`."""
    return answers(model, tokenizer, prompts, max_new_tokens, Decoding(tuple(stop), batch_rows=batch_rows), progress)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    decoding: Decoding = GREEDY,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Return an answer to each prompt.

    Args:
        model: a decoder-only model; its training mode is as before afterwards, and no global random stream moves.
        tokenizer: its end token and those of the model's generation config end an answer.
        prompts: rendered prompts; they are tokenised as they are, without further special tokens.
        max_new_tokens: longest answer, in tokens.
        progress: called with the number of prompts answered so far.

    Returns:
        The answers without special tokens, in the order of `prompts`.

    Raises:
        DataError: a prompt has no tokens.
    """
    return [one.text for one in answered(model, tokenizer, prompts, max_new_tokens, decoding, progress)]


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    decoding: Decoding = GREEDY,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Return what `answers` does, with the tokens that each answer took."""
    ids = tokenised(tokenizer, prompts)
    desk = _Desk(model, ids, _Ending(tokenizer, end_tokens(model, tokenizer), decoding.stop), decoding, max_new_tokens)
    done = 0
    with evaluating(model), torch.inference_mode(), prepacked(model, decoding.batch_rows):
        for _ in _decode(desk, beginning(model, ids)):
            if progress and desk.ended > done:
                progress(desk.ended)
            done = desk.ended
    texts = [cut(tokenizer.decode(tokens, skip_special_tokens=True), decoding.stop) for tokens in desk.answers]
    return [Answer(text, len(row), chosen) for text, row, chosen in zip(texts, ids, desk.chosen, strict=True)]


def sample(  # noqa: PLR0913, PLR0917 - the knobs of a chat
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
    decoding = Decoding(temperature=temperature, top_p=top_p, seed=seed)
    stream = seeds.generator(seed, None, None, "sample")
    [ids] = tokenised(tokenizer, [prompt])
    return _stream(model, tokenizer, ids, max_new_tokens, lambda logits: _chosen(logits, decoding, stream))


def cut(text: str, stop: Iterable[str]) -> str:
    """Return the text up to where the first of the stop strings begins."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


@dataclass(frozen=True, slots=True)
class _Ending:
    """Tells when an answer is complete."""

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    stop: tuple[str, ...]

    def at(self, tokens: Sequence[int]) -> bool:
        """Return whether a stop string ends in the last of these tokens."""
        if not self.stop:
            return False
        reach = max(len(s.encode()) for s in self.stop) + 1  # a token has a byte at least
        tail = self.tokenizer.decode(tokens[-reach:], skip_special_tokens=True)
        return any(s in tail for s in self.stop)


class _Desk:
    """Prompts in the course of being answered."""

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Sequence[Sequence[int]],
        ending: _Ending,
        decoding: Decoding,
        max_new_tokens: int,
    ) -> None:
        self.model, self.ids, self.ending, self.decoding, self.longest = model, ids, ending, decoding, max_new_tokens
        self.answers: list[list[int]] = [[] for _ in ids]
        self.chosen = [0] * len(ids)
        self.ended = 0
        drawn = range(len(ids)) if decoding.temperature else ()
        self.streams = [seeds.generator(decoding.seed, None, None, f"answer:{i}") for i in drawn]

    def step(self, batch: Batch, live: Sequence[int]) -> tuple[Batch | None, list[int]]:
        """Give each row its next token; return the rows whose answers go on, and which prompts these are.

        Args:
            live: the prompt of each row.
        """
        chosen = self._choose(batch.logits(self.model)[:, -1], live)
        going = []
        for place, (i, token) in enumerate(zip(live, chosen.tolist(), strict=True)):
            self.chosen[i] += 1
            if token not in self.ending.ends:
                self.answers[i].append(token)
                if len(self.answers[i]) < self.longest and not self.ending.at(self.answers[i]):
                    going.append(place)
        self.ended += len(live) - len(going)
        if not going:
            return None, []
        if len(going) < len(live):
            rows = torch.tensor(going, device=chosen.device)
            batch, chosen = batch.kept(rows), chosen[rows]
        return batch.extended(chosen), [live[place] for place in going]

    def _choose(self, logits: Tensor, live: Sequence[int]) -> Tensor:
        if not self.decoding.temperature:
            return logits.max(dim=-1).indices  # twice as fast as argmax in bf16 on a CPU
        drawn = [_chosen(row, self.decoding, self.streams[i]) for row, i in zip(logits, live, strict=True)]
        return torch.tensor(drawn, device=logits.device)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's own and those of the model's generation config."""
    config = model.generation_config.eos_token_id if model.generation_config else None
    listed = config if isinstance(config, list) else [config]
    return frozenset(token for token in (tokenizer.eos_token_id, *listed) if token is not None)


def _decode(desk: _Desk, common: DynamicCache) -> Iterator[None]:
    """Answer all prompts, the longest first, and stop after each token of the batch.

    Waiting prompts take the places of ended ones, several at a time, since to begin one takes as long as a few.
    """
    waiting, rows = by_length(desk.ids) if desk.longest > 0 else [], desk.decoding.batch_rows
    least = max(1, rows // 4) if plain(common) else rows
    batch, live = None, list[int]()
    while waiting or batch is not None:
        if waiting and (batch is None or rows - len(live) >= least):
            new, waiting = waiting[: rows - len(live)], waiting[rows - len(live) :]
            fresh, new = desk.step(begin([desk.ids[i] for i in new], common, desk.model.device), new)
            batch = fresh if batch is None else batch if fresh is None else batch.joined(fresh)
            live += new
        elif batch is not None:
            batch, live = desk.step(batch, live)
        yield


def _stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    max_new_tokens: int,
    choose: Callable[[Tensor], int],
) -> Iterator[str]:
    tokens: list[int] = []
    sent, text, ends = 0, "", end_tokens(model, tokenizer)
    batch = begin([ids], DynamicCache(config=model.config), model.device)
    with evaluating(model):
        for _ in range(max_new_tokens):
            with torch.inference_mode():  # not around the yield, where it would hold for the caller as well
                token = choose(batch.logits(model)[0, -1])
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


def _chosen(logits: Tensor, decoding: Decoding, stream: torch.Generator) -> int:
    """Return the most likely token, or draw one."""
    if not decoding.temperature:
        return int(logits.argmax())
    return _draw(logits.float().cpu() / decoding.temperature, decoding.top_p, stream)


def _draw(logits: Tensor, top_p: float, stream: torch.Generator) -> int:
    """Draw from the smallest set of tokens whose probabilities sum to at least `top_p`."""
    probabilities = logits.softmax(dim=-1)
    if top_p >= 1:
        return int(torch.multinomial(probabilities, 1, generator=stream))
    first, tokens = probabilities.topk(min(NUCLEUS, len(probabilities)))
    if first.sum() < top_p:
        first, tokens = probabilities.sort(descending=True, stable=True)
    before = first.cumsum(dim=-1) - first
    nucleus = first * (before < top_p)  # the first token is always in it
    return int(tokens[torch.multinomial(nucleus, 1, generator=stream)])
