"""Which clients take part in a round: a pure function of (seed, round)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from fedloom import seeds
from fedloom.parts import Part
from fedloom.types import RecipeError


class Sampler(Part, family=True):
    """Chooses the cohort of a round."""

    def cohort(self, round_: int, clients: Sequence[str], seed: int) -> list[str]:
        """Return the clients of round `round_`, in the order of `clients`."""
        raise NotImplementedError


class Uniform(Sampler, name="uniform"):
    """A share or a number of the clients, without replacement, each as likely as any other."""

    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the clients, rounded up; the default is all of them."""
    count: PositiveInt | None = None
    """Number of clients, instead of `fraction`."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.fraction is not None and self.count is not None:
            raise ValueError("set either fraction or count, not both")
        return self

    def size(self, clients: int) -> int:
        """Return the size of a cohort out of `clients`.

        Raises:
            RecipeError: `count` exceeds the number of clients.
        """
        if self.count is None:
            return math.ceil((self.fraction or 1.0) * clients - 1e-9)
        if self.count > clients:
            raise RecipeError(f"sampler.count is {self.count} but there are {clients} clients; allowed: 1 to {clients}")
        return self.count

    def cohort(self, round_: int, clients: Sequence[str], seed: int) -> list[str]:
        size = self.size(len(clients))
        if size == len(clients):
            return list(clients)
        drawn = seeds.numpy_generator(seed, round_, None, "cohort").choice(len(clients), size, replace=False)
        return [clients[i] for i in sorted(drawn.tolist())]
