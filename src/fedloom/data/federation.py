"""The federation: rows, encoded once and given to clients, with the split that is written down and its drift."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt

from fedloom.data import named  # noqa: F401  (registers the named sets)
from fedloom.data.encode import Encoded, Left, encode_spans, render
from fedloom.data.partition import RESERVED, Iid, Natural, Partitioner
from fedloom.data.rows import Row, column, listing
from fedloom.data.sources import Source, TaskSource
from fedloom.data.splits import ClientData, Splits, cut
from fedloom.data.templates import Chat, Template
from fedloom.parts import Record
from fedloom.seeds import numpy_generator
from fedloom.types import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Share = Annotated[float, Field(ge=0, lt=1)]


class Data(Record):
    """The recipe's `data:` section."""

    source: Source = TaskSource()
    """Where rows come from: a part, a file, or a hub id."""
    template: Template = Chat()
    """How a dialogue becomes text."""
    clients: PositiveInt = 4
    """Number of clients."""
    partition: Partitioner = Iid()
    """Which client owns which rows."""
    splits: Splits = Splits()
    """Shares of train, validation and test within each client."""
    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Longer examples are left out and counted."""
    system: str | None = None
    """System prompt of rows that have none of their own."""
    public: PositiveInt | Share | None = None
    """Rows that the server holds, apart from all clients: their number, or their share of all rows."""
    unseen: Share = 0.0
    """Share of clients kept out of training."""

    def training_clients(self) -> int | None:
        """Return how many clients train; None: only the rows tell, as with `partition: natural`."""
        return None if isinstance(self.partition, Natural) else self.clients - _kept_out(self.clients, self.unseen)


@dataclass(frozen=True, slots=True)
class Federation:
    """Everything that the clients and the server hold.

    Attributes:
        rows: the rows that were kept, in the order of `encoded`.
        encoded: their tokens and labels.
        clients: client -> indices of its rows, in client order, unseen clients included.
        unseen: clients kept out of training.
        public: indices of the server's rows.
        left: counts of rows left out.
        source: where the rows come from, one line.
        split_hash: SHA-256 of the split table without its hash, as JSON with sorted keys.
    """

    rows: tuple[Row, ...]
    encoded: Encoded
    clients: Mapping[str, ClientData]
    unseen: tuple[str, ...]
    public: np.ndarray
    left: Left
    source: str
    split_hash: str


@dataclass(frozen=True, slots=True)
class Drift:
    """How one client's data differ from the whole.

    Attributes:
        client: its name.  rows: all its rows.
        categories: value of the key -> rows.
        tokens: 5 %, 50 % and 95 % quantiles of its examples' lengths, in tokens.
        divergence: Jensen-Shannon divergence of its distribution over the key to that of all clients, in bits (0 to 1).
    """

    client: str
    rows: int
    categories: Mapping[str, int]
    tokens: tuple[float, float, float]
    divergence: float


def build(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache: Path | None,
    progress: Callable[[int], None] | None = None,
) -> Federation:
    """Read, encode, partition and split.

    Args:
        data: the recipe's section.
        tokenizer: of the model to be trained.
        seed: the recipe's seed, on which all randomness depends.
        cache: folder of encoded data sets; None keeps nothing.
        progress: called with the number of rows tokenised so far.

    Raises:
        DataError: rows cannot be read, rendered or split as asked.
        ModelError: the tokenizer lacks what is needed.
    """
    rows = data.source.rows(seed)
    spans = render(rows, tokenizer, data.template, data.system)
    encoded, kept, left = encode_spans(spans, tokenizer, data.max_tokens, cache, progress)
    rows = [rows[i] for i in kept]
    public = _public(rows, data, seed)
    private = np.setdiff1d(np.arange(len(rows)), public)
    owners = _owners(rows, private, data, seed)
    clients = cut(rows, owners, data.splits, seed)
    table = _table(rows, clients, public)
    return Federation(
        rows=tuple(rows),
        encoded=encoded,
        clients=clients,
        unseen=_unseen(list(clients), data.unseen, seed),
        public=public,
        left=left,
        source=data.source.describe(),
        split_hash=hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest(),
    )


def split_table(federation: Federation) -> dict[str, Any]:
    """Return the content of split.json.

    Returns:
        Client -> {"train" | "validation" | "test": row ids}; "public": the server's row ids, if it has any; "hash".
    """
    table = _table(federation.rows, federation.clients, federation.public)
    return {**table, "hash": federation.split_hash}


def drift(federation: Federation, key: str) -> list[Drift]:
    """Measure each client against the whole.

    Args:
        federation: what to measure.
        key: field whose distribution is compared, such as "category".

    Raises:
        DataError: rows lack the field.
    """
    from scipy.spatial.distance import jensenshannon

    values, codes = np.unique(column(federation.rows, key, "key"), return_inverse=True)
    lengths = np.diff(federation.encoded.starts)
    owned = {client: data.all for client, data in federation.clients.items()}
    counts = {client: np.bincount(codes[rows], minlength=len(values)) for client, rows in owned.items()}
    whole = np.sum(list(counts.values()), axis=0)
    return [
        Drift(
            client=client,
            rows=len(rows),
            categories={str(values[i]): int(counts[client][i]) for i in np.flatnonzero(counts[client])},
            tokens=tuple(np.quantile(lengths[rows], [0.05, 0.5, 0.95]).tolist()),
            divergence=float(jensenshannon(counts[client], whole, base=2) ** 2),
        )
        for client, rows in owned.items()
    ]


def _public(rows: list[Row], data: Data, seed: int) -> np.ndarray:
    """Draw the server's rows; with a group field whole groups, so that none of them is tested at a client."""
    count = int(data.public) if isinstance(data.public, int) else round((data.public or 0.0) * len(rows))
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    if count >= len(rows):
        raise DataError(f"data.public={data.public}: must be less than the {len(rows)} rows that there are")
    generator = numpy_generator(seed, None, None, "public")
    if data.splits.group is None:
        return np.sort(generator.permutation(len(rows))[:count])
    values, codes = np.unique(column(rows, data.splits.group, "data.splits.group"), return_inverse=True)
    order = generator.permutation(len(values))
    fits = np.cumsum(np.bincount(codes)[order]) <= count
    chosen = order[fits] if fits.any() else order[:1]
    return np.flatnonzero(np.isin(codes, chosen))


