"""Short sequences of numbers, letters and words to be continued by one term."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from string import ascii_lowercase, ascii_uppercase

from fedloom.data.tasks.phrasing import Draw, Pair, mixed, phrase
from fedloom.data.tasks.words import COLOURS, NAMES, NOUNS

_NEXT = (
    "What comes next: {terms}, ...?",
    "Continue the sequence: {terms}, ...",
    "Which {what} follows: {terms}, ...?",
    "Give the next {what}: {terms}, ...",
    "{name} writes {terms}, ... What is the next {what}?",
    "The sequence {terms} goes on in the same way. Give the next {what}.",
    "Find the next {what} in the row {terms}, ...",
)
_CYCLE = (
    "A pattern repeats: {terms}, ... What comes next?",
    "{name} threads beads in a repeating pattern: {terms}, ... Which one is next?",
    "Continue the repeating pattern with one word: {terms}, ...",
    "These words repeat in a cycle: {terms}, ... Give the next one.",
)
_ONE_ONLY = ("Give one {what} only.", "Answer with one {what}.", "Write only that {what}.")


def sequences(rng: Random) -> Pair:
    """Draw a sequence to be continued by one term.

    Args:
        rng: source of the wording and of the sequence.

    Returns:
        Prompt and answer: one number, letter, word, or label such as "room 7".
    """
    return mixed(rng, _KINDS)


def _continued(rng: Random, terms: Sequence[str], what: str) -> Pair:
    """Ask for the last of the terms."""
    question = phrase(rng, _NEXT, terms=", ".join(terms[:-1]), what=what, name=rng.choice(NAMES))
    return f"{question} {phrase(rng, _ONE_ONLY, what=what)}", terms[-1]


def _numbers(rng: Random) -> Pair:
    """Continue numbers with a constant difference."""
    step = rng.choice((1, 2, 5, 10, 100))
    start = rng.randint(1, 60) if step in (1, 10) else step * rng.randint(1, 12)
    return _continued(rng, [str(start + index * step) for index in range(rng.randint(5, 6))], "number")


def _letters(rng: Random) -> Pair:
    """Continue the alphabet."""
    alphabet, length = rng.choice((ascii_lowercase, ascii_uppercase)), rng.randint(5, 6)
    start = rng.randint(0, 26 - length)
    return _continued(rng, alphabet[start : start + length], "letter")


def _labels(rng: Random) -> Pair:
    """Continue numbered labels."""
    noun, start, mark = rng.choice(NOUNS), rng.randint(1, 20), rng.choice((" ", "-"))
    return _continued(rng, [f"{noun}{mark}{start + index}" for index in range(4)], "label")


def _cycle(rng: Random) -> Pair:
    """Continue a repeating pattern of two or three words."""
    period = rng.sample(rng.choice((COLOURS, NOUNS)), rng.randint(2, 3))
    shown = 2 * len(period) + rng.randint(0, len(period) - 1)
    terms = [period[index % len(period)] for index in range(shown + 1)]
    return phrase(rng, _CYCLE, terms=", ".join(terms[:-1]), name=rng.choice(NAMES)), terms[-1]


_KINDS: tuple[Draw, ...] = (_numbers, _numbers, _letters, _labels, _cycle, _cycle)
