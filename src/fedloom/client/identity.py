"""Which model an adapter was trained on, so that it is never measured on another one of the same shapes.

`base_model.json` lies in every run folder and beside every exported adapter. It holds the model's name and a few of its
weights as they are on disk, which does not depend on the dtype or quantisation that the model is loaded in:

{"name": "org/model", "dtype": "BF16", "weights": {"model.layers.0.mlp.up_proj.weight": [0.0132, ...], ...}}

An adapter fits a model

- whose weights are the same, up to rounding where the copies differ in dtype, whatever the names are; or
- of the same hub id, if the weights are as near as two quantisations of one model are.

A folder of other tools tells a name only, in peft's configuration.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedloom.home import BUNDLED
from fedloom.types import ModelError
from fedloom.wire.codec import write_atomic

FILE = "base_model.json"
MATRICES, VALUES = 32, 16
"""So many matrices are looked at, and so many values of the middle row of each."""
ROUNDING = {"F64": 0.0, "F32": 2**-24, "F16": 2**-11, "BF16": 2**-8}
"""Dtype on disk, finest first -> how far off its values may be, as a share of them."""
PRINTED = 1e-4
"""The same of the digits that are kept."""
REQUANTISED = 0.5
"""Largest relative distance of 4-bit values from what they stand for; of unrelated weights it is near sqrt 2."""
_CACHED = re.compile(r"models--(.+?)--(.+?)/snapshots/")


@dataclass(frozen=True, slots=True)
class Base:
    """A model that adapters are trained on.

    Attributes:
        name: under which others find it: a hub id where it has one, else as the recipe tells it.
        dtype: the coarsest of its matrices on disk, in the words of safetensors; "" where nothing is known of them.
        weights: name of a matrix on disk -> some of its values.
    """

    name: str
    dtype: str
    weights: Mapping[str, Sequence[float]]


def identify(name: str, folder: Path) -> Base:
    """Return what tells a model apart.

    Args:
        name: as a recipe tells it.
        folder: its files, with safetensors weights.

    Raises:
        ModelError: the weights cannot be read.
    """
    return Base(BUNDLED[name].hub_id if name in BUNDLED else name, *_sampled(folder))


def stamp(folder: Path, base: Base) -> None:
    """Write which model the adapters in a folder belong on: into it, and beside each adapter in it."""
    told = {"name": base.name, "dtype": base.dtype, "weights": dict(base.weights)}
    text = json.dumps(told, ensure_ascii=False).encode()
    for place in {folder, *(path.parent for path in folder.rglob("adapter_config.json"))}:
        write_atomic(place / FILE, text)


def check_base(folder: Path, model: Base) -> str:
    """Refuse to put the adapter of a folder on a model that it was not trained on.

    Args:
        folder: a PEFT folder, or a run folder.
        model: that it is about to be put on.

    Returns:
        What could not be checked, in one sentence, or "".

    Raises:
        ModelError: the adapter belongs on another model.
    """
    told = _told(folder)
    if told is None or not told.name:
        return f"{folder} does not tell its base model, so nothing shows whether it was trained on {model.name}"
    names = _plain(told.name), _plain(model.name)
    distance = _distance(told.weights, model.weights)
    if distance is not None:
        of_hub = names[0] == names[1] and not _is_path(names[0])
        rounded = 0.0 if told.dtype == model.dtype else max(ROUNDING[told.dtype], ROUNDING[model.dtype])
        if distance <= (REQUANTISED if of_hub else PRINTED + rounded):
            return ""
        raise ModelError(_another(folder, told.name, model.name, "their weights differ"))
    if names[0] == names[1]:
        return ""
    if _is_path(names[0]) or _is_path(names[1]):
        return (
            f"{folder} names {told.name} as its base model and tells none of its weights, so nothing shows whether "
            f"that is {model.name}"
        )
    raise ModelError(
        _another(folder, told.name, model.name, "their names differ")
        + "; if they are one model, write its name into base_model_name_or_path of adapter_config.json"
    )


def _another(folder: Path, told: str, model: str, why: str) -> str:
    return (
        f"{folder} was trained on {told}, and the model here is {model}: {why}. Name the model that it was trained on, "
        f"or an adapter that was trained on {model}"
    )


def _told(folder: Path) -> Base | None:
    """Return what a folder says of its base model; a base of other tools that is a local folder is looked at."""
    path, config = folder / FILE, folder / "adapter_config.json"
    try:
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return Base(found["name"], found["dtype"], found["weights"])
        if config.is_file():
            name = str(json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
            local = bool(name) and Path(name).expanduser().is_dir()
            return Base(name, *(_sampled(Path(name).expanduser()) if local else ("", {})))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: its base model cannot be read: {type(error).__name__}: {error}") from error
    return None


def _plain(name: str) -> str:
    """Return a name such that equal ones mean one model: a hub id, or an absolute path."""
    if name in BUNDLED:
        return BUNDLED[name].hub_id.lower()
    if cached := _CACHED.search(f"{name}/"):
        return f"{cached[1]}/{cached[2]}".lower()
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() or _is_path(name) else name.lower()


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf")


def _distance(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> float | None:
    """Return the largest relative distance of a matrix's values; None: hardly any matrix is in both."""
    both = sorted(a.keys() & b.keys())
    if 2 * len(both) <= max(len(a), len(b)):
        return None
    return max(_apart(a[name], b[name]) for name in both)


def _apart(a: Sequence[float], b: Sequence[float]) -> float:
    if len(a) != len(b):
        return math.inf
    if size := math.hypot(*a):
        return math.dist(a, b) / size
    return math.inf if any(b) else 0.0


def _sampled(folder: Path) -> tuple[str, dict[str, tuple[float, ...]]]:
    """Return the coarsest dtype and some values of a model's matrices, of those that the hashes of their names choose.

    So two copies agree on nearly all of them, even if one lacks a matrix, such as an output head that is tied.
    """
    found: dict[str, tuple[float, ...]] = {}
    dtypes = {""}
    try:
        shapes = {name: path for path in _files(folder) for name in _matrices(path)}
        chosen = sorted(shapes, key=lambda name: hashlib.sha256(name.encode()).digest())[:MATRICES]
        for name in sorted(chosen):
            with safe_open(shapes[name], framework="pt") as file:
                part = file.get_slice(name)
                middle = part.get_shape()[0] // 2
                dtypes.add(part.get_dtype())
                row = part[middle : middle + 1, :VALUES].flatten().tolist()
            found[name] = tuple(float(f"{value:.5g}") for value in row)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{folder}: its weights cannot be read: {type(error).__name__}: {error}") from error
    return max(dtypes, key=["", *ROUNDING].index), found


def _files(folder: Path) -> list[Path]:
    """Return the files that transformers reads weights from."""
    with suppress(FileNotFoundError):
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _matrices(path: Path) -> Iterator[str]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            part = file.get_slice(name)
            if len(part.get_shape()) == 2 and all(part.get_shape()) and part.get_dtype() in ROUNDING:
                yield name
