"""How likely a causal language model finds continuations of contexts.

As for generation, what all contexts begin with (the worked examples) is computed once and kept in a cache, and a
context whose continuations are one token each is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from fedloom.client.prompts import begin, beginning, by_length, evaluating
from fedloom.types import DataError

PASS_TOKENS = 4096
"""Tokens of one forward pass, padding included."""

Asked: TypeAlias = dict[tuple[int, ...], list[int]]
"""What the model reads -> the pairs that it answers."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model thinks of one continuation.

    Attributes:
        logprob: natural logarithm of its probability, summed over its tokens.  tokens: how many these are.
        greedy: whether each of them was the most likely one.
        read: tokens that the model read for it; 0: what it read for a pair before told this one too.
    """

    logprob: float
    tokens: int
    greedy: bool
    read: int = field(default=0, compare=False)


def likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[Likelihood]:
    """Return how likely each continuation is after its context.

    Context and continuation are tokenised together; white space at the context's end belongs to the continuation, as
    in lm-evaluation-harness. No special tokens are added. Training mode and random streams are left as they were.

    Args:
        model: a decoder-only model.
        pairs: (context, continuation) texts.

    Raises:
        DataError: a context or a continuation has no tokens.
    """
    encoded = _encoded(tokenizer, pairs)
    asked: Asked = {}
    for i, (before, after) in enumerate(encoded):
        asked.setdefault((*before, *after[:-1]), []).append(i)
    texts = list(asked)
    found: list[Likelihood | None] = [None] * len(pairs)
    with evaluating(model), torch.inference_mode():
        # the token behind each context is predicted by the context's last one, which no row may share
        common = beginning(model, texts, min((len(before) - 1 for before, _ in encoded), default=0))
        for rows in _passes([texts[i] for i in by_length(texts)], common.get_seq_length()):
            needed = [[encoded[i][1] for i in asked[row]] for row in rows]
            for row, likely in zip(rows, _read(model, rows, needed, common), strict=True):
                for i, one in zip(asked[row], likely, strict=True):
                    found[i] = one
                first = asked[row][0]
                found[first] = replace(likely[0], read=len(row))
    return [one for one in found if one is not None]


def _encoded(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of contexts and continuations."""
    if not pairs:
        return []
    split = []
    for context, continuation in pairs:
        text = context.rstrip()
        split.append((text, context[len(text) :] + continuation))
    contexts = list(dict.fromkeys(text for text, _ in split))
    ids = tokenizer(contexts, add_special_tokens=False)["input_ids"] if contexts else []
    cut = dict(zip(contexts, map(len, ids), strict=True))
    whole = tokenizer([text + after for text, after in split], add_special_tokens=False)["input_ids"]
    encoded = [(row[: cut[text]], row[cut[text] :]) for (text, _), row in zip(split, whole, strict=True)]
    empty = [i for i, both in enumerate(encoded) if not all(both)]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(encoded)} pairs have a context or a continuation without tokens, "
            f"the first at index {empty[0]}: {pairs[empty[0]]!r}; give both a text"
        )
    return encoded


def _passes(rows: Sequence[tuple[int, ...]], cached: int) -> list[list[tuple[int, ...]]]:
    """Cut rows, the longest first, into passes of at most `PASS_TOKENS` tokens, at least one row each."""
    passes: list[list[tuple[int, ...]]] = []
    for row in rows:
        if passes and (len(passes[-1]) + 1) * (len(passes[-1][0]) - cached) <= PASS_TOKENS:
            passes[-1].append(row)
        else:
            passes.append([row])
    return passes


def _read(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    needed: Sequence[Sequence[Sequence[int]]],
    common: DynamicCache,
) -> list[list[Likelihood]]:
    """Return what the model thinks of each row's continuations, which end one token behind the row."""
    batch = begin(rows, common, model.device)
    last = max(len(after) for one in needed for after in one)
    logits = batch.logits(model, last).float()
    return [[_of(logits[i], after) for after in one] for i, one in enumerate(needed)]


def _of(logits: Tensor, after: Sequence[int]) -> Likelihood:
    """Return the likelihood of tokens under the last of these logits (tokens, vocabulary)."""
    wanted = torch.tensor(list(after), device=logits.device)
    own = logits[-len(after) :]
    chosen = own.log_softmax(dim=-1).gather(1, wanted[:, None])
    greedy = bool((own.argmax(dim=-1) == wanted).all())
    return Likelihood(float(chosen.double().sum()), len(after), greedy)
