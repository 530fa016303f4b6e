"""Energy that the machine says it used: Intel's and AMD's RAPL counters on Linux, NVML's for NVIDIA GPUs.

The counters are those of whole packages and boards: what other programs use meanwhile is in the figure.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(slots=True)
class Counter:
    """A counter of joules that begins again at zero when it has reached `span`."""

    read: Callable[[], float]
    span: float
    last: float = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.read()

    def since(self) -> float:
        """Return the joules since it was asked last; once round is noticed, twice is not."""
        now, before = self.read(), self.last
        self.last = now
        return now - before if now >= before else now - before + self.span


class Meter:
    """All counters of a machine that may be read."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self.counters = [*_packages(powercap), *_boards()]

    def joules(self) -> float | None:
        """Return the joules since the last call, or since the meter was made; None: the machine reports none."""
        return sum(one.since() for one in self.counters) if self.counters else None


def _packages(powercap: Path) -> list[Counter]:
    """Return RAPL's packages; their sub-domains (`intel-rapl:0:1`) are parts of them."""
    found = []
    for zone in sorted(powercap.glob("*-rapl:*")):
        if zone.name.count(":") != 1 or "mmio" in zone.name:  # mmio counts the same package another way
            continue
        try:
            span = float((zone / "max_energy_range_uj").read_text()) / 1e6
            found.append(Counter(lambda path=zone / "energy_uj": float(path.read_text()) / 1e6, span))  # type: ignore[misc]
        except (OSError, ValueError):  # since 2020 most systems let only root read it
            continue
    return found


def _boards() -> list[Counter]:
    """Return the NVIDIA boards, where the module pynvml (nvidia-ml-py) is installed."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, or no driver: its error class is known only once it is imported
        return []
    found = []
    for i in range(nvml.nvmlDeviceGetCount()):
        board = nvml.nvmlDeviceGetHandleByIndex(i)
        try:
            read = lambda board=board: nvml.nvmlDeviceGetTotalEnergyConsumption(board) / 1e3
            found.append(Counter(read, float("inf")))
        except nvml.NVMLError:  # boards before Volta do not count
            continue
    return found
