"""Centralised training: all rows together at one place, the upper baseline of any federation.

One participant holds the rows of every client and trains as a client of FedAvg does, round after round; its loss is
still reported for each client's rows. Nothing about it is private.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

from fedloom.algorithms.base import Rows
from fedloom.algorithms.fedavg import FedAvg


class Centralized(FedAvg, name="centralized"):
    """All rows in one place."""

    regime: ClassVar[str] = "centralized"

    def population(self, clients: Mapping[str, Rows], join: Callable[[Iterable[Rows]], Rows]) -> Mapping[str, Rows]:
        return {"all": join(clients.values())}
