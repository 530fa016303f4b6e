"""Edits of short phrases, and counting words and things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from fedloom.data.tasks.phrasing import Pair, mixed, phrase, spelled
from fedloom.data.tasks.words import ADJECTIVES, COLOURS, NAMES, NOUNS

_UPPER = (
    "Write in capital letters: {text}",
    "Change to upper case: {text}",
    "Make every letter a capital: {text}",
    "{name} shouts this, so write it in capitals: {text}",
)
_TITLE = (
    "Capitalise the first letter of each word: {text}",
    "Write with a capital at the start of every word: {text}",
    "Turn this into a title with each word capitalised: {text}",
)
_JOIN = (
    "Replace the spaces with {mark}: {text}",
    "Join the words with {mark}: {text}",
    "{name} wants {mark} instead of the spaces here: {text}",
)
_MARKS: Mapping[str, str] = {"hyphens": "-", "underscores": "_", "slashes": "/"}
_PART = (
    "Write only the {place} word: {text}",
    "Which word comes {place} here? {text}",
    "{name} remembers only the {place} word of this: {text}",
)
_AS_WORD = (
    "Write the number as a word.",
    "Answer with a number word.",
    "Spell the number out.",
    "Give the number in words.",
)
_LISTED = (
    "How many words are in this list: {items}?",
    "{name} notes down {items}. How many words is that?",
    "Count the words in this list: {items}.",
)
_NUMBERED = (
    "How many entries does this list have: {items}?",
    "{name} keeps a numbered list: {items}. How many entries does it have?",
    "Count the entries of the list {items}.",
)
_REPEATS = (
    'How many times does "{word}" stand in this list: {items}?',
    "{name} draws these beads: {items}. How many are {word}?",
    'Count how often "{word}" occurs here: {items}.',
)


def string_edits(rng: Random) -> Pair:
    """Draw an edit of a short phrase.

    Args:
        rng: source of the wording and of the phrase.

    Returns:
        Prompt and answer: the edited text, such as "old-stone-bridge".
    """
    return mixed(rng, (_upper, _title, _join, _join, _join, _part, _part))


def counting(rng: Random) -> Pair:
    """Draw a counting question.

    Args:
        rng: source of the wording and of what is counted.

    Returns:
        Prompt and answer: a number word between "one" and "eight".
    """
    return mixed(rng, (_listed, _repeats, _numbered, _numbered))


def _phrase_words(rng: Random) -> list[str]:
    """Draw a noun phrase of two or three words."""
    words = [rng.choice(ADJECTIVES), rng.choice(COLOURS), rng.choice(NOUNS)]
    return words if rng.random() < 0.5 else [rng.choice(words[:2]), words[2]]


def _edited(rng: Random, templates: Sequence[str], answer: str, **fields: object) -> Pair:
    """Word an edit."""
    return phrase(rng, templates, name=rng.choice(NAMES), **fields), answer


def _upper(rng: Random) -> Pair:
    """Write one word in capitals."""
    text = rng.choice(NOUNS + ADJECTIVES + COLOURS)
    return _edited(rng, _UPPER, text.upper(), text=text)


def _title(rng: Random) -> Pair:
    """Capitalise each word."""
    text = " ".join(_phrase_words(rng))
    return _edited(rng, _TITLE, text.title(), text=text)


def _join(rng: Random) -> Pair:
    """Put a mark in place of the spaces."""
    words = _phrase_words(rng)
    mark = rng.choice(sorted(_MARKS))
    return _edited(rng, _JOIN, _MARKS[mark].join(words), text=" ".join(words), mark=mark)


def _part(rng: Random) -> Pair:
    """Pick the first or the last word."""
    words = _phrase_words(rng)
    index, place = rng.choice(((0, "first"), (-1, "last")))
    return _edited(rng, _PART, words[index], text=" ".join(words), place=place)


def _counted(rng: Random, templates: Sequence[str], count: int, **fields: object) -> Pair:
    """Word a counting question."""
    question = phrase(rng, templates, name=rng.choice(NAMES), **fields)
    return f"{question} {rng.choice(_AS_WORD)}", spelled(count)


def _listed(rng: Random) -> Pair:
    """Count the words of a list."""
    count = rng.randint(2, 6)
    return _counted(rng, _LISTED, count, items=", ".join(rng.sample(NOUNS, count)))


def _repeats(rng: Random) -> Pair:
    """Count how often a colour comes up."""
    word, *others = rng.sample(COLOURS, 3)
    count = rng.randint(1, 4)
    given = rng.choice(others), *[word] * count, rng.choice(others)
    return _counted(rng, _REPEATS, count, word=word, items=", ".join(given))


def _numbered(rng: Random) -> Pair:
    """Count the entries of a numbered list."""
    count = rng.randint(2, 8)
    entries = ", ".join(f"{index + 1}. {word}" for index, word in enumerate(rng.sample(NOUNS, count)))
    return _counted(rng, _NUMBERED, count, items=entries)
