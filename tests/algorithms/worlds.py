"""Real federations on the tiny model in fp64, driven round by round without a run around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers import tree

from fedloom import recipe as recipes
from fedloom.assets import prepare
from fedloom.recipe import overlay
from fedloom.settle import settle
from fedloom.tracking import Sink
from fedloom.types import ServerState
from fedloom.world import World


def world(folder: Path, out: Path, **changes: Any) -> World:
    """Return the world of a small recipe (`tests.helpers.tree`)."""
    exact = {"model": {"dtype": "fp64"}, "evaluate": [], "runtime": {"cohort": 1}}
    recipe = recipes.load(tree(folder, **overlay(exact, changes))).resolved()
    assets = prepare(recipe, Sink())
    out.mkdir(parents=True, exist_ok=True)
    return World(settle(recipe, assets), out, assets, Sink())


def rounds(of: World, cohorts: Sequence[Sequence[str]] = ((), ()), state: ServerState | None = None) -> ServerState:
    """Run rounds and return the last state.

    Args:
        cohorts: one a round; empty: all clients.  state: from which to go on.
    """
    state = of.recipe.algorithm.init(of.assets.initial) if state is None else state
    for cohort in cohorts:
        state, _ = of.engine.round(of.crew, state, cohort or of.clients)
        of.memories.commit(state.round)
    return state
