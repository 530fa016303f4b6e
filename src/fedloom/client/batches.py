"""Batches: the rows of one or several clients side by side, in one forward pass.

Two layouts hold the same rows. *Padded*: a row of the batch each, padded on the right; a causal model never sees the
padding. *Packed*: all tokens in one row without any padding, cut into pieces that attention keeps apart, where a
beginning that all rows of a client share (the system prompt) is computed once, for it has the same values in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.data.encode import Example

SHARED_TOKENS = 8
"""A shared beginning shorter than this is not worth a piece of its own."""
PIECE_TOKENS = 256
"""Longest piece: 256 rows of scores over all that comes before exist at a time."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens of one row, which see each other, causally, and all that comes before them in their row.

    Attributes:
        start, length: where its tokens are in the packed row.
        run: tokens right before it that belong to its row too.
        before: (start, length) of the shared beginning that the row follows; (0, 0) where there is none.
        client: whose row it is, counted in the pass.
    """

    start: int
    length: int
    run: int = 0
    before: tuple[int, int] = (0, 0)
    client: int = 0

    @property
    def past(self) -> int:
        """Return how many tokens come before it in its row."""
        return self.before[1] + self.run

    def seen(self, virtual: int, clients: int) -> list[tuple[int, int]]:
        """Return where the keys that it sees lie, as (start, length), behind all clients' virtual tokens.

        Args:
            virtual: tokens of one client that are keys and no tokens of the row.  clients: of the pass.
        """
        first = virtual * clients
        own = first + self.start - self.run, self.run + self.length
        parts = (self.client * virtual, virtual), (first + self.before[0], self.before[1]), own
        return [part for part in parts if part[1]]


@dataclass(frozen=True, slots=True)
class Pieces:
    """How a packed row is cut, and the masks that its layers share.

    Attributes:
        pieces: disjoint and complete.  clients: of the pass.
    """

    pieces: tuple[Piece, ...]
    clients: int = 1
    _masks: dict[object, Tensor] = field(default_factory=dict)

    def mask(self, piece: Piece, virtual: int, window: int | None, like: Tensor) -> Tensor:
        """Return what is added to a piece's scores: (length, past + length), 0 where it looks, else -inf.

        Args:
            virtual: tokens that come before the row.
            window: a token sees itself and at most window - 1 tokens before it; None: all.
            like: gives dtype and device.
        """
        past = virtual + piece.past
        key = (piece.length, past, window)
        if key not in self._masks:
            ones = torch.ones(piece.length, past + piece.length, dtype=torch.bool, device=like.device)
            seen = ones.tril(past)
            if window is not None:
                seen &= ones.triu(past - window + 1)
            self._masks[key] = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(
                ~seen, float("-inf")
            )
        return self._masks[key]


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one forward pass, client after client.

    Attributes:
        ids: (b, t) token ids; packed: (1, t).
        at: (n,) flat position (row x t + column) of the token *before* each label.  labels: (n,) token ids.
        spans: flat positions that each client owns, padding included; they sum to b x t.
        terms: labels of each client; they sum to n.
        positions: (1, t) position of each packed token in its row.  pieces: how a packed row is cut; None: padded.
        weights: (n,) factor of each label's loss; None: ones.
    """

    ids: Tensor
    at: Tensor
    labels: Tensor
    spans: tuple[int, ...]
    terms: tuple[int, ...]
    positions: Tensor | None = None
    pieces: Pieces | None = None
    weights: Tensor | None = None

    def by_client(self, losses: Tensor) -> Tensor:
        """Return the (K,) sums of (n,) losses over each client's labels, each times its row's weight."""
        losses = losses if self.weights is None else losses * self.weights.to(losses.dtype)
        if len(self.terms) == 1:
            return losses.sum()[None]
        return torch.stack([part.sum() for part in losses.split(self.terms)])


def collate(clients: Sequence[Sequence[Example]], device: torch.device, *, packed: bool, share: bool = True) -> Batch:
    """Lay out the rows of some clients.

    Args:
        clients: each client's encoded rows (some clients may have none).
        packed: which of the layouts.
        share: compute a client's common beginning once (packed only).
    """
    return _packed(clients, device, share) if packed else _padded(clients, device)


