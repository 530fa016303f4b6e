"""Prompt tuning (Lester et al., arXiv 2104.08691): m trained embeddings E (m, d) in front of every row.

    hidden = model([E; embeddings of the row]),   the outputs at E are not used;   only E is trained.

Wire: E, b m d bytes a message for numbers of b bytes.

Federated, this is FedPrompt (arXiv 2208.12268) with the model's part of the paper left out: the model is frozen. E
starts from rows of the embedding table's size, drawn from our own stream, the same for everybody (the paper: uniform in
[-0.5, 0.5]), or from the embeddings of a text. As it is small beside a model's weights, it wants a learning rate 10 to
100 times LoRA's.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import peft
import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from transformers import PreTrainedModel

from fedloom import seeds
from fedloom.client.adapters import Adapter
from fedloom.client.attached import Attached
from fedloom.client.virtual import EMBEDDINGS, AttachedVirtual, key_shape, read_virtual

KINDS = frozenset({peft.PeftType.PROMPT_TUNING, peft.PeftType.P_TUNING})
"""Both are saved as embeddings."""


class AttachedPrompt(AttachedVirtual):
    """m embeddings in front of every row."""

    kinds = KINDS
    embedded: ClassVar[bool] = True

    def __init__(self, part: PromptTuning, model: PreTrainedModel) -> None:
        self.text = part.text
        width = model.get_input_embeddings().weight.shape[1]
        config = peft.PromptTuningConfig(token_dim=width, num_attention_heads=model.config.num_attention_heads)
        super().__init__(part.part_name, model, config, (part.tokens, width))

    def init(self, seed: int, dtype: torch.dtype = torch.float32, round_: int | None = None) -> dict[str, Tensor]:
        """Return the embeddings of the text, or normal ones with the standard deviation of the embedding table."""
        stream = seeds.generator(seed, round_, None, "adapter")
        if self.text is not None:
            return {EMBEDDINGS: self.words(self.text, stream).to(dtype)}
        spread = float(self.like().detach().float().std())
        return {EMBEDDINGS: (torch.randn(self.virtual, self.width, generator=stream) * spread).to(dtype)}


class PromptTuning(Adapter, name="prompt-tuning"):
    """Prompt tuning (arXiv 2104.08691): trained embeddings in front of every row; the model stays as it is."""

    stackable: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    twice: ClassVar[bool] = True

    tokens: PositiveInt = 20
    """Virtual tokens; every row becomes so much longer."""
    text: str | None = Field(default=None, min_length=1)
    """Start from the embeddings of this text, cut or repeated to `tokens`; null: drawn like rows of the table."""

    def attach(self, model: PreTrainedModel, reference: bool = False) -> Attached:
        key_shape(self.part_name, model)
        return AttachedPrompt(self, model)

    def read(self, folder: Path) -> dict[str, Tensor]:
        return read_virtual(folder, KINDS, self.part_name)

    @classmethod
    def from_peft(cls, saved: peft.PeftConfig) -> Adapter | None:
        return cls(tokens=saved.num_virtual_tokens) if type(saved) is peft.PromptTuningConfig else None
