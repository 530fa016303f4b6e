"""AdaLoRA (Zhang et al., arXiv 2303.10512): low-rank factors like an SVD, ranks dealt out by importance.

    W + (alpha / r) P diag(lambda) Q,   P (d_out, r) = lora_B,  lambda (r, 1) = lora_E,  Q (r, d_in) = lora_A
    loss of a client: f + gamma / (2 n) sum over the n layers of ||P^T P - I||_F + ||Q Q^T - I||_F

lambda starts at zero, P and Q small and random. Clients that each prune by themselves would be averaged over different
ranks, so the server deals out the ranks. After round t, with w the averaged weights and d their change, it has of every
entry the sensitivity I = |w d| (d stands for the gradient, of which it is a step), smoothed as in the paper:

    I' = b1 I' + (1 - b1) I,   U' = b2 U' + (1 - b2) |I - I'|,   s = I' U'
    importance of triplet i:   s(lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij)

and lambda becomes zero outside the b(t) most important triplets of all layers: b is n r up to round `warmup`, falls
with the third power to n `target` and stays there for the last `final` rounds, in which the chosen triplets stay.

On the wire: P, lambda and Q; b (r (d_in + d_out + 1)) a layer, pruned or not, since a triplet may come back.

Differs from the paper in: the budget falls by rounds and not by steps; a pruned lambda is trained from zero within a
round and cut again after it; importance comes from the cohort's mean change. The regulariser is that of the authors'
code (a mean of norms), not the sum of squares in their text. The scale is peft's, alpha / (r + 1e-5).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import peft
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from fedloom import seeds
from fedloom.client.adapters import Adapter, Lora
from fedloom.client.attached import Attached, check_fit
from fedloom.client.attached_lora import AttachedLora, told_targets
from fedloom.client.lora import LoraLinear
from fedloom.client.peft_files import load_kind, save_peft
from fedloom.client.stack import Stack
from fedloom.types import Bundle, ModelError, ServerState, Tensors

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

SLOT = "ada_lora"
"""Prefix of the server's slots: smoothed sensitivities and their uncertainties."""
KINDS = ("lora_E", "lora_B", "lora_A")
BETA = 0.85
"""b1 and b2, as in the paper and in peft."""


class AdaLinear(LoraLinear):
    """A LoRA layer with the entries of a diagonal between its factors.

    Attributes:
        e: (K, r, 1).
    """

    e: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return lambda Q (K, r, d_in) and P (K, d_out, r); differentiable."""
        return self.a * self.e, self.b


class AttachedAda(AttachedLora):
    """AdaLoRA's layers in one resident model.

    Attributes:
        part: the recipe's hyper-parameters.
    """

    layers: dict[str, AdaLinear]  # type: ignore[assignment]

    def __init__(self, inner: AttachedLora, part: AdaLora) -> None:
        super().__init__(inner.layers, inner.config, inner.owners, part.scale)
        self.part = part
        self.penalty = self._apart if part.gamma else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names of `AttachedLora` and `<module>.lora_E` (r, 1)."""
        return {**super().shapes(), **{f"{name}.lora_E": (layer.r, 1) for name, layer in self.layers.items()}}

    def check(self, params: Tensors) -> None:
        check_fit(params, self.shapes())

    def init(self, seed: int, dtype: torch.dtype = torch.float32, round_: int | None = None) -> dict[str, Tensor]:
        """Return peft's starting point from our own stream: lambda zero, P and Q normal with deviation 0.02."""
        stream, start = seeds.generator(seed, round_, None, "adapter"), {}
        for name, shape in self.shapes().items():
            drawn = torch.zeros(shape) if name.endswith("lora_E") else torch.randn(shape, generator=stream) * 0.02
            start[name] = drawn.to(dtype)
        return start

    def bind(self, stack: Stack) -> None:
        super().bind(stack)
        for name, layer in self.layers.items():
            layer.e = stack.views[f"{name}.lora_E"]

    def _apart(self, params: Tensors) -> Tensor:
        """Return gamma times the mean distance of P^T P and Q Q^T from the identity."""
        grams = [t.mT @ t for n, t in params.items() if n.endswith("lora_B")]
        grams += [t @ t.mT for n, t in params.items() if n.endswith("lora_A")]
        distances = [torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device)) for g in grams]
        return self.part.gamma * torch.stack(distances).mean()

    def governed(self, before: ServerState, after: ServerState, rounds: int) -> ServerState:
        """Return the state with lambda zero outside the triplets that the round's budget leaves."""
        if self.part.target == self.part.r or not after.params:
            return after
        kept = {group: after.slots.get(f"{SLOT}_{group}", Bundle()).tensors for group in ("sensitivity", "uncertainty")}
        if after.round > rounds - self.part.final:
            chosen = {name: t != 0 for name, t in before.params.items() if name.endswith("lora_E")}
        else:
            kept = _smoothed(kept["sensitivity"], kept["uncertainty"], before.params, after.params)
            chosen = self._most_important(kept, self.part.budget(after.round, rounds, len(self.layers)))
        params = {n: t * chosen[n].to(t.dtype) if n in chosen else t for n, t in after.params.items()}
        slots = {f"{SLOT}_{group}": Bundle(found) for group, found in kept.items()}
        return replace(after, params=params, slots={**after.slots, **slots})

    def _most_important(self, kept: dict[str, Tensors], budget: int) -> dict[str, Tensor]:
        """Return `<module>.lora_E` -> (r, 1) which of its triplets are among the `budget` most important of all."""
        sensitivity, uncertainty = kept["sensitivity"], kept["uncertainty"]
        importance = {}
        for name in self.layers:
            e, b, a = (sensitivity[f"{name}.{kind}"] * uncertainty[f"{name}.{kind}"] for kind in KINDS)
            importance[f"{name}.lora_E"] = e + b.mean(0)[:, None] + a.mean(1, keepdim=True)
        # ties go to what comes first, so that exactly the budget is kept
        order = torch.cat([t.flatten() for t in importance.values()]).argsort(descending=True, stable=True)
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[:budget]] = True
        parts = mask.split([len(t) for t in importance.values()])
        return {name: part[:, None] for name, part in zip(importance, parts, strict=True)}

    def merged(self, model: PreTrainedModel, params: Tensors) -> dict[str, Tensor]:
        self.check(params)
        pairs = {}
        for name in self.layers:
            pairs[f"{name}.lora_A"] = params[f"{name}.lora_A"] * params[f"{name}.lora_E"]
            pairs[f"{name}.lora_B"] = params[f"{name}.lora_B"]
        plain = AttachedLora(self.layers, self.config, self.owners, self.scale)
        return plain.merged(model, pairs)

    def save(self, folder: Path, params: Tensors, base: str) -> None:
        save_peft(folder, params, self.part.config(self.config.target_modules), base)

    def read(self, folder: Path) -> dict[str, Tensor]:
        return self.part.read(folder)


