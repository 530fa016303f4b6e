"""The contract of a runtime: it performs the effects of a cohort and returns the next state."""

from __future__ import annotations

from pydantic import PositiveInt

from fedloom.parts import Part


class Runtime(Part, family=True):
    """Where clients run."""

    reference: bool = False
    """Plain arithmetic (unfused LoRA, whole logits, no regrouping of batches): the slow oracle of the fast path."""
    threads: PositiveInt = 2
    """CPU threads of one process; part of what makes two runs equal bit for bit."""

    def resolved(self) -> Runtime:
        """Return the runtime with every `auto` replaced by what it stands for on this machine."""
        return self
