"""(IA)^3 (Liu et al., arXiv 2205.05638): learned vectors that scale keys, values and what enters the MLP's last layer.

    attention's layers:    y = l * (W x + c)       l (d_out, 1), trained from one
    feedforward's layers:  y = W (l * x) + c       l (1, d_in)

On the wire: b sum(l) numbers, some thousandth of what LoRA sends. FedAvg averages the vectors.

The layers are those of peft's table for the model's architecture; `targets` and `feedforward` name others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal, Self

import peft
import torch
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS,
)
from pydantic import model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedloom.client.adapted import Adapted, Owners, check_targets
from fedloom.client.adapters import Adapter
from fedloom.client.attached import Attached
from fedloom.client.attached_lora import replaced
from fedloom.client.peft_files import load_kind, save_peft
from fedloom.client.quantize import is_linear
from fedloom.client.stack import Stack
from fedloom.types import ModelError, Tensors, suggest

VECTOR = "ia3_l"


class Ia3Linear(Adapted):
    """A frozen linear layer and the vectors of K clients.

    Attributes:
        feedforward: whether they scale what comes in, not what goes out.
        l: (K, d), set by `Attached.load`.
    """

    l: Tensor  # noqa: E741 - its name in the paper

    def __init__(self, base: nn.Module, owners: Owners, feedforward: bool) -> None:
        super().__init__(base, owners)
        self.feedforward, self.edge = feedforward, not feedforward

    @property
    def shape(self) -> tuple[int, int]:
        """The vector's shape in peft's files."""
        return (1, self.d_in) if self.feedforward else (self.d_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        if not self.enabled:
            return self.base(x)  # type: ignore[no-any-return]
        vectors = self.l.to(x.dtype)
        if self.feedforward:
            return self.base(self.by_client(x, vectors))  # type: ignore[no-any-return]
        return self.by_client(self.base(x), vectors)


class AttachedIa3(Attached):
    """The layers with vectors that were put into one resident model.

    Attributes:
        config: the peft configuration that describes them.
    """

    layers: dict[str, Ia3Linear]

    def __init__(self, layers: Mapping[str, Ia3Linear], config: peft.IA3Config, owners: Owners) -> None:
        self.layers, self.config, self.owners = dict(layers), config, owners

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return `<module>.ia3_l` -> (d_out, 1), or (1, d_in) in the feedforward layers."""
        return {f"{name}.{VECTOR}": layer.shape for name, layer in self.layers.items()}

    def init(self, seed: int, dtype: torch.dtype = torch.float32, round_: int | None = None) -> dict[str, Tensor]:
        """Return ones: the model begins as the base."""
        return {name: torch.ones(shape, dtype=dtype) for name, shape in self.shapes().items()}

    def like(self) -> Tensor:
        return next(iter(self.layers.values())).weight()

    def bind(self, stack: Stack) -> None:
        for name, layer in self.layers.items():
            layer.l = stack.views[f"{name}.{VECTOR}"].flatten(1)
            layer.enabled = True

    @contextmanager
    def off(self) -> Iterator[None]:
        before = {name: layer.enabled for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                layer.enabled = before[name]

    def merged(self, model: PreTrainedModel, params: Tensors) -> dict[str, Tensor]:
        self.check(params)
        state = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
        for name, layer in self.layers.items():
            # (d_out, 1) scales the rows of the weight, (1, d_in) its columns
            vector = params[f"{name}.{VECTOR}"]
            weight = state[f"{name}.weight"]
            scaled = weight.to(torch.promote_types(weight.dtype, vector.dtype)) * layer.like_base(vector).to(
                weight.device
            )
            state[f"{name}.weight"] = scaled.to(weight.dtype)
            bias = state.get(f"{name}.bias")
            if bias is not None and not layer.feedforward:
                state[f"{name}.bias"] = (bias * vector.flatten().to(bias.device)).to(bias.dtype)
        return state

    def save(self, folder: Path, params: Tensors, base: str) -> None:
        save_peft(folder, params, self.config, base)

    def read(self, folder: Path) -> dict[str, Tensor]:
        return load_kind(folder, self.config)


class Ia3(Adapter, name="ia3"):
    """(IA)^3 (arXiv 2205.05638): trained vectors that scale keys, values and the inputs of the MLPs' last layers."""

    stackable: ClassVar[bool] = True

    targets: Literal["auto"] | tuple[str, ...] = "auto"
    """Name endings of the layers that have a vector; auto: keys, values, the MLP's last layer, as peft lists them."""
    feedforward: Literal["auto"] | tuple[str, ...] = "auto"
    """Which of `targets` scale their input, not their output; auto: as peft lists them; []: none."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if self.targets != "auto" and self.feedforward != "auto":
            odd = [name for name in self.feedforward if name not in self.targets]
            if odd:
                hint = suggest(odd[0], self.targets)
                raise ValueError(f"adapter.feedforward names {odd[0]!r}, which is not in adapter.targets{hint}")
        if (self.targets == "auto") != (self.feedforward == "auto"):
            raise ValueError(
                "adapter.targets and adapter.feedforward belong together: set both (feedforward=[]: none scales its "
                "input), or leave both at auto"
            )
        return self

    def attach(self, model: PreTrainedModel, reference: bool = False) -> Attached:
        targets, feedforward = self._named(model)
        config = peft.IA3Config(
            target_modules=list(targets), feedforward_modules=list(feedforward), task_type="CAUSAL_LM"
        )
        config.base_model_name_or_path = model.name_or_path
        names = [name for name, _ in model.named_modules() if _ends(name, targets)]
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if is_linear(m)})
        lost = [end for end in targets if not any(_ends(name, [end]) for name in names)]
        if lost or not names:
            raise ModelError(
                f"adapter.targets: no module of {model.name_or_path} is named {', '.join(map(repr, lost)) or '(empty)'}"
                f"{suggest(lost[0], linear) if lost else ''}; linear modules: {', '.join(linear)}; or auto"
            )
        check_targets(model, names)
        owners = Owners()
        return AttachedIa3(
            replaced(model, names, lambda name, base: Ia3Linear(base, owners, _ends(name, feedforward))),
            config,
            owners,
        )

    def _named(self, model: PreTrainedModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
        kind = model.config.model_type
        if self.targets != "auto" and self.feedforward != "auto":
            return self.targets, self.feedforward
        if kind not in TARGETS or kind not in FEEDFORWARD:
            raise ModelError(
                f"adapter.targets=auto: peft lists no (IA)^3 layers for {kind} models (it does for "
                f"{', '.join(sorted(TARGETS))}); set adapter.targets to the keys', the values' and the MLP's last "
                "layer, and adapter.feedforward to the last of them"
            )
        return tuple(sorted(TARGETS[kind])), tuple(sorted(FEEDFORWARD[kind]))

    def read(self, folder: Path) -> dict[str, Tensor]:
        return load_kind(folder, peft.IA3Config(task_type="CAUSAL_LM"))

    @classmethod
    def from_peft(cls, saved: peft.PeftConfig) -> Self | None:
        if not isinstance(saved, peft.IA3Config):
            return None
        return cls(
            targets=tuple(sorted(saved.target_modules or ())),
            feedforward=tuple(sorted(saved.feedforward_modules or ())),
        )


def _ends(name: str, endings: Iterable[str]) -> bool:
    return any(name == end or name.endswith("." + end) for end in endings)
