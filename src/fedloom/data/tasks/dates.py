"""Questions about weekdays, months and calendar dates; dates are answered in ISO form."""

from __future__ import annotations

from datetime import date, timedelta
from random import Random

from fedloom.data.tasks.phrasing import Draw, Pair, mixed, phrase
from fedloom.data.tasks.words import MONTHS, NAMES, WEEKDAYS

_EVENTS = ("concert", "exam", "match", "meeting", "party", "picnic", "trip", "visit", "wedding", "workshop")
_DAYS = {1: "1 day", 2: "2 days"}
_AHEAD = (
    "Today is {day}. Which day of the week is it in {days}?",
    "If today is {day}, what weekday is it {days} from now?",
    "It is {day} and the {event} is in {days}. On which weekday is the {event}?",
    "{name} arrives on a {day} and leaves {days} later. On which weekday does {name} leave?",
    "The {event} was planned for {day} but starts {days} later. On which weekday does it start?",
)
_ISO = (
    "Write {text} in the form YYYY-MM-DD.",
    "Rewrite the date {text} as YYYY-MM-DD.",
    "The {event} is on {text}. Give this date as YYYY-MM-DD.",
    "{name} was born on {text}. Write the birthday as YYYY-MM-DD.",
    "Put {text} into ISO format (YYYY-MM-DD).",
)
_LATER = (
    "What is the date {days} after {iso}? Write it as YYYY-MM-DD.",
    "The {event} on {iso} is put off by {days}. Give the new date as YYYY-MM-DD.",
    "{name} borrows a book on {iso} and returns it {days} later. Give the date of return as YYYY-MM-DD.",
    "Add {days} to {iso} and write the date as YYYY-MM-DD.",
)
_MONTH = (
    "In which month is the date {iso}? Write the name of the month.",
    "The {event} is on {iso}. Which month is that? Give its name.",
    "{name} signed a letter on {iso}. Name the month.",
    "Which month does {iso} fall in? Answer with its name.",
)


def dates(rng: Random) -> Pair:
    """Draw a question about the calendar.

    Args:
        rng: source of the wording and of the dates.

    Returns:
        Prompt and answer: a weekday, a month, or a date such as "2024-03-09".
    """
    return mixed(rng, _KINDS)


def _day(rng: Random) -> date:
    """Draw a day of the years 2000 to 2029."""
    return date(2000, 1, 1) + timedelta(days=rng.randrange(30 * 365))


def _worded(rng: Random, templates: tuple[str, ...], answer: str, **fields: object) -> Pair:
    """Word a question; each wording may name a person and an event."""
    return phrase(rng, templates, name=rng.choice(NAMES), event=rng.choice(_EVENTS), **fields), answer


def _ahead(rng: Random) -> Pair:
    """Name the weekday some days from now."""
    start, n = rng.randrange(7), rng.randint(1, 2)
    return _worded(rng, _AHEAD, WEEKDAYS[(start + n) % 7], day=WEEKDAYS[start], days=_DAYS[n])


def _iso(rng: Random) -> Pair:
    """Turn a worded date into ISO form."""
    day = _day(rng)
    month = MONTHS[day.month - 1]
    text = rng.choice((f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}"))
    return _worded(rng, _ISO, day.isoformat(), text=text)


def _later(rng: Random) -> Pair:
    """Add days to an ISO date, staying in the month."""
    n = rng.randint(1, 2)
    first = _day(rng)
    first = first.replace(day=rng.randint(1, 28 - n))
    return _worded(rng, _LATER, (first + timedelta(days=n)).isoformat(), iso=first.isoformat(), days=_DAYS[n])


def _month(rng: Random) -> Pair:
    """Name the month of an ISO date."""
    day = _day(rng)
    return _worded(rng, _MONTH, MONTHS[day.month - 1], iso=day.isoformat())


_KINDS: tuple[Draw, ...] = (_ahead, _iso, _iso, _later, _month)
