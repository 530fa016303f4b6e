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


def save_peft(folder: Path, params: Tensors, config: peft.PeftConfig, base: str) -> None:
    """Write `params` as a PEFT adapter folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        folder: created if absent; files of the same names are replaced.
        params: live name -> tensor, as `Attached.shapes` names them.
        config: the adapter's configuration.
        base: name of the base model, written into the adapter's configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = {
        f"base_model.model.{_saved(name, config)}": t.detach().cpu().contiguous() for name, t in sorted(params.items())
    }
    # written here, since `save_file` reports a full disk as a SafetensorError without its cause
    (folder / "adapter_model.safetensors").write_bytes(save(saved, metadata={"format": "pt"}))
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))


def _saved(name: str, config: peft.PeftConfig) -> str:
    """Return the name that peft gives a tensor: matrices of LoRA are modules with a weight, all others parameters."""
    matrix = type(config) is peft.LoraConfig and name.endswith((".lora_A", ".lora_B"))
    return f"{name}.weight" if matrix else name


def load_kind(folder: Path, like: peft.PeftConfig) -> dict[str, Tensor]:
    """Read the tensors of a PEFT folder of one kind under their live names.

    Args:
        like: of that kind; what the folder says of rank and scale must be the same.

    Raises:
        ModelError: the folder holds no such adapter.
    """
    params = load_peft(folder)
    told = _told(folder)
    kind = like.peft_type.value if like.peft_type else ""
    if told.get("peft_type") != kind:
        raise ModelError(
            f"{folder} holds an adapter of kind {told.get('peft_type')}, and the recipe's is {kind}; set adapter to it"
        )
    keys = [key for key in ("r", "init_r", "lora_alpha", "use_rslora", "use_dora") if hasattr(like, key)]
    odd = [f"{key} is {told.get(key)!r}, the recipe's {getattr(like, key)!r}" for key in keys]
    odd = [text for key, text in zip(keys, odd, strict=True) if told.get(key, False) != getattr(like, key)]
    if odd:
        raise ModelError(f"{folder}: {'; '.join(odd)}; set the adapter's knobs to its values")
    return params


def saved_config(folder: Path) -> peft.PeftConfig:
    """Return the configuration of a PEFT folder.

    Raises:
        ModelError: it has none that can be read.
    """
    _told(folder)
    found: peft.PeftConfig = peft.PeftConfig.from_pretrained(str(folder))
    return found


def _told(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'adapter_config.json'} cannot be read: {error}") from error
    return found


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
    found = _told(folder)
    pairs = {"r": like.r, "lora_alpha": like.lora_alpha, "use_rslora": like.use_rslora}
    odd = [f"{k} is {found.get(k)!r}, the recipe's {v!r}" for k, v in pairs.items() if found.get(k, False) != v]
    if odd:
        raise ModelError(f"{folder}: {'; '.join(odd)}; set adapter.r, adapter.alpha and adapter.rslora to its values")
