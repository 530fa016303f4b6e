"""The contract of a runtime: where clients run, and how many at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from fedloom.parts import Part
from fedloom.runtime.engine import Crew, Engine

if TYPE_CHECKING:
    from fedloom.recipe import Recipe


class Runtime(Part, family=True):
    """Where clients run."""

    reference: bool = False
    """Plain arithmetic (unfused LoRA, whole logits, no regrouping of batches): the slow oracle of the fast path."""
    threads: PositiveInt = 2
    """CPU threads of one process; part of what makes two runs equal bit for bit."""
    cohort: PositiveInt | Literal["auto"] = "auto"
    """Clients trained in one pass over the base model; auto: as many as fill a pass of `trainer.micro_tokens` and fit
    in memory."""

    def crew(self, engine: Engine, recipe: Recipe) -> Crew:
        """Return who trains the cohorts of a run; close it when the run is over.

        Args:
            engine: of this process.  recipe: settled.
        """
        raise NotImplementedError

    def lanes(self, recipe: Recipe) -> int:
        """Return how many passes go on at the same time, each in a process of its own."""
        return 1

    def same_results(self, other: Runtime) -> bool:
        """Return whether a run that was begun with one may go on with the other, and end in the same bits."""
        return (self.reference, self.threads, self.cohort) == (other.reference, other.threads, other.cohort)

    def alone(self, recipe: Recipe) -> Iterable[str]:
        """Yield what keeps this recipe's clients from being trained in one pass, one sentence each."""
        if self.reference:
            yield "runtime.reference=true computes one client at a time"
        if not recipe.adapter.stackable:
            yield f"adapter={recipe.adapter.part_name} has no layers for several clients"
        if reason := recipe.algorithm.alone:
            yield f"algorithm={recipe.algorithm.part_name} runs one client after another: {reason}"

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        """Yield why this runtime cannot run the recipe, one sentence each."""
        if self.cohort in {"auto", 1}:
            return
        for reason in self.alone(recipe):
            yield f"runtime.cohort={self.cohort}: {reason}; set runtime.cohort to auto or 1"
