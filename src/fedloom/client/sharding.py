"""One frozen base model held by several processes together (FSDP, arXiv 2304.11277).

Only the decoder layers' weights are cut: each process keeps its share of every layer, and the whole layer exists while
it computes, in the forward pass and again in the backward pass. Embeddings, output head and last norm stay whole, and
so do adapters, which are plain tensors beside the modules' parameters.

Every process runs the same coroutines on the same rows with the same seeds, and all are pure, so nothing but weights is
ever sent between them, and what each computes is what an unsharded model would have computed, bit for bit on a CPU. It
buys memory, not time: n processes hold 1/n of the layers each and do n times the work together.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fedloom.client.models import hidden_states
from fedloom.types import ModelError


def join(rank: int, size: int, store: Path, device: str) -> None:
    """Meet the other processes that hold the model.

    Args:
        rank: of this process, from 0.  size: how many they are.
        store: a file that all can reach, where they find each other.  device: of this process.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    else:  # all are on this machine: nothing listens to the network, and its name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{store.absolute()}", rank=rank, world_size=size
    )


def shard(model: PreTrainedModel, device: str) -> None:
    """Leave each process its share of the decoder layers, in place; every process calls this.

    Args:
        model: frozen, with its adapter layers attached; its weights may still be on the CPU.
        device: of this process; what stays whole is moved there.

    Raises:
        ModelError: the model has no decoder layers that are known as such.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ModelError(
            f"runtime.shard: no decoder layers were found in a {model.config.model_type} model; set runtime.shard=1"
        )
    kind = torch.device(device).type
    mesh = init_device_mesh(kind, (distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    cut = {id(p) for layer in layers for p in layer.parameters()}
    whole = {p for p in model.parameters() if id(p) not in cut}
    # the backbone has nothing of its own to cut; as the root it fetches one layer's weights while another computes
    fully_shard(model.base_model, mesh=mesh, ignored_params=whole)
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values()):
            if value is not None and not isinstance(value, DTensor):
                value.data = value.data.to(device)
    with (
        torch.no_grad()
    ):  # the first pass makes buffers, which must not be born in inference mode: no graph takes those
        hidden_states(model, torch.zeros(1, 1, dtype=torch.long, device=device))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
