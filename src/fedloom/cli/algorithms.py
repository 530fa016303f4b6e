"""The table of algorithms: `fedloom list algorithms`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

HEADS = ("algorithm", "paper", "shares", "keeps private", "goes with")
BYTES = ("down", "up")
COHORT = 4
"""Clients of a round where no recipe says it."""


def table(recipe: Recipe | None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the heads and rows: what each algorithm sends, keeps, costs and goes together with.

    Args:
        recipe: its model, adapter and cohort give the bytes a client and round; None: without bytes.
    """
    from fedloom.algorithms import Algorithm
    from fedloom.recipe import Recipe
    from fedloom.survey import partners, shapes_of, survey, toy_shapes
    from fedloom.units import human_bytes

    clients = [f"client-{i + 1}" for i in range(COHORT)]
    if recipe is not None:
        names = [f"client-{i + 1}" for i in range(recipe.data.clients)]
        clients = recipe.sampler.cohort(0, names, recipe.seed)
    base, rows = recipe or Recipe(), list[tuple[str, ...]]()
    shapes = toy_shapes() if recipe is None else shapes_of(recipe, clients)
    for name, kind in sorted(Algorithm.known.items()):
        assert issubclass(kind, Algorithm)
        if shapes.ranks is None and (kind.needs_lora or kind.needs_core):
            continue  # there is nothing that it could send; `misfits` says why
        found = survey(kind(), base, clients, shapes)
        others = partners(kind) if found.up else []
        row = (name, found.paper, told(found.shares), told(found.keeps), ", ".join(others))
        rows.append(row if recipe is None else (*row, human_bytes(int(found.down)), human_bytes(int(found.up))))
    heads: tuple[str, ...] = HEADS if recipe is None else (*HEADS, *BYTES)
    return heads, rows


def told(groups: Mapping[str, set[str]]) -> str:
    """Return the kinds of tensors in groups, in words: the adapter's own first."""
    parts = []
    for group, kinds in sorted(groups.items(), key=lambda one: one[0] != "params"):
        if kinds:
            text = ", ".join(sorted(kinds))
            parts.append(text if group == "params" else f"{group}: {text}")
    return "; ".join(parts)


def misfits(recipe: Recipe) -> list[tuple[str, str]]:
    """Return (algorithm, why) of those that cannot run with the rest of a recipe as it is."""
    from fedloom import recipe as recipes
    from fedloom.algorithms import Algorithm
    from fedloom.types import RecipeError

    found = []
    for name in sorted(Algorithm.known):
        try:
            recipes.validate({**recipe.dump(), "algorithm": name}, name)
        except RecipeError as error:
            found.append((name, str(error).partition("\n")[2].strip().removeprefix("recipe: ")))
    return found
