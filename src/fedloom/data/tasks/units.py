"""Conversions between units with a whole-number factor, answered with the number and the unit's symbol."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from fedloom.data.tasks.phrasing import Pair, phrase
from fedloom.data.tasks.words import NAMES


@dataclass(frozen=True, slots=True)
class _Unit:
    """One unit: its plural and its symbol."""

    plural: str
    symbol: str


@dataclass(frozen=True, slots=True)
class _Pair:
    """One large unit holds `factor` small ones; `carriers` are sentences that state an amount."""

    large: _Unit
    small: _Unit
    factor: int
    carriers: tuple[str, ...]


_LENGTHS = (
    "The rope measures {amount}.",
    "The path through the garden is {amount} long.",
    "A fence is {amount} long.",
    "{name} unrolls {amount} of ribbon.",
    "The wall is {amount} wide.",
    "{name} needs {amount} of cable.",
)
_ROADS = (
    "{name} walks {amount}.",
    "The trail is {amount} long.",
    "The next village is {amount} away.",
    "{name} cycles {amount} to work.",
    "The river is {amount} long.",
)
_MASSES = (
    "The parcel weighs {amount}.",
    "{name} buys {amount} of flour.",
    "A sack holds {amount} of rice.",
    "The dog weighs {amount}.",
    "{name} carries {amount} of books.",
)
_LOADS = ("The lorry carries {amount} of sand.", "The crane lifts {amount}.", "The ship unloads {amount} of grain.")
_VOLUMES = (
    "The jug holds {amount}.",
    "{name} fetches {amount} of water.",
    "The recipe needs {amount} of milk.",
    "The tank is filled with {amount} of water.",
    "{name} pours {amount} of juice.",
)

_KM, _M, _CM, _MM = (
    _Unit("kilometres", "km"),
    _Unit("metres", "m"),
    _Unit("centimetres", "cm"),
    _Unit("millimetres", "mm"),
)
_T, _KG, _G = _Unit("tonnes", "t"), _Unit("kilograms", "kg"), _Unit("grams", "g")
_L, _ML = _Unit("litres", "L"), _Unit("millilitres", "mL")

_PAIRS: tuple[_Pair, ...] = (
    _Pair(_KM, _M, 1000, _ROADS),
    _Pair(_M, _CM, 100, _LENGTHS),
    _Pair(_CM, _MM, 10, _LENGTHS),
    _Pair(_KG, _G, 1000, _MASSES),
    _Pair(_T, _KG, 1000, _LOADS),
    _Pair(_L, _ML, 1000, _VOLUMES),
)
_QUESTIONS = (
    "How much is that in {target}?",
    "What is that in {target}?",
    "Convert this to {target}.",
    "Express this in {target}.",
    "Give this in {target}.",
)
_DIRECT = (
    "Convert {amount} to {target}.",
    "How many {target} are {amount}?",
    "Express {amount} in {target}.",
    "What are {amount} in {target}?",
    "Change {amount} into {target}.",
    "Write {amount} in {target}.",
)
_FORMS = (
    "Write the number and the unit's symbol.",
    "Answer with number and unit symbol.",
    "Use the symbol of the unit.",
    "Give the number and then the short unit symbol.",
)


def units(rng: Random) -> Pair:
    """Draw a conversion from a large unit to a small one or back.

    Args:
        rng: source of the wording, the units and the amount.

    Returns:
        Prompt and answer: number, space, symbol, such as "3000 m".
    """
    pair = rng.choice(_PAIRS)
    number, source, target, result = _amounts(rng, pair)
    # in half of the questions the given amount has its symbol already; the answer's unit is always spelled out
    amount = f"{number} {source.plural if rng.random() < 0.5 else source.symbol}"
    if rng.random() < 0.5:
        question = phrase(rng, _DIRECT, amount=amount, target=target.plural)
    else:
        story = phrase(rng, pair.carriers, amount=amount, name=rng.choice(NAMES))
        question = f"{story} {phrase(rng, _QUESTIONS, target=target.plural)}"
    return f"{question} {rng.choice(_FORMS)}", f"{result} {target.symbol}"


def _amounts(rng: Random, pair: _Pair) -> tuple[str, _Unit, _Unit, str]:
    """Draw the given number and unit, and the target unit with its number."""
    # mostly one digit: the lesson is the factor and the form, not long numbers
    large = rng.randint(2, 9) if rng.random() < 0.75 else rng.choice((10, 12, 15, 20, 25, 30, 40, 50))
    if rng.random() < 0.1:
        return str(large * pair.factor), pair.small, pair.large, str(large)
    return str(large), pair.large, pair.small, str(large * pair.factor)
