"""Partitioners: which client owns which rows. Every partition is disjoint and complete, and no client is empty."""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat

from fedloom.data.rows import Row, column
from fedloom.parts import Part
from fedloom.types import DataError

Indices: TypeAlias = np.ndarray
KNOB = "data.partition.key"


class Partitioner(Part, family=True):
    """Which client owns which rows."""

    def split(self, rows: Sequence[Row], clients: int, generator: np.random.Generator) -> dict[str, list[int]]:
        """Assign each row to one client.

        Args:
            rows: n rows.
            clients: number of clients.
            generator: the only source of randomness.

        Returns:
            Client name -> indices of its rows, in client order; each index occurs once, no client is empty.

        Raises:
            DataError: the rows cannot be split so.
        """
        raise NotImplementedError

    def field(self) -> str | None:
        """Return the field of the rows by which it splits; None: it looks at no field."""
        return None


class Iid(Partitioner, name="iid"):
    """Rows in random order, in equal parts (sizes differ by one at most)."""

    def split(self, rows: Sequence[Row], clients: int, generator: np.random.Generator) -> dict[str, list[int]]:
        """Shuffle and cut; see `Partitioner.split`."""
        _enough(rows, clients)
        return _numbered(np.array_split(generator.permutation(len(rows)), clients))


class Dirichlet(Partitioner, name="dirichlet"):
    """Label skew: the shares of each category over the clients are drawn from a symmetric Dirichlet distribution.

    As in Yurochkin et al. (arXiv 1905.12022): drawn anew until every client has a row. Small `alpha`: each
    category on few clients; large `alpha`: nearly IID.
    """

    alpha: PositiveFloat = 0.5
    """Concentration."""
    key: str = "category"
    """Field that holds the category."""

    def field(self) -> str | None:
        """Return `key`."""
        return self.key

    def split(self, rows: Sequence[Row], clients: int, generator: np.random.Generator) -> dict[str, list[int]]:
        """Draw shares until no client is empty; see `Partitioner.split`."""
        _enough(rows, clients)
        groups = list(_groups(rows, self.key).values())
        for _ in range(DRAWS):
            parts = [self._parts(group, clients, generator) for group in groups]
            owned = [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
            if all(map(len, owned)):
                return _numbered(owned)
        raise DataError(
            f"data.partition.alpha={self.alpha}: in each of {DRAWS} draws of {len(rows)} rows over {clients} clients"
            " at least one client got no row; raise alpha, lower data.clients, or use more rows"
        )

    def _parts(self, group: Indices, clients: int, generator: np.random.Generator) -> list[Indices]:
        shares = generator.dirichlet(np.full(clients, self.alpha))
        cuts = np.floor(np.cumsum(shares)[:-1] * len(group) + 0.5).astype(np.int64)
        return np.split(generator.permutation(group), cuts)


DRAWS = 100
"""Dirichlet draws before it is given up."""


class By(Partitioner, name="by"):
    """One category a client; surplus categories are merged, surplus clients share the largest categories."""

    key: str = "category"
    """Field that holds the category."""

    def field(self) -> str | None:
        """Return `key`."""
        return self.key

    def split(self, rows: Sequence[Row], clients: int, generator: np.random.Generator) -> dict[str, list[int]]:
        """Merge, match or cut the categories; see `Partitioner.split`."""
        _enough(rows, clients)
        groups = list(_groups(rows, self.key).values())
        if len(groups) >= clients:
            return _numbered(_merge(groups, clients))
        counts = _seats([len(group) for group in groups], clients)
        shuffled = [generator.permutation(group) for group in groups]
        parts = [np.array_split(group, count) for group, count in zip(shuffled, counts, strict=True)]
        return _numbered([part for pieces in parts for part in pieces])


class Quantity(Partitioner, name="quantity"):
    """Quantity skew: client sizes follow a power law, size of client k ~ k ** -exponent; rows are IID."""

    exponent: NonNegativeFloat = 1.0
    """0: equal sizes."""

    def split(self, rows: Sequence[Row], clients: int, generator: np.random.Generator) -> dict[str, list[int]]:
        """Shuffle and cut unequally; see `Partitioner.split`."""
        _enough(rows, clients)
        weights = np.arange(1, clients + 1, dtype=np.float64) ** -self.exponent
        ends = (len(rows) - clients) * np.cumsum(weights) / weights.sum()  # one row each comes on top
        cuts = np.floor(ends[:-1] + 0.5).astype(np.int64) + np.arange(1, clients)
        return _numbered(np.split(generator.permutation(len(rows)), cuts))


class Natural(Partitioner, name="natural"):
    """One client for each value of a field, named after it; `data.clients` is not used."""

    key: str = "category"
    """Field that holds the owner, such as an author or a hospital."""

    def field(self) -> str | None:
        """Return `key`."""
        return self.key

    def split(self, rows: Sequence[Row], clients: int, generator: np.random.Generator) -> dict[str, list[int]]:
        """Group the rows by value; see `Partitioner.split`."""
        groups = _groups(rows, self.key)
        return dict(zip(_safe(list(groups)), (group.tolist() for group in groups.values()), strict=True))


def _enough(rows: Sequence[Row], clients: int) -> None:
    if clients > len(rows):
        raise DataError(
            f"data.clients={clients}: there are only {len(rows)} rows to share out;"
            f" lower data.clients to {len(rows)} or less, or use more rows"
        )


def _numbered(parts: Sequence[Indices]) -> dict[str, list[int]]:
    width = len(str(len(parts)))
    return {f"client-{i:0{width}d}": part.tolist() for i, part in enumerate(parts, 1)}


def _groups(rows: Sequence[Row], key: str) -> Mapping[str, Indices]:
    """Return value -> indices of its rows, sorted by value."""
    values, codes = np.unique(column(rows, key, KNOB), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes))[:-1]
    return dict(zip(values.tolist(), np.split(order, ends), strict=True))


def _merge(groups: Sequence[Indices], clients: int) -> list[Indices]:
    """Give the groups, the largest first, each to the client that has fewest rows; equal counts keep their order."""
    if len(groups) == clients:
        return list(groups)
    owned: list[list[Indices]] = [[] for _ in range(clients)]
    sizes = [(0, client) for client in range(clients)]
    for group in sorted(groups, key=len, reverse=True):
        size, client = heapq.heappop(sizes)
        owned[client].append(group)
        heapq.heappush(sizes, (size + len(group), client))
    return [np.concatenate(pieces) for pieces in owned]


def _seats(sizes: Sequence[int], clients: int) -> list[int]:
    """Share out clients in proportion to sizes by the rule of highest averages (D'Hondt), at least one each.

    No group gets more clients than rows while there are rows enough.
    """
    seats = [1] * len(sizes)
    averages = [(-float(size), i) for i, size in enumerate(sizes)]
    heapq.heapify(averages)
    for _ in range(clients - len(sizes)):
        _, i = heapq.heappop(averages)
        seats[i] += 1
        heapq.heappush(averages, (-sizes[i] / seats[i], i))
    return seats


RESERVED = ("hash", "public")
"""Keys of split.json that no client may bear."""


def _safe(values: Sequence[str]) -> list[str]:
    """Return file-system-safe names, unique even where case does not count."""
    taken = set(RESERVED)
    names = []
    for value in values:
        stem = re.sub(r"[^A-Za-z0-9._+-]+", "-", value).strip("-.")[:60] or "client"
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names
