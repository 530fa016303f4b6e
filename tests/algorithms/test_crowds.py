"""Methods that need other clients, and copies at both ends of the wire: what is refused, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.algorithms.worlds import rounds, world
from tests.helpers import run, same, tree

from fedloom import recipe as recipes
from fedloom.algorithms import Algorithm, kept
from fedloom.algorithms.local import Local
from fedloom.types import RecipeError

NEEDY = ("clustered", "fedalt", "fedamp", "heurfedamp", "mira")
MIRRORED = ("admm", "fedalt", "fedamp", "heurfedamp")
CLIP = [{"name": "clip", "norm": 1e-3}]
OWNERS = {"partition": {"name": "natural", "key": "category"}}
ONE_OWNER = {**OWNERS, "source": {"name": "tasks", "rows_per_category": 9, "categories": ["units"]}}


def _named(flag: str) -> list[str]:
    return sorted(name for name, one in Algorithm.known.items() if getattr(one, flag, ""))


def test_who_is_meant() -> None:
    assert _named("needs_others") == sorted(NEEDY)
    assert _named("mirrored") == sorted(MIRRORED)


@pytest.mark.parametrize("name", NEEDY)
def test_one_client_that_trains_is_refused_in_the_recipe(tiny_folder: Path, name: str) -> None:
    for data, where in (
        ({"clients": 1, "partition": "iid"}, "data.clients=1"),
        ({"clients": 2, "unseen": 0.5}, "data.clients=2, data.unseen=0.5"),
    ):
        with pytest.raises(RecipeError, match=f"{where}: algorithm={name} .* there are no others; let more clients"):
            recipes.load(tree(tiny_folder, algorithm=name, data=data, rounds=3))
    recipes.load(tree(tiny_folder, algorithm=name, data={"clients": 3, "unseen": 0.34}, rounds=3))


@pytest.mark.parametrize("name", NEEDY)
def test_one_owner_is_refused_before_training(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    problem = f"data.partition=natural: clients that train: 1: algorithm={name} .* there are no others"
    with pytest.raises(RecipeError, match=problem):
        run(tiny_folder, tmp_path / "a", algorithm=name, data=ONE_OWNER, rounds=3)
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_the_number_of_owners_is_not_data_clients(tiny_folder: Path) -> None:
    """`data.clients` says nothing about a natural partition."""
    recipe = recipes.load(tree(tiny_folder, data={**OWNERS, "clients": 1}, algorithm="mira"))
    assert recipe.data.training_clients() is None


@pytest.mark.parametrize(("clients", "unseen", "train"), [(4, 0.0, 4), (4, 0.25, 3), (4, 0.01, 3), (3, 0.34, 2)])
def test_as_many_train_as_the_recipe_says(
    tiny_folder: Path, tmp_path: Path, clients: int, unseen: float, train: int
) -> None:
    them = world(tiny_folder, tmp_path, data={"clients": clients, "unseen": unseen, "partition": "iid"})
    assert them.recipe.data.training_clients() == train == len(them.clients)


@pytest.mark.parametrize("name", MIRRORED)
def test_transforms_of_what_both_ends_add_up_are_refused(tiny_folder: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=f"transforms=clip: with algorithm={name}, clients and server both keep"):
        recipes.load(tree(tiny_folder, algorithm=name, transforms=CLIP))


def test_without_the_refusal_they_would_part(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("fedalt", "fedamp"):
        for clip, together in (([], True), (CLIP, False)):
            with monkeypatch.context() as patch:
                patch.setattr(Algorithm.known[kind], "mirrored", "")
                them = world(tiny_folder, tmp_path / kind / str(together), algorithm=kind, transforms=clip)
                state = rounds(them)
            for client in them.clients:
                own: Any = them.memories.load(client)["individual" if kind == "fedalt" else "personal"].tensors
                assert same(dict(own), dict(kept.kept(state, client))) == together


def test_others_may_be_clipped(tiny_folder: Path) -> None:
    for name in ("mira", "scaffold", "ditto", "fedem"):
        trainer = {"optimizer": "sgd", "clip_norm": None}
        recipes.load(tree(tiny_folder, algorithm=name, transforms=CLIP, trainer=trainer))
    assert not list(Local().check_clients(1))
