"""DoRA (Liu et al., arXiv 2402.09353): a weight's rows trained as a magnitude and a direction.

    W' = diag(m / ||W + s B A||) (W + s B A),   ||.|| of each row (an output's weights),   s = alpha / r

m (d_out,) starts as ||W||, so that training begins at the base; m, A and B are trained. As in section 4.3 of the paper
the norm is a constant in the backward pass. It is found without building B A:

    ||w + s b A||^2 = ||w||^2 + 2 s (w A^T) b^T + s^2 b (A A^T) b^T     for a row w of W and the row b of B.

On the wire: m, A and B; b (r (d_in + d_out) + d_out) a layer. FedAvg averages each of the three, and neither the mean
direction nor the mean magnitude is that of the mean weight. Methods that stack, merge or refactor products B A know
nothing of m, so all methods for LoRA factors are refused.

Differs from the paper in: dropout falls on the low-rank path alone (peft drops inputs of the scaled base part too). The
norms cost as much as r further tokens a pass, which the count of operations leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import peft
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from transformers import PreTrainedModel

from fedloom.client.adapted import Spans
from fedloom.client.adapters import Adapter, Lora
from fedloom.client.attached import Attached, check_fit
from fedloom.client.attached_lora import AttachedLora, told_targets
from fedloom.client.lora import LoraLinear
from fedloom.client.peft_files import load_kind, save_peft
from fedloom.client.stack import Stack
from fedloom.types import Tensors

MAGNITUDE = "lora_magnitude_vector"


class DoraLinear(LoraLinear):
    """A LoRA layer whose output rows have magnitudes of their own.

    Attributes:
        m: (K, d_out).
    """

    m: Tensor
    _norms: Tensor | None = None
    _squares: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        y = super().forward(x)
        if not self.enabled:
            return y
        bias = self.base.bias
        ratio = (self.m / self.norms()).to(y.dtype)
        if bias is None:
            return self.by_client(y, ratio)
        return self.by_client(y - bias, ratio) + bias  # type: ignore[operator]

    def norms(self) -> Tensor:
        """Return (K, d_out) the norms of the rows of W + s B A, constants of the graph."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._measured()
        # without gradients nothing moves between two bindings, and a generated token asks for them every time
        if self._norms is None:
            self._norms = self._measured()
        return self._norms

    def forget(self) -> None:
        """Let go of norms that may be those of other factors."""
        self._norms = None

    def row_norms(self) -> Tensor:
        """Return (d_out,) the norms of the rows of W, in at least float32."""
        return self._rows().sqrt()

    def _measured(self) -> Tensor:
        weight, scale = self.weight().to(self.a.dtype), self._scale(0)
        found = []
        for a, b in zip(self.a, self.b, strict=True):
            cross = ((weight @ a.mT) * b).sum(1)
            square = ((b @ (a @ a.mT)) * b).sum(1)
            found.append(self._rows().to(a.dtype) + 2 * scale * cross + scale * scale * square)
        return torch.stack(found).clamp(min=0).sqrt()

    def _rows(self) -> Tensor:
        if self._squares is None:
            weight = self.weight()
            self._squares = weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(1)
        return self._squares


class AttachedDora(AttachedLora):
    """LoRA layers with magnitudes in one resident model."""

    layers: dict[str, DoraLinear]  # type: ignore[assignment]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names of `AttachedLora` and `<module>.lora_magnitude_vector` (d_out,)."""
        return {**super().shapes(), **{f"{name}.{MAGNITUDE}": (layer.d_out,) for name, layer in self.layers.items()}}

    def check(self, params: Tensors) -> None:
        check_fit(params, self.shapes())

    def init(self, seed: int, dtype: torch.dtype = torch.float32, round_: int | None = None) -> dict[str, Tensor]:
        """Return LoRA's starting point, and the norms of the base's rows as magnitudes."""
        start = {n: t for n, t in super().init(seed, dtype, round_).items() if not n.endswith(MAGNITUDE)}
        rows = {f"{name}.{MAGNITUDE}": layer.row_norms() for name, layer in self.layers.items()}
        return {**start, **{name: t.to("cpu", dtype, copy=True) for name, t in rows.items()}}

    def bind(self, stack: Stack) -> None:
        super().bind(stack)
        for name, layer in self.layers.items():
            layer.m = stack.views[f"{name}.{MAGNITUDE}"]
            layer.forget()

    @contextmanager
    def owned(self, tokens: Spans) -> Iterator[None]:
        for layer in self.layers.values():
            layer.forget()
        with super().owned(tokens):
            yield

    def merged(self, model: PreTrainedModel, params: Tensors) -> dict[str, Tensor]:
        self.check(params)
        state = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
        for name, layer in self.layers.items():
            a, b, m = (params[f"{name}.{kind}"] for kind in ("lora_A", "lora_B", MAGNITUDE))
            weight = layer.weight().to(a.device, torch.promote_types(layer.weight().dtype, a.dtype))
            weight = weight + self.scale(len(a)) * (b @ a)
            weight = weight * (m / weight.norm(dim=1))[:, None]
            before = state[f"{name}.weight"]
            state[f"{name}.weight"] = layer.like_base(weight).to(before.device, before.dtype)
        return state

    def save(self, folder: Path, params: Tensors, base: str) -> None:
        save_peft(folder, params, self.config, base)

    def read(self, folder: Path) -> dict[str, Tensor]:
        return load_kind(folder, self.config)


class Dora(Adapter, name="dora"):
    """DoRA (arXiv 2402.09353): the rows of W + s B A scaled to trained magnitudes m; m, A and B are sent."""

    stackable: ClassVar[bool] = True

    r: PositiveInt = 8
    """Rank of the update of each target matrix."""
    alpha: PositiveFloat = 16.0
    """Scale: the low-rank product is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which an input element of the low-rank path is dropped while training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the output head) or name endings such as [q_proj, v_proj]."""

    def _lora(self) -> Lora:
        return Lora(r=self.r, alpha=self.alpha, dropout=self.dropout, targets=self.targets)

    def _config(self) -> peft.LoraConfig:
        config = self._lora().config()
        config.use_dora = True
        return config

    def attach(self, model: PreTrainedModel, reference: bool = False) -> Attached:
        lora = self._lora()
        inner = lora.attach(model, reference, DoraLinear)
        inner.config.use_dora = True
        return AttachedDora(inner.layers, inner.config, inner.owners, lora.scale)

    def read(self, folder: Path) -> dict[str, Tensor]:
        return load_kind(folder, self._config())

    @classmethod
    def from_peft(cls, saved: peft.PeftConfig) -> Self | None:
        if type(saved) is not peft.LoraConfig or not saved.use_dora:
            return None
        # with alpha / sqrt r the same numbers mean alpha sqrt r here
        alpha = saved.lora_alpha * (saved.r**0.5 if saved.use_rslora else 1)
        return cls(r=saved.r, alpha=alpha, targets=told_targets(saved))
