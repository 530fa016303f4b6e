"""What robust rules refuse, and how they say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.bare import bare_around
from tests.helpers import MODEL
from tests.server.test_robust import NAMES, POINTS, RULES, around_lora, drawn, lora, updates

from fedloom import recipe as recipes
from fedloom.server.aggregate import Aggregator, Mean
from fedloom.server.robust.krum import Krum
from fedloom.types import Bundle, ClientUpdate, Message, RecipeError, Stopped


@pytest.mark.parametrize("rule", [Mean(), *RULES], ids=["mean", *NAMES])
def test_odd_updates_are_refused(rule: Aggregator) -> None:
    held = updates(drawn(7, 6))
    other = ClientUpdate("odd", 1.0, Message({"params": Bundle({"b": torch.ones(1)})}))
    wide = ClientUpdate("wide", 1.0, Message({"params": Bundle({"b": torch.ones(1), "a": torch.ones(1)})}))
    text = ClientUpdate("text", 1.0, Message({**held[0].message.groups, "words": Bundle(texts={"x": "y"})}))
    with pytest.raises(ValueError, match="no update"):
        rule.combine([], bare_around())
    with pytest.raises(ValueError, match="the update of odd has other groups or names"):
        rule.combine([*held, other], bare_around())
    with pytest.raises(ValueError, match=r"the update of wide has params/a of shape \(1,\)"):
        rule.combine([*held, wide], bare_around())
    with pytest.raises(ValueError, match="the update of text has texts in group words"):
        rule.combine([*held, text], bare_around())


def test_means_of_numbers() -> None:
    held = [
        ClientUpdate(str(k), w, Message({"n": Bundle(scalars={"x": x})})) for k, (x, w) in enumerate([(1, 1), (4, 2)])
    ]
    assert Mean().combine(held, bare_around()).groups["n"].scalars == {"x": 3.0}


@pytest.mark.parametrize(
    ("rule", "clients", "message"),
    [
        ({"name": "krum", "f": 2}, 6, r"krum needs at least 7 updates a round \(2 f \+ 3\) and the sampler picks 6"),
        (
            {"name": "multi-krum"},
            4,
            r"multi-krum needs at least 5 .* lower server.aggregator.f, or raise sampler.count",
        ),
        ({"name": "multi-krum", "m": 9}, 8, r"server.aggregator.m=9: the sampler picks 8 clients"),
        ({"name": "bulyan"}, 6, r"bulyan needs at least 7 updates a round \(4 f \+ 3\)"),
        ({"name": "trimmed-mean", "f": 3}, 6, r"trimmed-mean needs at least 7 updates"),
        ({"name": "dnc", "f": 2, "iterations": 4}, 8, r"dnc needs at least 9 updates"),
    ],
)
def test_too_few_clients_are_refused_when_the_recipe_is_read(rule: Any, clients: int, message: str) -> None:
    tree = {"model": {"name": "x/y", **MODEL}, "server": {"aggregator": rule}, "data": {"clients": clients}}
    with pytest.raises(RecipeError, match=message):
        recipes.load(tree)
    recipes.load({**tree, "data": {"clients": clients + 1}})
    with pytest.raises(RecipeError, match=message):
        recipes.load({**tree, "data": {"clients": 30}, "sampler": {"count": clients}})


def test_too_few_finite_updates_stop_the_run() -> None:
    with pytest.raises(Stopped, match=r"krum needs at least 5 .* and 4 came that are finite"):
        Krum().combine(updates(POINTS[:4]), bare_around())


def test_products_need_factors() -> None:
    rule = Krum(distance="product")
    half = [
        ClientUpdate(str(k), 1.0, Message({"params": Bundle({n: t for n, t in lora().items() if "A" in n})}))
        for k in range(5)
    ]
    with pytest.raises(RecipeError, match="sends only some of the shared weights; set server"):
        rule.combine(half, around_lora())
    with pytest.raises(RecipeError, match="there are none; set server"):
        rule.combine(updates(POINTS), bare_around())
    with pytest.raises(RecipeError, match="not LoRA factors in pairs"):
        one = {"w": torch.zeros(2)}
        held = [ClientUpdate(str(k), 1.0, Message({"params": Bundle(one)})) for k in range(5)]
        rule.combine(held, bare_around(one, lambda rank: 1.0))
    with pytest.raises(RecipeError, match="sends no shared weights"):
        Krum().combine([ClientUpdate(str(k), 1.0, Message()) for k in range(5)], bare_around())


def test_products_are_refused_without_factors_when_the_recipe_is_read() -> None:
    tree = {
        "model": {"name": "x/y", **MODEL},
        "server": {"aggregator": {"name": "krum", "distance": "product"}},
        "data": {"clients": 5, "public": 10},
    }
    recipes.load(tree)
    with pytest.raises(RecipeError, match="distance=product compares products of LoRA factors, which adapter=lora-sb"):
        recipes.load({**tree, "algorithm": "fed-sb", "adapter": "lora-sb"})
