"""A view of a model without any run around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fedloom.client.generate import GREEDY, Decoding, answers
from fedloom.client.likelihood import Likelihood, likelihoods
from fedloom.data.rows import Turn
from fedloom.types import Bundle, Split, Tensors


@dataclass
class BareView:
    """`View` of the base alone; conversations become `role: text` lines."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    split: Split = "test"
    seed: int = 0

    @property
    def adapters(self) -> Mapping[str | None, Tensors | None]:
        return {None: None}

    def losses(self) -> Mapping[str, Bundle]:
        return {}

    def prompts(self, conversations: Sequence[Sequence[Turn]]) -> list[str]:
        return ["".join(f"{t.role}: {t.text}\n" for t in turns) + "assistant:" for turns in conversations]

    def texts(self, texts: Sequence[str]) -> list[str]:
        return list(texts)

    def generate(
        self, params: Tensors | None, prompts: Sequence[str], max_new_tokens: int, decoding: Decoding = GREEDY
    ) -> list[str]:
        return answers(self.base, self.tokenizer, prompts, max_new_tokens, decoding)

    def likelihoods(self, params: Tensors | None, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        return likelihoods(self.base, self.tokenizer, pairs)

    @contextmanager
    def model(self, params: Tensors | None) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerFast]]:
        yield self.base, self.tokenizer

    def settings(self) -> Mapping[str, Any]:
        return {}
