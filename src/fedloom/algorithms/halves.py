"""What methods share that move one factor of LoRA at a time: the names of A alone, or of B alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from fedloom import tensors
from fedloom.types import Tensors

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

Factor = Literal["lora_A", "lora_B"]


def moves(factor: Factor) -> Callable[[str], bool]:
    """Return whether a name is of one factor, as a function of the name."""
    return lambda name: name.endswith(f".{factor}")


def half(params: Tensors, factor: Factor) -> dict[str, Tensor]:
    """Return one factor of every module."""
    return {name: t for name, t in params.items() if moves(factor)(name)}


def change(ended: Tensors, start: Tensors, factor: Factor) -> Tensors:
    """Return the change of one factor of every module."""
    return tensors.sub(half(ended, factor), half(start, factor))


def applied(params: Tensors, delta: Tensors) -> Tensors:
    """Return an adapter with a change of some of its tensors added; the others are what they were."""
    return {name: t + delta[name] if name in delta else t for name, t in params.items()}


def product_problems(algorithm: str, recipe: Recipe) -> Iterable[str]:
    """Yield why a rule that compares products does not go with an algorithm that sends one factor."""
    if recipe.server.aggregator.products:
        yield (
            "server.aggregator.distance=product needs both factors of every module, and clients of "
            f"algorithm={algorithm} send one of them; set server.aggregator.distance=factors"
        )