def _padded(clients: Sequence[Sequence[Example]], device: torch.device) -> Batch:
    rows = [row for client in clients for row in client]
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    train = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], train[i, : len(row.ids)] = row.ids, row.train
    where = train[:, 1:].nonzero()  # position p predicts token p + 1
    labels = ids[where[:, 0], where[:, 1] + 1]
    at = where[:, 0] * width + where[:, 1]
    spans = tuple(len(client) * width for client in clients)
    terms = tuple(sum(int(row.train[1:].sum()) for row in client) for client in clients)
    return Batch(ids.to(device), at.to(device), labels.to(device), spans, terms, weights=_weights(rows, device))


def _packed(clients: Sequence[Sequence[Example]], device: torch.device, share: bool) -> Batch:
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    at: list[Tensor] = []
    labels: list[Tensor] = []
    pieces: list[Piece] = []
    spans, terms, end = [], [], 0
    for k, client in enumerate(clients):
        first, shared = end, common(client) if share else 0
        before = (end, shared) if shared else (0, 0)
        if shared:
            pieces += _pieces(end, shared, (0, 0), k)
            ids.append(client[0].ids[:shared])
            positions.append(torch.arange(shared))
            end += shared
        for row in client:
            pieces += _pieces(end, len(row.ids) - shared, before, k)
            ids.append(row.ids[shared:])
            positions.append(torch.arange(shared, len(row.ids)))
            where = row.train[1:].nonzero()[:, 0]
            at.append(torch.where(where < shared, where + before[0], where - shared + end))
            labels.append(row.ids[where + 1])
            end += len(row.ids) - shared
        spans.append(end - first)
        terms.append(sum(int(row.train[1:].sum()) for row in client))
    return Batch(
        torch.cat(ids)[None].to(device),
        torch.cat(at).to(device),
        torch.cat(labels).to(device),
        tuple(spans),
        tuple(terms),
        torch.cat(positions)[None].to(device),
        Pieces(tuple(pieces), len(clients)),
        _weights([row for client in clients for row in client], device),
    )


def _weights(rows: Sequence[Example], device: torch.device) -> Tensor | None:
    """Return the weight of each label of the rows; None: all are one."""
    if all(row.weight == 1 for row in rows):
        return None
    counts = torch.tensor([int(row.train[1:].sum()) for row in rows])
    return torch.tensor([row.weight for row in rows], dtype=torch.float64).repeat_interleave(counts).to(device)


def _pieces(start: int, length: int, before: tuple[int, int], client: int) -> list[Piece]:
    """Cut a row so that no piece has more than `PIECE_TOKENS`: then little is computed that the mask throws away."""
    runs = range(0, length, PIECE_TOKENS)
    return [Piece(start + run, min(PIECE_TOKENS, length - run), run, before, client) for run in runs]


def common(rows: Sequence[Example]) -> int:
    """Return the length of the rows' common beginning that is worth computing once; each keeps a token of its own."""
    if len(rows) < 2:
        return 0
    limit = min(len(row.ids) for row in rows) - 1
    first = rows[0].ids[:limit]
    for row in rows[1:]:
        same = (row.ids[: len(first)] == first).int().cumprod(0)
        first = first[: int(same.sum())]
    return len(first) if len(first) >= SHARED_TOKENS else 0


def passes(steps: Sequence[Sequence[tuple[int, int]]], limit: int, *, packed: bool) -> list[list[list[int]]]:
    """Cut the rows of one optimiser step of several clients into forward passes of at most `limit` tokens.

    There are as few passes as short rows first allow, and the largest is as small as that number allows: passes of
    like size need the least memory, and reuse each other's.

    Args:
        steps: each client's (row number, tokens) of this step.
        limit: tokens of a pass, padding included; a pass has at least one row.
        packed: whether a pass costs its rows' tokens, or rows x the longest.

    Returns:
        For each pass, each client's row numbers in it, short rows first; a client's rows stay together.
    """
    count = len(_greedy(steps, limit, packed))
    low, high = 0, limit
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_greedy(steps, middle, packed)) <= count else (middle, high)
    return _greedy(steps, high, packed)


def _greedy(steps: Sequence[Sequence[tuple[int, int]]], limit: int, packed: bool) -> list[list[list[int]]]:
    out: list[list[list[int]]] = []
    width = tokens = count = 0
    for k, step in enumerate(steps):
        for row, length in sorted(step, key=lambda one: one[1]):
            cost = tokens + length if packed else (count + 1) * max(width, length)
            if not out or cost > limit:
                out.append([[] for _ in steps])
                width = tokens = count = 0
            out[-1][k].append(row)
            width, tokens, count = max(width, length), tokens + length, count + 1
    return out
