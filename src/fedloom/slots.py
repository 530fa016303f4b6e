"""Several LoRA adapters in one forward pass: a main one, and further slots beside it in every layer.

    y = W x + sum_i w_i s_i B_i A_i x        fixed weights w (`mix`)
    w(x) = softmax(G x)                      or a router G (slots, d_in) that weighs them token by token (`router`)

Slot 0 is the main adapter, `<module>.lora_A` and `<module>.lora_B`; slot i is `<module>.slot<i>.lora_A` and so on; the
weights are `<module>.mix` (slots,) or `<module>.router` (slots, d_in). Without either, all weights are one. What moves
in a fit is chosen by name, as ever; a mixture with fixed weights is one LoRA adapter of the summed rank (`collapsed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedloom import factors
from fedloom.factors import Factors, Scale
from fedloom.types import Tensors

MIX, ROUTER = "mix", "router"


def beside(main: Tensors, *others: Tensors, weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Return the mixture of a main adapter and others with fixed weights.

    Args:
        main: A and B of every module.  others: the same modules, in any rank.
        weights: one an adapter, the main one's first; None: ones.
    """
    mixture = dict(main)
    for i, other in enumerate(others, 1):
        mixture.update({_named(name, i): tensor for name, tensor in other.items()})
    if weights is not None:
        for module in modules(main):
            like = main[f"{module}.lora_A"]
            mixture[f"{module}.{MIX}"] = torch.tensor(list(weights), dtype=like.dtype)
    return mixture


def routed(main: Tensors, *others: Tensors, routers: Tensors) -> dict[str, Tensor]:
    """Return the mixture of adapters that `<module>.router` (slots, d_in) of `routers` weigh token by token.

    Raises:
        ValueError: there is one adapter alone.
    """
    if not others:
        raise ValueError("a router weighs two adapters or more, and there is one")
    return {**beside(main, *others), **routers}


def modules(params: Tensors) -> list[str]:
    """Return the modules of an adapter's main slot."""
    return [name.removesuffix(".lora_A") for name in params if name.endswith(".lora_A") and not slot_of(name)]


def slot_of(name: str) -> int:
    """Return the number of the slot that a tensor belongs to; 0: the main one, or no slot alone."""
    part = name.rpartition(".")[0].rpartition(".")[2]
    return int(part[4:]) if part.startswith("slot") and part[4:].isdigit() else 0


def plain(name: str) -> str:
    """Return the name that a tensor of any slot has in an adapter of its own."""
    return name.replace(f".slot{slot_of(name)}.", ".") if slot_of(name) else name


def is_main(name: str) -> bool:
    """Return whether a tensor is a factor of the main slot."""
    return name.rpartition(".")[2] in ("lora_A", "lora_B") and not slot_of(name)


def is_router(name: str) -> bool:
    """Return whether a tensor is a router."""
    return name.rpartition(".")[2] == ROUTER


def main(params: Tensors) -> dict[str, Tensor]:
    """Return the main adapter of a mixture."""
    return {name: tensor for name, tensor in params.items() if is_main(name)}


def slot(params: Tensors, i: int) -> dict[str, Tensor]:
    """Return the adapter in slot i, under the names of a main one."""
    if not i:
        return main(params)
    return {plain(name): tensor for name, tensor in params.items() if slot_of(name) == i}


def count(params: Tensors) -> int:
    """Return the number of slots, the main one included."""
    return 1 + max((slot_of(name) for name in params), default=0)


def collapsed(params: Tensors, scale: Scale) -> Tensors:
    """Return one LoRA adapter with the products of a mixture with fixed weights, of the summed rank.

    Raises:
        ValueError: a router weighs the slots, so that no single adapter equals them.
    """
    if any(map(is_router, params)):
        raise ValueError("a router weighs the slots token by token: no single adapter equals them")
    if not is_mixture(params):
        return params
    pairs = [factors.pairs(slot(params, i), scale) for i in range(count(params))]
    stacked: dict[str, Factors] = {}
    for module in modules(params):
        weights = params.get(f"{module}.{MIX}", torch.ones(len(pairs))).tolist()
        parts = [one[module].times(weight) for one, weight in zip(pairs, weights, strict=True) if module in one]
        stacked[module] = factors.stack(parts)
    return factors.unpaired(stacked, scale)


def is_mixture(params: Tensors) -> bool:
    """Return whether an adapter has more than its main slot."""
    return any(slot_of(name) or name.rpartition(".")[2] in (MIX, ROUTER) for name in params)


def shapes(params: Tensors, layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that the tensors beside the main slot must have, layer by layer.

    Args:
        params: a mixture.  layers: module -> (d_out, d_in).
    """
    found: dict[str, tuple[int, ...]] = {}
    for module, (d_out, d_in) in layers.items():
        for i in range(1, count(params)):
            a = params.get(_named(f"{module}.lora_A", i))
            rank = len(a) if a is not None and a.dim() == 2 else 1
            found[_named(f"{module}.lora_A", i)], found[_named(f"{module}.lora_B", i)] = (rank, d_in), (d_out, rank)
        if f"{module}.{MIX}" in params:
            found[f"{module}.{MIX}"] = (count(params),)
        if f"{module}.{ROUTER}" in params:
            found[f"{module}.{ROUTER}"] = (count(params), d_in)
    return found


def _named(name: str, i: int) -> str:
    module, _, factor = name.rpartition(".")
    return f"{module}.slot{i}.{factor}"
