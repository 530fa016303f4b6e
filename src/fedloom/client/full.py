"""Full fine-tuning: every weight of the model is trained, and no adapter stands beside it.

    w <- w - eta (gradient of f(w)),   w all weights, tied ones once

Clients keep w in at least float32 while they train and compute with it in the model's dtype, so that small steps are
not lost in bf16. The resident base stays as it is; the weights that a client trains take its place in the modules.

On the wire: all weights in float32 in both directions; b P bytes for a model of P numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedloom.client.adapted import Owners, Spans
from fedloom.client.adapters import Adapter
from fedloom.client.attached import Attached
from fedloom.client.quantize import quantised
from fedloom.client.stack import Stack
from fedloom.types import ModelError, Tensors

if TYPE_CHECKING:
    from fedloom.recipe import Recipe


class AttachedFull(Attached):
    """All weights of one resident model.

    Attributes:
        base: live name -> the model's own weight; tied weights have one name.
        places: live name -> the modules that hold it, each with the attribute's name and its name in a state dict.
    """

    whole: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.owners = Owners()
        self.base: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
        names = {id(p): name for name, p in model.named_parameters()}
        self.places: dict[str, list[tuple[nn.Module, str, str]]] = {name: [] for name in self.base}
        for key, p in model.named_parameters(remove_duplicate=False):
            parent, _, attribute = key.rpartition(".")
            self.places[names[id(p)]].append((model.get_submodule(parent), attribute, key))
        self.layers = {key.rpartition(".")[0]: module for spots in self.places.values() for module, _, key in spots}
        self._stack: Stack | None = None
        # the weights of a pass are part of its graph, so that each pass has to make them anew
        model.base_model.register_forward_pre_hook(lambda *_: self._put() if torch.is_grad_enabled() else None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every weight."""
        return {name: tuple(p.shape) for name, p in self.base.items()}

    def init(self, seed: int, dtype: torch.dtype = torch.float32, round_: int | None = None) -> dict[str, Tensor]:
        """Return the base's weights: nothing is drawn."""
        return {name: p.to("cpu", dtype, copy=True).contiguous() for name, p in self.base.items()}

    def like(self) -> Tensor:
        return next(iter(self.base.values()))

    def bind(self, stack: Stack) -> None:
        self._stack = stack
        self._put()

    @contextmanager
    def owned(self, tokens: Spans) -> Iterator[None]:
        self._put()
        with super().owned(tokens):
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self._stack = self._stack, None
        self._put()
        try:
            yield
        finally:
            self._stack = before
            self._put()

    def _put(self) -> None:
        """Let the modules hold what is in the stack now, in the model's dtype; without a stack the base's weights."""
        for name, spots in self.places.items():
            own = self.base[name]
            value = own if self._stack is None else self._stack.views[name][0].to(own.dtype)
            for module, attribute, _ in spots:
                # no Parameter, since it is a step in the graph that leads to the stack
                module._parameters[attribute] = value  # type: ignore[assignment]

    def merged(self, model: PreTrainedModel, params: Tensors) -> dict[str, Tensor]:
        self.check(params)
        state = dict(model.state_dict())
        for name, spots in self.places.items():
            for _, _, key in spots:
                state[key] = params[name].to(self.base[name].device, self.base[name].dtype)
        return state

    def save(self, folder: Path, params: Tensors, base: str) -> None:
        raise ModelError("adapter=full trained all weights, so there is no adapter to write; export with --to merged")

    def read(self, folder: Path) -> dict[str, Tensor]:
        return read_weights(folder)


class Full(Adapter, name="full"):
    """Full fine-tuning: all weights of the model are trained and sent; a run leaves `merged/`, a whole model."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        if recipe.model.quantize != "none":
            yield (
                f"adapter=full trains every weight, and model.quantize={recipe.model.quantize} keeps them in so few "
                "bits that a step would be lost; set model.quantize=none, or adapter=lora"
            )
        if recipe.model.compile:
            yield "adapter=full gives the layers new weights in every pass; set model.compile=false"
        if getattr(recipe.runtime, "shard", 1) > 1:
            yield "adapter=full trains whole weights, which runtime.shard cuts; set runtime.shard=1"

    def attach(self, model: PreTrainedModel, reference: bool = False) -> Attached:
        if odd := next(quantised(model), None):
            raise ModelError(f"adapter=full trains plain weights only, and {odd} is quantised; set model.quantize=none")
        return AttachedFull(model)

    def read(self, folder: Path) -> dict[str, Tensor]:
        return read_weights(folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a model folder, as a run with `adapter=full` leaves it.

    Raises:
        ModelError: the folder holds no safetensors weights.
    """
    paths, found = sorted(folder.glob("model*.safetensors")), dict[str, Any]()
    if not paths:
        raise ModelError(f"{folder} holds no model.safetensors; a run with adapter=full leaves such a folder, merged/")
    for path in paths:
        try:
            found.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    return found
