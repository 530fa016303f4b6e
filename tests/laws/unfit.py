"""Parts with which a worker process meets what may go wrong; in the process of the test they do nothing.

The variable UNFIT says what happens when a worker imports this module.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from fedloom.types import ClientUpdate, DataError, Memory
from fedloom.wire.transforms import Transform

IN_WORKER = "fedloom.runtime.worker" in sys.modules
what = os.environ.get("UNFIT") if IN_WORKER else None
if what == "import":
    raise ImportError("no module named 'flash_attention_5'")
if what == "killed":
    sys.stderr.write("RuntimeError: CUDA error: device-side assert triggered\n")
    os.kill(os.getpid(), signal.SIGKILL)


class Unfit(Transform, name="unfit"):
    """Raises at one client, in a worker only."""

    raises: str = ""
    """DataError, MemoryError or ValueError."""

    def encode(self, update: ClientUpdate, memory: Memory, generator: torch.Generator) -> tuple[ClientUpdate, Memory]:
        if IN_WORKER and update.client == "client-2" and self.raises:
            kinds: dict[str, Any] = {"DataError": DataError, "MemoryError": MemoryError, "ValueError": ValueError}
            raise kinds[self.raises]("row 7 is odd")
        return update, memory
