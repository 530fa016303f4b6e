"""The local runtime: all clients in this process, one after another, on one resident base model."""

from __future__ import annotations

from typing import Literal

from fedloom.runtime.base import Runtime


class LocalRuntime(Runtime, name="local"):
    """One process, one resident base model."""

    cohort: Literal["auto", 1] = "auto"
    """Clients trained in one pass; auto: 1."""

    def resolved(self) -> LocalRuntime:
        return self.model_copy(update={"cohort": 1})
