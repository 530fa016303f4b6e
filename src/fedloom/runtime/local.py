"""The local runtime: all clients in this process, on one resident base model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedloom.runtime.base import Runtime
from fedloom.runtime.engine import Crew, Engine, Errands, Reply

if TYPE_CHECKING:
    from fedloom.recipe import Recipe


class LocalRuntime(Runtime, name="local"):
    """One process, one resident base model."""

    def crew(self, engine: Engine, recipe: Recipe) -> Crew:
        return LocalCrew(engine, 1 if self.cohort == "auto" else self.cohort)


class LocalCrew:
    """Trains a cohort on the engine's model, `size` clients in one pass."""

    def __init__(self, engine: Engine, size: int) -> None:
        self.engine, self.size = engine, size

    def open(self) -> None:
        """There is nothing to get ready."""

    def ready(self) -> None:
        """It always is."""

    def replies(self, round_: int, errands: Errands) -> Iterator[Reply]:
        """Yield each client's reply, in the order of the errands."""
        work = self.engine.finish_some if errands.finish else self.engine.train
        for clients in errands.chunks(self.size):
            yield from work(round_, [errands.make(name) for name in clients])

    def close(self) -> None:
        """There is nothing to let go of."""
