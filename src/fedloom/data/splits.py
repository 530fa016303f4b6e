"""Splits: each client's own rows are cut into train, validation and test; all three come from one assignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from fedloom.data.rows import Row, column
from fedloom.parts import Record
from fedloom.seeds import numpy_generator
from fedloom.types import DataError


class Splits(Record):
    """Shares of each client's rows; they sum to 1."""

    train: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share that is trained on."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share for choosing checkpoints and early stopping."""
    test: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share for the reported numbers."""
    group: str | None = None
    """Field whose equal values must lie in the same split at all clients, such as the number of a task."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(sum(self.shares) - 1) > 1e-9:
            raise ValueError(f"train + validation + test must be 1, got {' + '.join(map(str, self.shares))}")
        return self

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of train, validation and test."""
        return self.train, self.validation, self.test


@dataclass(frozen=True, slots=True)
class ClientData:
    """A client's rows, as indices into the encoded examples; the three are disjoint, `train` is never empty."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def all(self) -> np.ndarray:
        """All rows of the client."""
        return np.concatenate([self.train, self.validation, self.test])


def cut(rows: Sequence[Row], owners: Mapping[str, np.ndarray], splits: Splits, seed: int) -> dict[str, ClientData]:
    """Cut the rows of every client by the shares.

    Args:
        rows: all rows.
        owners: client -> indices of its rows.
        splits: the shares.
        seed: the recipe's seed; a client's cut depends on it, its name and its rows alone.

    Raises:
        DataError: rows lack the group field, or a client is left without training rows.
    """
    if splits.group is None:
        return {client: _own(owned, splits, client, seed) for client, owned in owners.items()}
    values, codes = np.unique(column(rows, splits.group, "data.splits.group"), return_inverse=True)
    order = numpy_generator(seed, None, None, "splits").permutation(len(values))
    of_group = np.empty(len(values), dtype=np.int64)
    of_group[order] = np.repeat(np.arange(3), _counts(len(values), splits.shares))
    cuts = {}
    for client, owned in owners.items():
        shuffled = numpy_generator(seed, None, client, "splits").permutation(owned)
        split = of_group[codes[shuffled]]
        cuts[client] = ClientData(*(shuffled[split == i] for i in range(3)))
        if not len(cuts[client].train):
            raise DataError(
                f"data.splits.group={splits.group}: none of the {len(owned)} rows of {client} falls into train;"
                " raise data.splits.train, lower data.clients, or choose another seed"
            )
    return cuts


def _own(owned: np.ndarray, splits: Splits, client: str, seed: int) -> ClientData:
    shuffled = numpy_generator(seed, None, client, "splits").permutation(owned)
    return ClientData(*np.split(shuffled, np.cumsum(_counts(len(owned), splits.shares))[:-1]))


def _counts(n: int, shares: Sequence[float]) -> list[int]:
    """Round n * shares to integers that sum to n; train gets a row, and so does each positive share if n >= 3."""
    exact = [n * share for share in shares]
    counts = [int(x + 1e-9) for x in exact]
    for i in sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])[: n - sum(counts)]:
        counts[i] += 1
    needy = [i for i, share in enumerate(shares) if share > 0 and counts[i] == 0 and (n >= 3 or i == 0)]
    for i in needy:
        counts[counts.index(max(counts))] -= 1
        counts[i] += 1
    return counts
