"""How much memory a pass takes, measured on the graph that it builds, and how much is free."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch
from torch import Tensor, nn


def activation_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, beside the model's own tensors.

    Args:
        model: whose parameters and buffers do not count.
        forward: builds the graph.
    """
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    del out
    return sum(found.values())


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be had on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
