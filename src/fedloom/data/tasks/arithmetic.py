"""Word problems with one operation on small whole numbers."""

from __future__ import annotations

from random import Random

from fedloom.data.tasks.phrasing import Draw, Pair, mixed, phrase
from fedloom.data.tasks.words import CONTAINERS, NAMES, THINGS

_GAIN = (
    "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
    "There are {a} {things} in the {place}. {name} puts in {b} more. How many {things} are in the {place}?",
    "{name} has {a} {things} and {other} has {b}. How many {things} do they have together?",
    "{name} found {a} {things} on Monday and {b} on Tuesday. How many {things} is that in all?",
)
_LOSS = (
    "{name} has {a} {things} and gives {b} to {other}. How many {things} does {name} still have?",
    "There are {a} {things} in the {place}. {name} takes out {b}. How many {things} are left?",
    "{name} had {a} {things} and lost {b} of them. How many {things} are left?",
    "{name} needs {a} {things} and already has {b}. How many {things} are missing?",
)
_TIMES = (
    "There are {n} {places} with {k} {things} in each. How many {things} are there in all?",
    "{name} packs {k} {things} into each of {n} {places}. How many {things} does {name} pack?",
    "{n} children get {k} {things} each. How many {things} do they get together?",
    "{name} uses {k} {things} a day. How many {things} does {name} use in {n} days?",
)
_COST = (
    "One {thing} costs ${p}. How much do {n} {things} cost?",
    "{name} buys {n} {things} at ${p} each. How much does {name} pay?",
    "A shop sells {things} for ${p} apiece. What is the price of {n} {things}?",
)
_AS_NUMBER = (
    "Answer with a number.",
    "Give only the number.",
    "Just the number, please.",
    "Reply with the number alone.",
)
_AS_MONEY = (
    "Write the amount with a dollar sign.",
    "Give the amount with the dollar sign in front.",
    "Answer in dollars, with the $ sign.",
)


def arithmetic(rng: Random) -> Pair:
    """Draw a word problem about counting things or paying for them.

    Args:
        rng: source of the wording and of the numbers.

    Returns:
        Prompt and answer: a whole number such as "14", or an amount such as "$12" where the prompt asks for one.
    """
    return mixed(rng, _KINDS)


def _counted(rng: Random, templates: tuple[str, ...], answer: int, **numbers: int) -> Pair:
    """Word a problem whose answer is a number of things."""
    name, other = rng.sample(NAMES, 2)
    place, places = rng.choice(CONTAINERS)
    _, things = rng.choice(THINGS)
    story = phrase(rng, templates, name=name, other=other, place=place, places=places, things=things, **numbers)
    return f"{story} {rng.choice(_AS_NUMBER)}", str(answer)


def _paid(rng: Random, templates: tuple[str, ...], answer: int, **numbers: int) -> Pair:
    """Word a problem whose answer is an amount of money."""
    thing, things = rng.choice(THINGS)
    name = rng.choice(NAMES)
    story = phrase(rng, templates, name=name, thing=thing, things=things, **numbers)
    return f"{story} {rng.choice(_AS_MONEY)}", f"${answer}"


def _gain(rng: Random) -> Pair:
    """Add two numbers."""
    a, b = rng.randint(2, 10), rng.randint(2, 6)
    return _counted(rng, _GAIN, a + b, a=a, b=b)


def _loss(rng: Random) -> Pair:
    """Subtract a small number."""
    left, b = rng.randint(2, 9), rng.randint(2, 5)
    return _counted(rng, _LOSS, left, a=left + b, b=b)


def _times(rng: Random) -> Pair:
    """Multiply by two or ten."""
    n, k = rng.choice((2, 10)), rng.randint(2, 9)
    return _counted(rng, _TIMES, n * k, n=n, k=k)


def _cost(rng: Random) -> Pair:
    """Multiply a price."""
    n, p = rng.choice((2, 10)), rng.randint(2, 9)
    return _paid(rng, _COST, n * p, n=n, p=p)


_KINDS: tuple[Draw, ...] = (_gain, _gain, _gain, _loss, _times, _cost)
