"""The only source of randomness: every stream is a pure function of (seed, round, client, purpose)."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, *key: object) -> int:
    """Return a 63-bit integer that depends on `seed` and every element of `key`, and on nothing else."""
    text = "\x1f".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, round: int | None, client: str | None, purpose: str) -> torch.Generator:  # noqa: A002
    """Return the CPU torch generator of one stream.

    Args:
        seed: the recipe's seed.
        round: the round, or None for a stream of the whole run.
        client: the client, or None for a stream of the server.
        purpose: what it is drawn for, such as "rows" or "dropout"; streams of other purposes are independent.
    """
    return torch.Generator().manual_seed(derive(seed, round, client, purpose))


def numpy_generator(seed: int, round: int | None, client: str | None, purpose: str) -> np.random.Generator:  # noqa: A002
    """Return the numpy generator of one stream; the arguments are those of `generator`."""
    return np.random.Generator(np.random.PCG64(derive(seed, round, client, purpose)))