def _smoothed(sensitivity: Tensors, uncertainty: Tensors, before: Tensors, after: Tensors) -> dict[str, Tensors]:
    """Return I' and U' of every tensor after a round; both start at zero."""
    smooth: dict[str, Tensor] = {}
    unsure: dict[str, Tensor] = {}
    for name, t in after.items():
        now = (t * (t - before[name])).abs()
        smooth[name] = BETA * sensitivity.get(name, torch.zeros_like(t)) + (1 - BETA) * now
        unsure[name] = BETA * uncertainty.get(name, torch.zeros_like(t)) + (1 - BETA) * (now - smooth[name]).abs()
    return {"sensitivity": smooth, "uncertainty": unsure}


class AdaLora(Adapter, name="ada-lora"):
    """AdaLoRA (arXiv 2303.10512): W + s P diag(lambda) Q, triplets dealt out by the server every round."""

    stackable: ClassVar[bool] = True

    r: PositiveInt = 12
    """Rank with which every matrix begins."""
    target: PositiveInt = 8
    """Mean rank at the end; equal to `r`: nothing is pruned."""
    warmup: NonNegativeInt = 0
    """Rounds before ranks begin to fall."""
    final: NonNegativeInt = 1
    """Last rounds, with the ranks at their target and the chosen triplets fixed."""
    alpha: PositiveFloat = 16.0
    """Scale: the product is multiplied by alpha / r."""
    gamma: NonNegativeFloat = 0.5
    """Weight of the distance of P and Q from orthogonality in the loss; 0: none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which an input element of the low-rank path is dropped while training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the output head) or name endings such as [q_proj, v_proj]."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.target > self.r:
            raise ValueError(f"adapter.target={self.target} is above adapter.r={self.r}, the rank that it falls from")
        return self

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        if self.target == self.r:
            return
        if self.warmup + self.final >= recipe.rounds:
            yield (
                f"adapter.warmup={self.warmup} and adapter.final={self.final} leave none of rounds={recipe.rounds} in "
                "which ranks could fall; lower them, or set adapter.target=adapter.r"
            )
        alone = [recipe.algorithm.part_name] if recipe.algorithm.personal else []
        alone += ["local"] if "local" in recipe.compare else []
        if alone:
            yield (
                f"adapter=ada-lora: the server deals out the ranks of the global adapter, and clients of {alone[0]} "
                f"keep adapters of their own, whose ranks nobody would lower; set adapter.target={self.r} (that is "
                "adapter.r), or adapter=lora"
            )

    def budget(self, round_: int, rounds: int, layers: int) -> int:
        """Return how many triplets all layers have together after `round_` finished rounds of `rounds`."""
        last = rounds - self.final
        if round_ <= self.warmup:
            return layers * self.r
        left = max(0.0, 1 - (round_ - self.warmup) / (last - self.warmup))
        return layers * self.target + int(layers * (self.r - self.target) * left**3)

    def config(self, targets: str | Iterable[str] | None = None) -> peft.AdaLoraConfig:
        """Return peft's configuration of the same adapter; its own schedule plays no part once it is trained."""
        told = self.targets if targets is None else targets
        return peft.AdaLoraConfig(
            init_r=self.r,
            target_r=self.target,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=told if isinstance(told, str) else list(told),
            orth_reg_weight=self.gamma,
            total_step=1,
            task_type="CAUSAL_LM",
        )

    def attach(self, model: PreTrainedModel, reference: bool = False) -> Attached:
        lora = Lora(r=self.r, alpha=self.alpha, dropout=self.dropout, targets=self.targets)
        return AttachedAda(lora.attach(model, reference, AdaLinear), self)

    def read(self, folder: Path) -> dict[str, Tensor]:
        params = load_kind(folder, self.config())
        if any(name.endswith("lora_E") and len(t) != self.r for name, t in params.items()):
            raise ModelError(
                f"{folder}: its matrices were cut to ranks of their own; those written here keep all {self.r}"
            )
        return params

    @classmethod
    def from_peft(cls, saved: peft.PeftConfig) -> Self | None:
        if not isinstance(saved, peft.AdaLoraConfig):
            return None
        return cls(
            r=saved.init_r,
            target=min(saved.target_r, saved.init_r),
            alpha=saved.lora_alpha,
            targets=told_targets(saved),
        )

    def scale(self, rank: int) -> float:
        return self.alpha / (rank + 1e-5)
