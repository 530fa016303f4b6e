"""Mixtures of LoRA adapters on disk. One with fixed weights is one PEFT adapter of the summed rank; with a router:

<folder>/slot0, slot1, ...     each slot's factors as a PEFT folder, that of the main adapter first
<folder>/router.safetensors    `<module>.router` (slots, d_in), whose softmax weighs the slots token by token
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from fedloom import slots
from fedloom.types import Tensors

ROUTERS = "router.safetensors"


def is_routed(folder: Path) -> bool:
    """Return whether a folder holds a mixture with a router."""
    return (folder / ROUTERS).is_file()


def save_routed(folder: Path, params: Tensors, save_one: Callable[[Path, Tensors], None]) -> None:
    """Write a mixture with a router.

    Args:
        save_one: writes one adapter as a PEFT folder.
    """
    for i in range(slots.count(params)):
        save_one(folder / f"slot{i}", slots.slot(params, i))
    routers = {name: t.detach().cpu().contiguous() for name, t in sorted(params.items()) if slots.is_router(name)}
    (folder / ROUTERS).write_bytes(save(routers))


def read_routed(folder: Path, read_one: Callable[[Path], Tensors]) -> dict[str, Tensor]:
    """Read what `save_routed` wrote.

    Args:
        read_one: reads one PEFT folder.
    """
    several = [read_one(folder / f"slot{i}") for i in range(len(list(folder.glob("slot*"))))]
    return slots.routed(*several, routers=load_file(folder / ROUTERS))
