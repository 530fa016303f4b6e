"""The suite itself: categories, splits, and items drawn from a seed.

Whether a prompt belongs to train, validation or test is a property of its text: a hash of the prompt picks one of ten
buckets (eight train, one validation, one test), and the generator of a split draws until a prompt lands in it. So no
prompt can be in two splits, whatever the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from types import MappingProxyType

from fedloom.data.tasks.arithmetic import arithmetic
from fedloom.data.tasks.dates import dates
from fedloom.data.tasks.lists import filtering, sorting
from fedloom.data.tasks.logic import logic
from fedloom.data.tasks.phrasing import Draw
from fedloom.data.tasks.sequences import sequences
from fedloom.data.tasks.snippets import code_output
from fedloom.data.tasks.structured import json_extraction, table_lookup
from fedloom.data.tasks.text import counting, string_edits
from fedloom.data.tasks.units import units
from fedloom.types import DataError, suggest

_GENERATORS: Mapping[str, Draw] = MappingProxyType(
    {
        "arithmetic": arithmetic,
        "units": units,
        "dates": dates,
        "sorting": sorting,
        "filtering": filtering,
        "string_edits": string_edits,
        "counting": counting,
        "logic": logic,
        "table_lookup": table_lookup,
        "json_extraction": json_extraction,
        "code_output": code_output,
        "sequences": sequences,
    }
)

CATEGORIES: tuple[str, ...] = tuple(_GENERATORS)
SPLITS: tuple[str, ...] = ("train", "validation", "test")

_BUCKETS: tuple[str, ...] = ("train",) * 8 + ("validation", "test")
_MOST_ATTEMPTS = 2000  # a tenth of the draws fit the small splits: 2000 misses in a row mean that the prompts ran out


@dataclass(frozen=True, slots=True)
class Item:
    """One instruction with one verifiable short answer."""

    id: str
    """Category, split and index, as in "sorting/test/17"."""
    category: str
    """One of `CATEGORIES`: the natural key for clients."""
    prompt: str
    """The user's turn."""
    answer: str
    """The assistant's turn: exactly what must be produced."""


def items(category: str, split: str, count: int, seed: int = 0) -> list[Item]:
    """Draw the first items of a category's split, no prompt twice.

    Args:
        category: one of `CATEGORIES`.
        split: one of `SPLITS`.
        count: number of items; a longer list begins with the shorter one.
        seed: any integer; different seeds give different items of the same split.

    Returns:
        The items in order; item i depends on category, split, seed and i alone.

    Raises:
        DataError: unknown category or split, negative count, or more items asked for than there are prompts.
    """
    draw = _GENERATORS[_known("category", category, CATEGORIES)]
    _known("split", split, SPLITS)
    if count < 0:
        raise DataError(f"task suite: count is {count}; allowed: 0 and above")
    drawn: list[Item] = []
    seen: set[str] = set()
    for index in range(count):
        prompt, answer = _fresh(draw, f"{seed}/{category}/{split}/{index}", split, seen)
        seen.add(_normal(prompt))
        drawn.append(Item(f"{category}/{split}/{index}", category, prompt, answer))
    return drawn


def split_of(prompt: str) -> str:
    """Tell which split a prompt belongs to, from its text alone.

    Args:
        prompt: the user's turn; case and whitespace do not matter.

    Returns:
        One of `SPLITS`.
    """
    return _BUCKETS[_hashed(_normal(prompt)) % len(_BUCKETS)]


def _fresh(draw: Draw, key: str, split: str, seen: set[str]) -> tuple[str, str]:
    """Draw until the prompt is in the split and new; each attempt has its own random stream."""
    for attempt in range(_MOST_ATTEMPTS):
        prompt, answer = draw(Random(_hashed(f"{key}/{attempt}")))
        if split_of(prompt) == split and _normal(prompt) not in seen:
            return prompt, answer
    raise DataError(f"task suite: no new prompt for {key} after {len(seen)} items; ask for a smaller count")


def _known(what: str, name: str, allowed: tuple[str, ...]) -> str:
    """Return the name if it is allowed, else say what was probably meant."""
    if name in allowed:
        return name
    raise DataError(f"task suite: unknown {what} {name!r}{suggest(name, allowed)}; allowed: {', '.join(allowed)}")


def _normal(prompt: str) -> str:
    """Fold what does not make two prompts different: case and runs of whitespace."""
    return " ".join(prompt.casefold().split())


def _hashed(text: str) -> int:
    """Hash a text to 64 bits, the same on every machine."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")
