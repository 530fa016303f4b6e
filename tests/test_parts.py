"""Parts: found by name, refused by name, written back as they were read."""

from __future__ import annotations

import pytest
from pydantic import PositiveFloat, ValidationError

from fedloom.parts import Part, Record


class Fruit(Part, family=True):
    """Something to eat."""


class Apple(Fruit, name="apple"):
    """The default."""

    weight: PositiveFloat = 100.0
    """Grams."""


class Melon(Fruit, name="melon"):
    """A larger one."""

    slices: int = 8


class Basket(Record):
    """What is carried."""

    first: Fruit = Apple()
    rest: tuple[Fruit, ...] = ()


def test_three_ways_to_write_a_part() -> None:
    for value in ("melon", {"name": "melon"}, Melon()):
        assert Basket(first=value).first == Melon()  # type: ignore[arg-type]
    assert Basket.model_validate({"first": {"name": "melon", "slices": 3}}).first == Melon(slices=3)
    assert Basket.model_validate({"first": {"weight": 5}}).first == Apple(weight=5)
    assert Basket.model_validate({"rest": ["apple", {"name": "melon"}]}).rest == (Apple(), Melon())


def test_round_trip() -> None:
    basket = Basket(first=Melon(slices=2), rest=(Apple(), Melon()))
    dumped = basket.model_dump(mode="json")
    assert dumped["first"] == {"name": "melon", "slices": 2}
    assert Basket.model_validate(dumped) == basket


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"first": "aple"}, "no fruit named 'aple'; did you mean 'apple'.*known: apple, melon"),
        ({"first": {"name": "melon", "slice": 1}}, "no key 'slice' here; did you mean 'slices'"),
        ({"first": {"name": "melon", "slices": "many"}}, "valid integer"),
        ({"first": 3}, "name of a fruit or a mapping"),
        ({"first": {"name": "apple", "weight": float("nan")}}, "finite number"),
        ({"fist": "apple"}, "no key 'fist' here; did you mean 'first'"),
    ],
)
def test_what_is_wrong_is_named(value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Basket.model_validate(value)


def test_all_problems_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        Basket.model_validate({"first": {"name": "melon", "slices": "x", "colour": 1}, "rest": ["plum"]})
    assert {error["loc"] for error in caught.value.errors()} == {
        ("first", "slices"),
        ("first", "colour"),
        ("rest", 0),
    }


def test_a_name_is_registered_once() -> None:
    with pytest.raises(TypeError, match="'apple' is registered twice"):
        type("Other", (Fruit,), {"__module__": __name__}, name="apple")
    assert Fruit.known["apple"] is Apple


def test_parts_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Apple().weight = 3.0  # type: ignore[misc]
