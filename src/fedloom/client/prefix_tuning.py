"""Prefix tuning (Li & Liang, arXiv 2101.00190): m trained keys and values in front of every row, in each layer.

    layer l attends to [K_l; keys of the row] and [V_l; values of the row],   K_l, V_l (key heads, m, head size).

Wire: all K_l and V_l in one tensor (m, L 2 key-heads head-size), laid out as peft saves it.

The paper trains them through a small network (a reparameterisation); here they are trained as they are, as FS-LLM's
are. The paper found a random start to be poor and the activations of real words to be good, so they start from the keys
and values that the model computes for a text, or for tokens drawn from its vocabulary, the same for everybody (peft:
standard normal numbers).
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import peft
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as REORDERED
from pydantic import Field, PositiveInt
from torch import Tensor
from transformers import PreTrainedModel

from fedloom import seeds
from fedloom.client.adapters import Adapter
from fedloom.client.attached import Attached
from fedloom.client.virtual import EMBEDDINGS, AttachedVirtual, Pair, key_shape, read_virtual
from fedloom.types import ModelError

KINDS = frozenset({peft.PeftType.PREFIX_TUNING})


class AttachedPrefix(AttachedVirtual):
    """m keys and values in front of those of every row."""

    kinds = KINDS

    def __init__(self, part: PrefixTuning, model: PreTrainedModel, heads: int, size: int) -> None:
        self.text, self.heads, self.size = part.text, heads, size
        width = model.config.get_text_config().num_hidden_layers * 2 * heads * size
        config = peft.PrefixTuningConfig(token_dim=heads * size, num_attention_heads=heads)
        super().__init__(part.part_name, model, config, (part.tokens, width))

    def init(self, seed: int, dtype: torch.dtype = torch.float32, round_: int | None = None) -> dict[str, Tensor]:
        """Return the keys and values that the model computes for the text, or for drawn tokens."""
        words = self.words(self.text, seeds.generator(seed, round_, None, "adapter"))
        with torch.no_grad():
            pairs = self.backbone.pairs_of(words[None].to(self.like()))
        # (m, layers, 2, heads, size)
        whole = torch.stack([torch.stack(pair) for pair in pairs])[:, :, 0].permute(3, 0, 1, 2, 4)
        return {EMBEDDINGS: whole.reshape(self.virtual, self.width).cpu().to(dtype)}

    def pairs(self) -> list[Pair]:
        values = self.values()
        parts = values.view(len(values), self.virtual, self.backbone.layers, 2, self.heads, self.size)
        layers = parts.permute(2, 3, 0, 4, 1, 5)
        return [(one[0], one[1]) for one in layers]


class PrefixTuning(Adapter, name="prefix-tuning"):
    """Prefix tuning (arXiv 2101.00190): trained keys and values in front of every row, in every layer."""

    stackable: ClassVar[bool] = True
    layered: ClassVar[bool] = False

    tokens: PositiveInt = 20
    """Virtual tokens; every row becomes so much longer for attention, and not for the other layers."""
    text: str | None = Field(default=None, min_length=1)
    """Start from the keys and values of this text, cut or repeated to `tokens`; null: of tokens that are drawn."""

    def attach(self, model: PreTrainedModel, reference: bool = False) -> Attached:
        heads, size = key_shape(self.part_name, model)
        if model.config.model_type in REORDERED:
            raise ModelError(
                f"adapter={self.part_name}: peft keeps the keys of {model.name_or_path}, a {model.config.model_type} "
                "model, in another order, so it could not load what is saved; set adapter=prompt-tuning"
            )
        return AttachedPrefix(self, model, heads, size)

    def read(self, folder: Path) -> dict[str, Tensor]:
        return read_virtual(folder, KINDS, self.part_name)

    @classmethod
    def from_peft(cls, saved: peft.PeftConfig) -> Adapter | None:
        return cls(tokens=saved.num_virtual_tokens) if type(saved) is peft.PrefixTuningConfig else None
