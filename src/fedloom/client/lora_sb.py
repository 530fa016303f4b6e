"""LoRA-SB (Ponkshe et al., arXiv 2411.19557): W + B R A with A and B frozen and R (r, r) trained.

A (r, d_in) has orthonormal rows and B (d_out, r) orthonormal columns, so ||B R A|| = ||R|| and a step in R is a step of
the same size in W. R A and B are A and B of an ordinary LoRA adapter of rank r and scale 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from transformers import PreTrainedModel

from fedloom import seeds
from fedloom.client.adapters import Adapter, Lora
from fedloom.client.attached import Attached, check_fit
from fedloom.client.attached_lora import AttachedLora
from fedloom.client.peft_files import read_peft
from fedloom.factors import Ranks
from fedloom.types import ModelError, Tensors

CORE = "lora_R"


class AttachedSb(AttachedLora):
    """LoRA layers with a core between their factors; they also take plain pairs (A, B), without a core."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        cores = {f"{module}.{CORE}": (layer.r, layer.r) for module, layer in self.layers.items()}
        return {**super().shapes(), **cores}

    def moves(self, name: str) -> bool:
        return is_core(name)

    def check(self, params: Tensors) -> None:
        if any(is_core(name) for name in params):
            check_fit(params, self.shapes())
        else:
            check_fit(params, super().shapes(), any_rank=True)

    def init(self, seed: int, dtype: torch.dtype = torch.float32, round_: int | None = None) -> dict[str, Tensor]:
        """Return random orthonormal A and B, and R = 0."""
        stream, start = seeds.generator(seed, round_, None, "adapter"), {}
        for name, (rows, columns) in self.shapes().items():
            if is_core(name):
                start[name] = torch.zeros(rows, columns, dtype=dtype)
                continue
            drawn = torch.randn(max(rows, columns), min(rows, columns), generator=stream)
            basis = orthonormal(drawn).to(dtype)
            start[name] = basis.mT.contiguous() if rows < columns else basis
        return start

    def merged(self, model: PreTrainedModel, params: Tensors) -> dict[str, Tensor]:
        return super().merged(model, plain(params))


class LoraSb(Adapter, name="lora-sb"):
    """LoRA-SB (arXiv 2411.19557): W + B R A with A and B frozen, only R (r, r) trained; for `algorithm: fed-sb`."""

    stackable: ClassVar[bool] = True
    core: ClassVar[bool] = True

    r: PositiveInt = 32
    """Rank of the update of each target matrix; r^2 numbers of each are trained."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which an input element of the low-rank path is dropped while training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the output head) or name endings such as [q_proj, v_proj]."""

    def attach(self, model: PreTrainedModel, reference: bool = False) -> Attached:
        lora = Lora(r=self.r, alpha=float(self.r), dropout=self.dropout, targets=self.targets)
        inner = lora.attach(model, reference)
        for name, layer in inner.layers.items():
            if self.r > min(layer.d_out, layer.d_in):
                raise ModelError(
                    f"adapter.r={self.r}: {name} is {layer.d_out} x {layer.d_in}, so it has at most "
                    f"{min(layer.d_out, layer.d_in)} orthonormal directions; lower adapter.r, or narrow adapter.targets"
                )
        return AttachedSb(inner.layers, inner.config, inner.owners, self.scale)

    def lora_ranks(self, attached: Attached, clients: Sequence[str]) -> Ranks:
        whole = dict.fromkeys(attached.layers, self.r)
        return Ranks(whole, lambda client: whole, self.scale)

    def read(self, folder: Path) -> dict[str, Tensor]:
        return read_peft(folder, self.scale)

    def scale(self, rank: int) -> float:
        return 1.0


def is_core(name: str) -> bool:
    """Return whether a live name is that of an R."""
    return name.rpartition(".")[2] == CORE


def cores(params: Tensors) -> dict[str, Tensor]:
    """Return R of every module."""
    return {name: t for name, t in params.items() if is_core(name)}


def frozen(params: Tensors) -> dict[str, Tensor]:
    """Return A and B of every module."""
    return {name: t for name, t in params.items() if not is_core(name)}


def plain(params: Tensors) -> dict[str, Tensor]:
    """Return the LoRA pairs of scale 1 with the same products: A and B R; pairs stay what they are."""
    pairs = frozen(params)
    for name, core in cores(params).items():
        factor = f"{name.removesuffix(CORE)}lora_B"
        pairs[factor] = pairs[factor] @ core
    return pairs


def orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of what the columns (d, k), k <= d, span, in float64."""
    q: Tensor = torch.linalg.qr(columns.double()).Q
    return q
