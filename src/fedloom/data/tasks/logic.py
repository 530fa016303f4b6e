"""Boolean logic and small orderings, answered with TRUE or FALSE, or with a name."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from fedloom.data.tasks.phrasing import Draw, Pair, mixed, phrase
from fedloom.data.tasks.words import NAMES

_VERDICT = (
    "Answer TRUE or FALSE.",
    "Is this TRUE or FALSE?",
    "Say TRUE or FALSE in capitals.",
    "Reply with TRUE or FALSE.",
)
_SCALES = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"),
    ("richer", "richest", "poorest"),
)
_WHO = (
    "{premises} Who is the {extreme}? Answer with the name.",
    "{premises} Which of the three is the {extreme}? Give the name only.",
    "{premises} Name the {extreme} of the three.",
)
_CLAIM = (
    "{premises} Claim: {claim}.",
    "We know this: {premises} So {claim}.",
    "{premises} From this it follows that {claim}.",
)
_SWITCHES = (
    "The {x} light is {sx} and the {y} light is {sy}. Claim: {claim}.",
    "Of two lights, the {x} one is {sx} and the {y} one is {sy}. {name} says that {claim}.",
    "{name} sees that the {x} light is {sx} and the {y} light is {sy}. Claim: {claim}.",
)
_COMPARE = (
    "Claim: {claim}.",
    "{name} says: {claim}.",
    "Check this: {claim}.",
    "Consider the statement: {claim}.",
)
_MEMBER = (
    "Everyone in the {place} club owns a {owned}. {premise} Claim: {claim}.",
    "All members of the {place} club own a {owned}. {premise} Therefore {claim}.",
)
_OWNED = ("bicycle", "boat", "cello", "dog", "guitar", "horse", "kayak", "piano", "tent", "violin", "cat", "drum")
_PLACES = ("chess", "sailing", "reading", "garden", "music", "film", "running", "cooking")


def logic(rng: Random) -> Pair:
    """Draw a statement to judge, or an ordering with one extreme.

    Args:
        rng: source of the wording and of the facts.

    Returns:
        Prompt and answer: "TRUE", "FALSE", or a name.
    """
    return mixed(rng, _KINDS)


def _judged(rng: Random, statement: str, verdict: bool) -> Pair:
    """Ask for a verdict on a statement."""
    return f"{statement} {rng.choice(_VERDICT)}", "TRUE" if verdict else "FALSE"


def _order(rng: Random) -> tuple[tuple[str, str, str], list[str], str]:
    """Draw a scale, three people from most to least, and the two premises that order them."""
    scale = rng.choice(_SCALES)
    people = rng.sample(NAMES, 3)
    premises = [f"{people[0]} is {scale[0]} than {people[1]}.", f"{people[1]} is {scale[0]} than {people[2]}."]
    return scale, people, " ".join(premises)


def _who(rng: Random) -> Pair:
    """Find the first or the last of three ordered people."""
    scale, people, premises = _order(rng)
    most = rng.random() < 0.5
    return phrase(rng, _WHO, premises=premises, extreme=scale[1 if most else 2]), people[0 if most else 2]


def _claim(rng: Random) -> Pair:
    """Judge a comparison of two of three ordered people."""
    scale, people, premises = _order(rng)
    first, second = sorted(rng.sample(range(3), 2))
    holds = rng.random() < 0.5
    pair = (first, second) if holds else (second, first)
    claim = f"{people[pair[0]]} is {scale[0]} than {people[pair[1]]}"
    return _judged(rng, phrase(rng, _CLAIM, premises=premises, claim=claim), holds)


def _switches(rng: Random) -> Pair:
    """Judge a statement on two lights that are on or off."""
    x, y = rng.sample(("red", "blue", "green", "white", "left", "right", "upper", "lower"), 2)
    claims = ("both lights are on", "both lights are off", "at least one light is on")
    want, claim = rng.random() < 0.5, rng.choice(claims)
    states = [(a, b) for a in (True, False) for b in (True, False) if _lights(claim, a, b) == want]
    a, b = rng.choice(states)
    on: Sequence[str] = ("off", "on")
    statement = phrase(rng, _SWITCHES, x=x, y=y, sx=on[a], sy=on[b], claim=claim, name=rng.choice(NAMES))
    return _judged(rng, statement, want)


def _lights(claim: str, a: bool, b: bool) -> bool:
    """Tell whether a claim on two lights holds."""
    if claim == "both lights are on":
        return a and b
    if claim == "both lights are off":
        return not a and not b
    return a or b


def _compare(rng: Random) -> Pair:
    """Judge a comparison of two numbers."""
    first, second = rng.sample(range(1, 100), 2)
    holds = rng.random() < 0.5
    claim = f"{first} {'<' if (first < second) == holds else '>'} {second}"
    return _judged(rng, phrase(rng, _COMPARE, claim=claim, name=rng.choice(NAMES)), holds)


def _member(rng: Random) -> Pair:
    """Apply a rule about all members, or refuse what breaks it."""
    name, place, holds = rng.choice(NAMES), rng.choice(_PLACES), rng.random() < 0.5
    owned, other = rng.sample(_OWNED, 2)
    claim = f"{name} owns a {owned}" if holds else f"{name} does not own a {owned}"
    premise = rng.choice((f"{name} is in the {place} club.", f"{name}, who owns a {other}, is in the {place} club."))
    return _judged(rng, phrase(rng, _MEMBER, place=place, owned=owned, premise=premise, claim=claim), holds)


_KINDS: tuple[Draw, ...] = (_who, _claim, _switches, _compare, _member)
