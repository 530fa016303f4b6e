"""Small helpers that turn drawn values into a worded prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from fedloom.data.tasks.words import NUMBER_WORDS

Pair = tuple[str, str]
"""A prompt and its answer."""

Draw = Callable[[Random], Pair]
"""One kind of question: draws one prompt and its answer."""


def phrase(rng: Random, templates: Sequence[str], **fields: object) -> str:
    """Fill one of several wordings.

    Args:
        rng: source of the choice.
        templates: wordings with the same named fields; every one must leave the answer the same.
        fields: values by field name.

    Returns:
        The worded text.
    """
    return rng.choice(templates).format(**fields)


def mixed(rng: Random, kinds: Sequence[Draw]) -> Pair:
    """Draw a question from one of several kinds, each equally likely.

    Args:
        rng: source of the choice and of the question itself.
        kinds: the kinds of question; a kind listed twice is drawn twice as often.

    Returns:
        Prompt and answer.
    """
    return rng.choice(kinds)(rng)


def spelled(number: int) -> str:
    """Spell a small number as a lower-case word.

    Args:
        number: between 0 and 12.

    Returns:
        Its English word.
    """
    return NUMBER_WORDS[number]
