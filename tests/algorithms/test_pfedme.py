"""pFedMe: inner solutions, outer steps, the server's share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.bowls import Bowl, Federation, near
from tests.helpers import tree

from fedloom import recipe as recipes
from fedloom.algorithms.pfedme import OWN, PFedMe
from fedloom.types import RecipeError

BOWLS = {"a": Bowl(2.0, 1.0, steps=3, rows=3), "b": Bowl(0.5, -4.0, steps=2)}


def test_a_naive_second_implementation() -> None:
    lam, eta, beta, inner = 3.0, 0.1, 0.7, 4
    them = Federation(PFedMe(lam=lam, outer_lr=eta, beta=beta, inner_steps=inner), BOWLS)
    shared = 0.0
    for _ in range(3):
        ends, weights = [], []
        for bowl in BOWLS.values():
            w = theta = shared
            for _ in range(bowl.steps):
                for _ in range(inner):
                    theta -= bowl.lr * (bowl.slope * (theta - bowl.target) + lam * (theta - w))
                w -= eta * lam * (w - theta)
            ends.append((w, theta))
            weights.append(bowl.rows)
        shared = (1 - beta) * shared + beta * sum(p * w for p, (w, _) in zip(weights, ends, strict=True)) / sum(weights)
        them.round()
        assert near(them.state.params, shared, 1e-12)
        for name, (_, theta) in zip(BOWLS, ends, strict=True):
            assert near(them.own(name), theta, 1e-12)
    assert them.updates[0].metrics["steps"] == 3 * inner


def test_many_inner_steps_find_the_proximal_point() -> None:
    bowl, lam = Bowl(2.0, 1.0, steps=1), 3.0
    them = Federation(PFedMe(lam=lam, inner_steps=200, outer_lr=1 / lam), {"a": bowl})
    for _ in range(3):
        w = float(them.state.params["w"][0])
        them.round()
        theta = them.memories["a"][OWN].tensors
        assert near(theta, (bowl.slope * bowl.target + lam * w) / (bowl.slope + lam))
        # eta lambda = 1 and beta = 1: w_k is theta
        torch.testing.assert_close(them.state.params["w"], theta["w"], rtol=0, atol=1e-12)


def test_the_same_batch_k_times() -> None:
    asked: list[Any] = []
    them = Federation(PFedMe(inner_steps=2), {"a": Bowl(1.0, 1.0, steps=3)})
    real = Bowl.answer
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(Bowl, "answer", lambda self, effect: asked.append(effect) or real(self, effect))
        them.round()
    assert [effect.steps for effect in asked] == [(0, 0), (1, 1), (2, 2)]

    never = Federation(PFedMe(), BOWLS)
    never.round(["a"])
    assert never.own("b") is never.state.params


def test_the_optimisers_moments_go_on(tiny_folder: Path, tmp_path: Path) -> None:
    """With lambda = 0, theta is K = 1 steps over the round's batches: local training from w, moments and all."""
    from tests.algorithms.worlds import rounds, world

    adamw = {"trainer": {"steps": 3}}
    alone = world(tiny_folder, tmp_path / "a", algorithm="local", **adamw)
    rounds(alone, [()])
    them = world(tiny_folder, tmp_path / "b", algorithm={"name": "pfedme", "lam": 0, "inner_steps": 1}, **adamw)
    rounds(them, [()])
    for name in them.clients:
        theta, local = them.memories.load(name)[OWN].tensors, alone.memories.load(name)["adapter"].tensors
        for key in theta:
            torch.testing.assert_close(theta[key], local[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"name": "pfedme", "lam": 15, "outer_lr": 0.2}}, r"outer_lr x algorithm.lam is 3: .*lower one"),
        ({"algorithm": "pfedme", "trainer": {"decay": 0.5}}, r"trainer.decay would begin anew.*set it to 1"),
        ({"algorithm": {"name": "pfedme", "inner_steps": 0}}, "greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load(tree(tiny_folder, **changes))
