"""Adapters as PEFT folders, which `peft.PeftModel.from_pretrained` loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedloom.factors import Scale
from fedloom.types import ModelError, Tensors


def save_peft(folder: Path, params: Tensors, config: peft.LoraConfig, base: str) -> None:
    """Write `params` as a PEFT adapter folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        folder: created if absent; files of the same names are replaced.
        params: live name -> tensor, as `Attached.shapes` names them.
        config: the adapter's configuration.
        base: name of the base model, written into the adapter's configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = {f"base_model.model.{name}.weight": t.detach().cpu().contiguous() for name, t in sorted(params.items())}
    # written here, since `save_file` reports a full disk as a SafetensorError without its cause
    (folder / "adapter_model.safetensors").write_bytes(save(saved, metadata={"format": "pt"}))
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))


def load_peft(folder: Path, like: peft.LoraConfig | None = None) -> dict[str, Tensor]:
    """Read the tensors of a PEFT LoRA folder under their live names.

    Args:
        folder: the PEFT folder.
        like: the configuration that its rank and scale must be those of; None: not checked.

    Raises:
        ModelError: the folder holds no safetensors LoRA adapter, or one of another rank or scale.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which is never loaded)" if (folder / "adapter_model.bin").exists() else ""
        )
        raise ModelError(f"{folder} holds no adapter_model.safetensors{pickled}; a run folder's adapter/ is one")
    if like is not None:
        _check_scale(folder, like)
    try:
        saved: dict[str, Any] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    return {name.removeprefix("base_model.model.").removesuffix(".weight"): t for name, t in saved.items()}


def read_peft(folder: Path, scale: Scale) -> dict[str, Tensor]:
    """Read a PEFT LoRA folder of any ranks and scales so that its products are the same under `scale`.

    Raises:
        ModelError: the folder holds no safetensors LoRA adapter.
    """
    params, told = load_peft(folder), peft.LoraConfig.from_pretrained(str(folder))
    for name in [name for name in params if name.endswith(".lora_B")]:
        module, rank = name.removesuffix(".lora_B"), params[name].shape[1]
        alpha = told.alpha_pattern.get(module, told.lora_alpha)
        own = alpha / (math.sqrt(rank) if told.use_rslora else rank)
        if not math.isclose(own, scale(rank)):
            params[name] = params[name] * (own / scale(rank))
    return params


def _check_scale(folder: Path, like: peft.LoraConfig) -> None:
    """Refuse an adapter whose numbers would mean something else under the recipe's configuration."""
    try:
        found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'adapter_config.json'} cannot be read: {error}") from error
    pairs = {"r": like.r, "lora_alpha": like.lora_alpha, "use_rslora": like.use_rslora}
    odd = [f"{k} is {found.get(k)!r}, the recipe's {v!r}" for k, v in pairs.items() if found.get(k, False) != v]
    if odd:
        raise ModelError(f"{folder}: {'; '.join(odd)}; set adapter.r, adapter.alpha and adapter.rslora to its values")
