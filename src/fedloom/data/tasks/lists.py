"""Sorting and filtering short lists of words and numbers.

A sorted list is answered with commas, a filtered one with semicolons; every prompt says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from string import ascii_lowercase, ascii_uppercase

from fedloom.data.tasks.phrasing import Pair, mixed, phrase
from fedloom.data.tasks.words import CITIES, GROUPS, MONTHS, NAMES, NOUNS, WEEKDAYS

_ALPHABETICAL = (
    "Sort these {what} alphabetically: {items}.",
    "Put the {what} {items} into alphabetical order.",
    "Arrange in alphabetical order: {items}.",
    "{name} sorts these {what} from A to Z: {items}. What is the order?",
    "List from A to Z: {items}.",
)
_CALENDAR = (
    "Put these {what} into calendar order, {first} first: {items}.",
    "Sort these {what} from {first} to {last}: {items}.",
    "{name} marks {items} on the calendar. List them from {first} to {last}.",
    "Order these {what} as they come, from {first} to {last}: {items}.",
)
_UP = (
    "Sort these numbers from smallest to largest: {items}.",
    "Put {items} into ascending order.",
    "Arrange in increasing order: {items}.",
    "{name} writes down {items}. Give the numbers from low to high.",
    "Order the scores {items}, lowest first.",
)
_DOWN = (
    "Sort these numbers from largest to smallest: {items}.",
    "Put {items} into descending order.",
    "Arrange in decreasing order: {items}.",
    "{name} writes down {items}. Give the numbers from high to low.",
    "Order the scores {items}, highest first.",
)
_WITH_COMMAS = (
    "Separate them with commas.",
    "Write the list with commas.",
    "Use commas between them.",
    "Answer as a list with commas.",
)

_GROUP = (
    "Which of these are {group}: {items}?",
    "Keep only the {group}: {items}.",
    "Pick out the {group} from this list: {items}.",
    "{name} wrote down {items}. Which ones are {group}?",
)
_NUMBERS = (
    "Which of these numbers are {test}: {items}?",
    "Keep only the numbers that are {test}: {items}.",
    "{name} drew {items}. Which numbers are {test}?",
    "From {items}, pick the numbers that are {test}.",
)
_INITIAL = (
    "Which of these words begin with {letter}: {items}?",
    "Keep only the words that start with {letter}: {items}.",
    "{name} looks for words beginning with {letter} among {items}. Which are they?",
)
_WITH_SEMICOLONS = (
    "Separate them with semicolons, in the given order.",
    "Keep the order and put semicolons between them.",
    "Answer in the same order, with semicolons.",
    "Write them in the order given, separated by semicolons.",
)

# sorted, because the order of a set of strings changes from one process to the next
_LOWER_CASE = tuple(sorted({word for members in GROUPS.values() for word in members if word.islower()} | set(NOUNS)))


def sorting(rng: Random) -> Pair:
    """Draw a short list to be put into order.

    Args:
        rng: source of the wording and of the list.

    Returns:
        Prompt and answer: the sorted list, such as "apple, lemon, plum".
    """
    return mixed(rng, (_sort_words, _sort_letters, _sort_calendar, _sort_numbers))


def filtering(rng: Random) -> Pair:
    """Draw a short list of which only some elements are to be kept.

    Args:
        rng: source of the wording and of the list.

    Returns:
        Prompt and answer: what is kept, in the given order, such as "4; 10".
    """
    return mixed(rng, (_keep_group, _keep_numbers, _keep_initial))


def _words(rng: Random) -> tuple[str, list[str]]:
    """Draw three words of one sort with first letters well apart, and what they are called."""
    what, pool = rng.choice((("words", NOUNS), ("words", NOUNS), ("names", NAMES), ("cities", CITIES)))
    while True:
        words = rng.sample(pool, 3)
        a, b, c = sorted(ord(word[0]) for word in words)
        if b - a > 2 and c - b > 2:
            return what, words


def _sorted(rng: Random, templates: Sequence[str], given: list[str], ordered: list[str], **fields: object) -> Pair:
    """Word a sorting question."""
    question = phrase(rng, templates, items=", ".join(given), name=rng.choice(NAMES), **fields)
    return f"{question} {rng.choice(_WITH_COMMAS)}", ", ".join(ordered)


def _sort_words(rng: Random) -> Pair:
    """Sort words from A to Z."""
    what, words = _words(rng)
    return _sorted(rng, _ALPHABETICAL, words, sorted(words), what=what)


def _sort_letters(rng: Random) -> Pair:
    """Sort three or four letters from A to Z."""
    alphabet = rng.choice((ascii_lowercase, ascii_uppercase))
    letters = rng.sample(alphabet, rng.randint(3, 4))
    return _sorted(rng, _ALPHABETICAL, letters, sorted(letters), what="letters")


def _sort_calendar(rng: Random) -> Pair:
    """Sort three days of the week or months of the year."""
    what, cycle = rng.choice((("days", WEEKDAYS), ("months", MONTHS)))
    given = rng.sample(cycle, 3)
    ordered = sorted(given, key=cycle.index)
    return _sorted(rng, _CALENDAR, given, ordered, what=what, first=cycle[0], last=cycle[-1])


def _sort_numbers(rng: Random) -> Pair:
    """Sort three numbers up or down; no two begin with the same digit."""
    tens = rng.sample(range(1, 10), 3)
    numbers = [10 * ten + rng.randint(0, 9) for ten in tens] if rng.random() < 0.6 else tens
    down = rng.random() < 0.4
    ordered = [str(number) for number in sorted(numbers, reverse=down)]
    return _sorted(rng, _DOWN if down else _UP, [str(number) for number in numbers], ordered)


def _filtered(rng: Random, templates: Sequence[str], given: list[str], kept: list[str], **fields: object) -> Pair:
    """Word a filtering question."""
    question = phrase(rng, templates, items=", ".join(given), name=rng.choice(NAMES), **fields)
    return f"{question} {rng.choice(_WITH_SEMICOLONS)}", "; ".join(kept)


def _some(rng: Random, wanted: Sequence[str], others: Sequence[str]) -> tuple[list[str], list[str]]:
    """Mix two wanted elements with one or two others; return all and the wanted ones in their order."""
    chosen = rng.sample(wanted, 2)
    given = chosen + rng.sample(others, 1 if rng.random() < 0.75 else 2)
    rng.shuffle(given)
    return given, [element for element in given if element in chosen]


def _keep_group(rng: Random) -> Pair:
    """Keep the words of one group."""
    group, *rest = rng.sample(sorted(GROUPS), 3)
    given, kept = _some(rng, GROUPS[group], [word for other in rest for word in GROUPS[other]])
    return _filtered(rng, _GROUP, given, kept, group=group)


def _keep_numbers(rng: Random) -> Pair:
    """Keep the numbers above or below a limit."""
    limit = rng.choice((10, 100))
    low = [str(number) for number in range(1, limit)]
    high = [str(number) for number in range(limit + 1, 4 * limit)]
    if rng.random() < 0.5:
        given, kept = _some(rng, high, low)
        return _filtered(rng, _NUMBERS, given, kept, test=f"greater than {limit}")
    given, kept = _some(rng, low, high)
    return _filtered(rng, _NUMBERS, given, kept, test=f"less than {limit}")


def _keep_initial(rng: Random) -> Pair:
    """Keep the words with one first letter."""
    letter = rng.choice("bcdfghlmprstw")
    wanted = [word for word in _LOWER_CASE if word[0] == letter]
    given, kept = _some(rng, wanted, [word for word in _LOWER_CASE if word[0] != letter])
    return _filtered(rng, _INITIAL, given, kept, letter=letter)