def _owners(rows: list[Row], private: np.ndarray, data: Data, seed: int) -> dict[str, np.ndarray]:
    """Partition the clients' rows, and hold the partitioner to its contract."""
    generator = numpy_generator(seed, None, None, "partition")
    parts = data.partition.split([rows[i] for i in private], data.clients, generator)
    empty = [client for client, part in parts.items() if not len(part)]
    if empty:
        problem = f"data.partition={data.partition.part_name}: {len(empty)} of {len(parts)} clients have no rows:"
        raise DataError(f"{problem}{listing(empty)}\n  next: lower data.clients, or use more rows")
    positions = [np.asarray(part, dtype=np.int64) for part in parts.values()]
    if not np.array_equal(np.sort(np.concatenate(positions)), np.arange(len(private))):
        raise DataError(f"data.partition={data.partition.part_name}: the parts are not disjoint and complete")
    if odd := sorted(set(RESERVED) & parts.keys()):
        raise DataError(f"data.partition={data.partition.part_name}: no client may be named {odd[0]!r}")
    return {client: private[part] for client, part in zip(parts, positions, strict=True)}


def _kept_out(clients: int, share: float) -> int:
    """Return how many of the clients are kept out of training."""
    return max(1, round(share * clients)) if share > 0 else 0


def _unseen(clients: list[str], share: float, seed: int) -> tuple[str, ...]:
    count = _kept_out(len(clients), share)
    if 0 < count >= len(clients):
        problem = f"data.unseen={share}: keeps {count} of {len(clients)} clients out of training, so none would train"
        raise DataError(f"{problem}; lower data.unseen or raise data.clients")
    chosen = numpy_generator(seed, None, None, "unseen").permutation(len(clients))[:count]
    return tuple(clients[i] for i in sorted(chosen))


def _table(rows: tuple[Row, ...] | list[Row], clients: Mapping[str, ClientData], public: np.ndarray) -> dict[str, Any]:
    def ids(indices: np.ndarray) -> list[str]:
        return [rows[i].id for i in indices]

    table: dict[str, Any] = {
        client: {"train": ids(data.train), "validation": ids(data.validation), "test": ids(data.test)}
        for client, data in clients.items()
    }
    return {**table, "public": ids(public)} if len(public) else table
