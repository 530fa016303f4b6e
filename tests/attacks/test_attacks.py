"""Attacks: formulas against naive ones, poisoned rows that reach their owner alone, and what defences do to a run."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from tests.bare import bare_around, bare_server
from tests.helpers import tree

from fedloom import recipe as recipes
from fedloom import seeds
from fedloom.algorithms.fedavg import FedAvg
from fedloom.attacks import Attack, Scene
from fedloom.attacks.backdoor import Backdoor
from fedloom.attacks.colluding import Alie, Ipm, furthest
from fedloom.attacks.label_flip import LabelFlip
from fedloom.attacks.min_max import MinMax
from fedloom.attacks.own_update import Gaussian, Scaling, SignFlip
from fedloom.data.rows import Row, Turn
from fedloom.types import Bundle, ClientUpdate, DataError, Message, RecipeError, ServerState

BAD = ("c0", "c3")
FIVE = {"data": {"clients": 5, "partition": "iid", "source": {"name": "tasks", "rows_per_category": 10}}}


def updates(rows: Any) -> list[ClientUpdate]:
    """Return one update a row, cut into two tensors, with a further group."""
    table = torch.as_tensor(np.asarray(rows), dtype=torch.float64)
    more = Bundle({"v": torch.ones(1)}, {"x": 1.0})
    return [
        ClientUpdate(f"c{k}", 1.0, Message({"params": Bundle({"b": row[:1], "a": row[1:]}), "more": more}))
        for k, row in enumerate(table)
    ]


def scene(n: int, round_: int = 0, attackers: Any = BAD, lr: float = 1.0) -> Scene:
    names = [f"c{k}" for k in range(n)]
    return Scene(round_, names, frozenset(attackers), bare_around(), lr, seeds.generator(0, round_, None, "attack:0"))


def sent(attack: Attack, rows: Any, **more: Any) -> np.ndarray:
    """Return what every client sends, a row each."""
    forged = attack.model_copy(update={"clients": BAD}).forge(updates(rows), scene(len(rows), **more))
    params = [update.message.groups["params"].tensors for update in forged]
    return torch.stack([torch.cat([one["b"], one["a"]]) for one in params]).numpy()


def drawn(n: int = 8, p: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, p)) + 0.5


FORGING = [SignFlip(), Gaussian(), Scaling(), Alie(), Ipm(), MinMax()]


@pytest.mark.parametrize("attack", FORGING, ids=lambda a: a.part_name)
def test_only_the_shared_weights_of_attackers_change(attack: Attack) -> None:
    rows = drawn()
    found = sent(attack, rows)
    honest = [k for k in range(8) if f"c{k}" not in BAD]
    assert (found[honest] == rows[honest]).all()
    assert all((found[k] != rows[k]).any() for k in (0, 3))
    attack = attack.model_copy(update={"clients": BAD, "start": 2})
    before = list(attack.forge(updates(rows), scene(8, 1)))
    for update, row in zip(before, rows, strict=True):
        assert torch.equal(update.message.groups["params"].tensors["a"], torch.tensor(row[1:]))
    for forged in attack.forge(updates(rows), scene(8, 2)):
        assert forged.message.groups["more"] == updates(rows)[0].message.groups["more"]
    half = [ClientUpdate("c0", 1.0, Message({"params": Bundle({"w": torch.ones(3, dtype=torch.bfloat16)})}))]
    half += [ClientUpdate("c1", 1.0, half[0].message), ClientUpdate("c2", 1.0, half[0].message)]
    first = next(iter(attack.forge(half, scene(3, 2))))
    assert first.message.groups["params"].tensors["w"].dtype == torch.bfloat16


def test_attacks_on_the_own_update() -> None:
    rows = drawn()
    assert (sent(SignFlip(scale=3.0), rows)[3] == -3 * rows[3]).all()
    assert np.allclose(sent(Scaling(), rows, lr=0.5)[0], rows[0] * 16)
    assert np.allclose(sent(Scaling(scale=5.0), rows)[0], rows[0] * 5)
    noise = sent(Gaussian(std=2.0), drawn(4, 4001))
    assert noise[[0, 3]].std() == pytest.approx(2.0, rel=0.05)
    assert abs(np.corrcoef(noise[0], noise[3])[0, 1]) < 0.1
    assert (noise == sent(Gaussian(std=2.0), drawn(4, 4001))).all()
    assert (noise != sent(Gaussian(std=2.0), drawn(4, 4001), round_=1))[0].any()


@pytest.mark.parametrize(("n", "f"), [(8, 2), (50, 24), (25, 5), (5, 1), (3, 1), (6, 3)])
def test_alies_distance(n: int, f: int) -> None:
    s = max(1, math.floor(n / 2) + 1 - f)
    assert furthest(n, f) == pytest.approx(norm.ppf((n - f - s) / (n - f)), abs=1e-9)
    assert furthest(50, 24) == pytest.approx(norm.ppf(24 / 26))


def test_attacks_that_know_the_honest_updates() -> None:
    rows = drawn()
    honest = np.delete(rows, [0, 3], 0)
    mean, deviation = honest.mean(0), honest.std(0)
    for k in (0, 3):
        assert np.allclose(sent(Alie(), rows)[k], mean + norm.ppf(3 / 6) * deviation, atol=1e-12)
        assert np.allclose(sent(Alie(z=1.5), rows)[k], mean + 1.5 * deviation, atol=1e-12)
        assert np.allclose(sent(Ipm(epsilon=0.7), rows)[k], -0.7 * mean, atol=1e-12)
    eleven = drawn(11)
    others = np.delete(eleven, [0, 3], 0)
    expected = others.mean(0) + norm.ppf((9 - 4) / 9) * others.std(0)
    assert np.allclose(sent(Alie(), eleven)[3], expected, atol=1e-12)


@pytest.mark.parametrize("direction", ["unit", "std", "sign"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_min_max_against_a_halving_search(direction: Any, seed: int) -> None:
    rows = drawn(8, 6, seed)
    honest = np.delete(rows, [0, 3], 0)
    mean = honest.mean(0)
    away = {"unit": -mean / np.linalg.norm(mean), "std": -honest.std(0), "sign": -np.sign(mean)}[direction]
    most = max(np.linalg.norm(a - b) for a in honest for b in honest)
    low, high = 0.0, 100.0
    for _ in range(80):
        gamma = (low + high) / 2
        fits = max(np.linalg.norm(mean + gamma * away - g) for g in honest) <= most
        low, high = (gamma, high) if fits else (low, gamma)
    assert low > 0.1
    assert np.allclose(sent(MinMax(direction=direction), rows)[3], mean + low * away, atol=1e-9)


def test_alone_or_blind() -> None:
    rows = drawn(3)
    one = [updates(rows)[k] for k in (0, 1)]
    for attack in (Alie(), MinMax()):
        forged = next(iter(attack.model_copy(update={"clients": BAD}).forge(one, scene(2))))
        assert torch.equal(forged.message.groups["params"].tensors["a"], torch.tensor(rows[1][1:]))
    blind = next(iter(Ipm(clients=BAD).forge(one[:1], scene(1))))
    assert blind is one[0]


def test_attackers_of_another_attack_are_not_honest() -> None:
    rows = drawn(4)
    forged = list(Ipm(clients=("c0",)).forge(updates(rows), scene(4)))
    assert np.allclose(forged[0].message.groups["params"].tensors["a"], -0.5 * rows[[1, 2], 1:].mean(0))


def test_scaling_replaces_the_model() -> None:
    """The others rest at an optimum; whatever the server's learning rate, the attacker's weights are the next ones."""
    start, wanted = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([7.0, 0.5], dtype=torch.float64)
    for lr in (0.25, 1.0):
        server, algorithm = bare_server(["c0", "c1", "c2", "c4"], lr=lr), FedAvg(weighting="uniform")
        state = ServerState(0, {"w": start})
        deltas = [wanted - start, *[torch.zeros(2, dtype=torch.float64)] * 3]
        held = [
            ClientUpdate(name, 1.0, Message({"params": Bundle({"w": d})}))
            for name, d in zip(server.clients, deltas, strict=True)
        ]
        told = Scene(0, server.clients, frozenset({"c0"}), bare_around(), lr, torch.Generator())
        forged = Scaling(clients=("c0",)).forge(held, told)
        combined = _end(algorithm.combine(server, state, forged))
        torch.testing.assert_close(
            _end(algorithm.step(server, state, combined)).params["w"], wanted, rtol=0, atol=1e-12
        )


def _end(steps: Any) -> Any:
    try:
        next(steps)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("an effect was asked for")


def rows_of(n: int) -> list[Row]:
    return [Row(str(i), (Turn("user", f"q{i}"), Turn("assistant", f"a{i}")), {"k": "v"}) for i in range(n)]


def test_flipped_labels_are_a_derangement() -> None:
    for n in (2, 3, 17):
        own = rows_of(n)
        found = LabelFlip().poison(own, torch.Generator().manual_seed(n))
        assert [row.turns[0] for row in found] == [row.turns[0] for row in own]
        assert all(a.turns[1] != b.turns[1] for a, b in zip(found, own, strict=True))
        assert Counter(row.turns[1] for row in found) == Counter(row.turns[1] for row in own)
        assert found == LabelFlip().poison(own, torch.Generator().manual_seed(n))
    assert LabelFlip().poison(rows_of(1), torch.Generator()) == rows_of(1)


def test_backdoor_rows() -> None:
    attack, own = Backdoor(trigger="zq", target="yes", poison_ratio=0.3), rows_of(10)
    found = attack.poison(own, torch.Generator().manual_seed(0))
    changed = [i for i in range(10) if found[i] != own[i]]
    assert len(changed) == 3
    assert all(found[i].turns == (Turn("user", f"zq q{i}"), Turn("assistant", "yes")) for i in changed)
    talk = Row(
        "t",
        (
            Turn("system", "s"),
            Turn("user", "u"),
            Turn("assistant", "a"),
            Turn("user", "v", "v"),
            Turn("assistant", "b"),
        ),
    )
    after = attack.triggered(talk).turns
    assert after[:3] == talk.turns[:3]
    assert after[3:] == (Turn("user", "zq v", "v"), Turn("assistant", "yes"))
    with pytest.raises(DataError, match="row r has no question for the trigger"):
        attack.triggered(Row("r", (Turn("assistant", "a"),)))
    rows = drawn()
    assert (sent(Backdoor(scale=4.0), rows)[0] == 4 * rows[0]).all()
    assert (sent(Backdoor(), rows) == rows).all()


def test_who_attacks() -> None:
    names = [f"c{i}" for i in range(10)]
    drawn_ = SignFlip(share=0.3).on(names, 0)
    assert len(drawn_.clients) == 3
    assert drawn_ == SignFlip(share=0.3).on(names, 0)
    assert drawn_.clients != SignFlip(share=0.3).on(names, 1).clients
    assert SignFlip(share=0.07).on([str(i) for i in range(100)], 0).clients.__len__() == 7
    assert len(SignFlip(share=0.99).on(names, 0).clients) == 9
    with pytest.raises(RecipeError, match="there is no client 'c11'; did you mean 'c1'"):
        SignFlip(clients=("c11",)).on(names, 0)
    with pytest.raises(RecipeError, match="sign-flip needs an honest client beside it"):
        SignFlip().on(["c0"], 0)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ({"name": "label-flip", "start": 2}, "poisoned rows are there from the first round on"),
        ({"name": "backdoor", "start": 1}, "add the attack scaling with the same clients"),
        ({"name": "backdoor", "trigger": ""}, r"attacks.0.trigger|trigger"),
        ({"name": "sign-flip", "scale": 0}, "greater than 0"),
        ({"name": "min-max", "direction": "up"}, "'unit', 'std' or 'sign'"),
        ({"name": "sign-flop"}, "did you mean 'sign-flip'"),
    ],
)
def test_odd_attacks_are_refused_when_the_recipe_is_read(attack: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load(tree(tmp_path, attacks=[attack]))
