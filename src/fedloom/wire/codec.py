"""Messages, memories and states as safetensors bytes; never a pickle.

A tensor is stored under `group/name`; scalars and texts stand as JSON in the file's metadata under `fedloom`, and
keep every bit (JSON writes the shortest text that reads back as the same double). Equal groups give equal bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from fedloom.types import Bundle, WireError

FORMAT = "1"


def encode(groups: Mapping[str, Bundle]) -> bytes:
    """Return the groups as one safetensors file; its length is what is counted as traffic.

    Raises:
        ValueError: a group's name holds a slash.
    """
    if odd := [group for group in groups if "/" in group]:
        raise ValueError(f"group names hold no slash: {odd}")
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for group, bundle in groups.items():
        for name, t in bundle.tensors.items():
            place = t.untyped_storage().data_ptr()
            t = t.detach().cpu()
            # safetensors refuses tensors that share memory, such as one that stands in two groups
            again = place in seen
            tensors[f"{group}/{name}"] = t.clone(memory_format=torch.contiguous_format) if again else t.contiguous()
            seen.add(place)
    rest = {g: {"scalars": dict(b.scalars), "texts": dict(b.texts)} for g, b in groups.items()}
    # one key: safetensors writes several in an order that differs from call to call
    data: bytes = save_bytes(tensors, metadata={"fedloom": json.dumps({"format": FORMAT, "groups": rest})})
    return data


def decode(data: bytes) -> dict[str, Bundle]:
    """Return the groups of `encode`.

    Raises:
        WireError: the bytes are damaged or were not written by `encode`.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        told = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fedloom"])
        tensors = load_bytes(data)
        version, rest = told["format"], told["groups"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WireError(f"not a fedloom message of {len(data)} bytes ({type(error).__name__}: {error})") from error
    if version != FORMAT:
        raise WireError(f"message format {version!r} is not the format {FORMAT!r} of this version")
    split: dict[str, dict[str, Tensor]] = {group: {} for group in rest}
    for key, tensor in sorted(tensors.items()):  # safetensors gives them in an order that differs from call to call
        group, _, name = key.partition("/")
        if group not in split:
            raise WireError(f"tensor {key!r} belongs to no group of the message ({', '.join(rest)})")
        split[group][name] = tensor
    return {group: Bundle(split[group], rest[group]["scalars"], rest[group]["texts"]) for group in rest}


def write(path: Path, groups: Mapping[str, Bundle]) -> int:
    """Write the groups to `path` at once or not at all, flushed to the disk; return the bytes.

    Raises:
        OSError: the disk refuses; `path` is then what it was before.
    """
    data = encode(groups)
    write_atomic(path, data)
    return len(data)


def read(path: Path) -> dict[str, Bundle]:
    """Read what `write` wrote.

    Raises:
        WireError: the file is missing or damaged.
    """
    try:
        return decode(path.read_bytes())
    except FileNotFoundError as error:
        raise WireError(f"{path} is missing; the run folder is incomplete") from error
    except WireError as error:
        raise WireError(f"{path}: {error}") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file at once or not at all: a temporary file beside it, flushed, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
