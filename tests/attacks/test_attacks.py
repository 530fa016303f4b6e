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
from tests.helpers import adapter, lines, run, same, tree
from torch import Tensor

import fedloom
from fedloom import recipe as recipes
from fedloom import seeds
from fedloom.algorithms.fedavg import FedAvg
from fedloom.attacks import Attack, Scene
from fedloom.attacks.backdoor import Backdoor
from fedloom.attacks.colluding import Alie, Ipm, furthest
from fedloom.attacks.label_flip import LabelFlip
from fedloom.attacks.min_max import MinMax
from fedloom.attacks.own_update import Gaussian, Scaling, SignFlip
from fedloom.checkpoint import MemoryStore
from fedloom.data.rows import Row, Turn
from fedloom.runtime import pipes
from fedloom.tracking import Plan, Sink
from fedloom.types import Bundle, ClientUpdate, DataError, Message, RecipeError, ServerState
from fedloom.world import prepare, set_stage

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


def test_an_algorithm_without_shared_weights_cannot_be_attacked(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="sends no shared weights"):
        run(tiny_folder, tmp_path / "a", algorithm="local", attacks=["sign-flip"])


def test_attackers_that_are_too_many_for_the_real_cohort(tiny_folder: Path, tmp_path: Path) -> None:
    """Clients kept out of training are known only once the rows are there."""
    with pytest.raises(RecipeError, match="krum needs at least 5 updates a round"):
        data = {**FIVE["data"], "unseen": 0.2}
        run(tiny_folder, tmp_path / "a", data=data, server={"aggregator": "krum"})


def stage_of(folder: Path, **changes: Any) -> Any:
    recipe = recipes.load(tree(folder, **changes))
    assets = prepare(recipe, Sink())
    return set_stage(recipe, assets, MemoryStore(folder / "none"), Sink())[0], assets


@pytest.mark.parametrize(
    "attack", [{"name": "label-flip"}, {"name": "backdoor", "trigger": "zq", "target": "swordfish"}]
)
def test_poisoned_rows_reach_the_attacker_alone(tiny_folder: Path, attack: Any) -> None:
    changes = {**FIVE, "attacks": [{**attack, "clients": ["client-1"]}]}
    stage, assets = stage_of(tiny_folder, **changes)
    plain, _ = stage_of(tiny_folder, **FIVE)
    split = assets.federation
    n = len(split.encoded)
    for name, data in split.clients.items():
        mine = stage.clients[name]
        assert (mine.test == data.test).all()
        assert (mine.validation == data.validation).all()
        if name != "client-1":
            assert (mine.train == data.train).all()
    new = stage.clients["client-1"].train
    assert (new >= n).all()
    assert len(new) == len(split.clients["client-1"].train)
    assert (stage.encoded.ids[: len(split.encoded.ids)] == split.encoded.ids).all()
    assert len(stage.encoded) == n + len(new) == len(split.encoded) + len(new)
    tokenizer = assets.loaded.tokenizer
    texts = [tokenizer.decode(stage.encoded.example(i).ids) for i in new]
    old = [tokenizer.decode(split.encoded.example(i).ids) for i in split.clients["client-1"].train]
    moved = sum(a != b for a, b in zip(texts, old, strict=True))
    if attack["name"] == "backdoor":
        assert moved == math.ceil(len(new) / 2) == sum("zq " in text and "swordfish" in text for text in texts)
        answer = stage.encoded.example(next(i for i, t in zip(new, texts, strict=True) if "zq " in t))
        assert tokenizer.decode(answer.ids[answer.train]).strip().startswith("swordfish")
    else:
        assert moved > len(new) // 2
        assert Counter(_answers(stage.encoded, new)) == Counter(
            _answers(split.encoded, split.clients["client-1"].train)
        )
    assert pipes.fingerprint(stage) != pipes.fingerprint(plain)
    assert plain.encoded is not stage.encoded


def _answers(encoded: Any, where: Any) -> list[bytes]:
    return [bytes(encoded.example(int(i)).ids[encoded.example(int(i)).train].numpy()) for i in where]


def test_two_attacks_on_the_rows_of_one_client(tiny_folder: Path) -> None:
    both = [
        {"name": "label-flip", "clients": ["client-1"]},
        {"name": "backdoor", "clients": ["client-1"], "trigger": "zq"},
    ]
    stage, assets = stage_of(tiny_folder, **FIVE, attacks=both)
    texts = [assets.loaded.tokenizer.decode(stage.encoded.example(i).ids) for i in stage.clients["client-1"].train]
    assert len(texts) == len(assets.federation.clients["client-1"].train)
    assert 0 < sum("zq " in text for text in texts) < len(texts)


def test_poisoned_rows_that_are_too_long(tiny_folder: Path) -> None:
    attack = {"name": "backdoor", "trigger": "x" * 600, "poison_ratio": 1.0, "clients": ["client-2"]}
    with pytest.raises(DataError, match=r"the poisoned rows of client-2: no row is left: .* raise data.max_tokens"):
        stage_of(tiny_folder, **FIVE, attacks=[attack])
    some = {**attack, "poison_ratio": 0.5}
    stage, assets = stage_of(tiny_folder, **FIVE, attacks=[some])
    whole = len(assets.federation.clients["client-2"].train)
    assert len(stage.clients["client-2"].train) == whole - math.ceil(whole / 2)


STEPS = {"trainer": {"steps": 4, "batch": 4, "lr": 3e-2}, "rounds": 3}


def test_robust_rules_keep_what_a_mean_loses(tiny_folder: Path, tmp_path: Path) -> None:
    """One of five clients turns its update round, ten times as long."""
    attack = [{"name": "sign-flip", "scale": 10, "clients": ["client-2"]}]
    losses = {}
    for rule in ("mean", "median", "krum", "geometric-median"):
        result = run(
            tiny_folder,
            tmp_path / rule,
            **FIVE,
            **STEPS,
            attacks=attack,
            server={"aggregator": rule},
            evaluate=["loss"],
        )
        losses[rule] = result.metrics["federated"]["loss"]["loss"]
    clean = run(tiny_folder, tmp_path / "clean", **FIVE, **STEPS, evaluate=["loss"])
    base = clean.metrics["base"]["loss"]["loss"]
    assert clean.metrics["federated"]["loss"]["loss"] < base
    assert losses["mean"] > base
    for rule, loss in losses.items():
        assert rule == "mean" or loss < base, (rule, losses)


RUN: list[dict[str, Any]] = [
    {"name": "krum", "distance": "product"},
    {"name": "bulyan", "f": 0, "distance": "product"},
    {"name": "median"},
]
KEPT: list[dict[str, Any]] = [
    {"name": "centered-clipping", "tau": 0.1},
    {"name": "foolsgold"},
    {"name": "norm-bound", "noise": 1e-3},
    {"name": "dnc", "coordinates": 50},
]


@pytest.mark.parametrize("rule", RUN, ids=lambda rule: rule["name"])
def test_rules_that_keep_nothing_run(tiny_folder: Path, tmp_path: Path, rule: dict[str, Any]) -> None:
    changes = {**FIVE, "server": {"aggregator": rule}, "evaluate": []}
    assert run(tiny_folder, tmp_path / "a", **changes).summary["rounds"] == 2


@pytest.mark.parametrize("rule", KEPT, ids=lambda rule: rule["name"])
def test_rules_with_a_state_or_draws_resume(tiny_folder: Path, tmp_path: Path, rule: dict[str, Any]) -> None:
    changes = {**FIVE, "server": {"aggregator": rule}, "attacks": ["gaussian"], "evaluate": []}
    whole = run(tiny_folder, tmp_path / "a", **changes)
    run(tiny_folder, tmp_path / "b", **changes, rounds=1)
    longer = fedloom.resume(tmp_path / "b", ["rounds=2"])
    assert longer.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert same(adapter(longer), adapter(whole))


def test_every_attack_changes_a_run_and_those_on_rows_resume(tiny_folder: Path, tmp_path: Path) -> None:
    seen = {run(tiny_folder, tmp_path / "clean", **FIVE, evaluate=[]).summary["adapter_sha256"]}
    for name in sorted(Attack.known):
        changes = {**FIVE, "attacks": [{"name": name, "share": 0.4}], "evaluate": []}
        whole = run(tiny_folder, tmp_path / name, **changes)
        seen.add(whole.summary["adapter_sha256"])
        if name == "backdoor":
            run(tiny_folder, tmp_path / "b", **changes, rounds=1)
            longer = fedloom.resume(tmp_path / "b", ["rounds=2"])
            assert longer.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert len(seen) == 1 + len(Attack.known) == 9


def test_worker_processes_have_the_poisoned_rows(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {**FIVE, "attacks": ["backdoor", "alie"], "server": {"aggregator": "foolsgold"}, "evaluate": []}
    one = run(tiny_folder, tmp_path / "a", **changes)
    workers = {"name": "processes", "workers": 2, "threads": 1, "cohort": 1}
    two = run(tiny_folder, tmp_path / "b", **changes, runtime=workers)
    assert same(adapter(one), adapter(two))


def test_compared_regimes_are_not_attacked(tiny_folder: Path, tmp_path: Path) -> None:
    attack = [{"name": "backdoor", "clients": ["client-1"]}]
    changes = {**FIVE, "compare": ["local", "centralized"], "budget": "equal_rounds", "evaluate": ["loss"]}
    attacked = run(tiny_folder, tmp_path / "a", **changes, attacks=attack, server={"aggregator": "krum"})
    clean = run(tiny_folder, tmp_path / "b", **changes)
    for regime in ("local", "centralized"):
        assert attacked.metrics[regime] == clean.metrics[regime]
        other = recipes.load(tmp_path / "a" / "regimes" / regime / "recipe.yaml")
        assert other.attacks == ()
        assert other.server.aggregator.part_name == "mean"
    assert attacked.metrics["federated"] != clean.metrics["federated"]


class Told(Sink):
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def on(self, event: Any) -> None:
        if isinstance(event, Plan):
            self.lines += event.lines


def test_the_plan_names_the_attackers(tiny_folder: Path, tmp_path: Path) -> None:
    told = Told()
    attack = [{"name": "sign-flip", "clients": ["client-1", "client-2"], "start": 1}]
    result = fedloom.run(tree(tiny_folder, **FIVE, attacks=attack), out=tmp_path / "a", sink=told)
    assert ("attackers", "sign-flip by client-1, client-2, from round 2 on") in told.lines
    found = [line for line in lines(result.folder / "metrics.jsonl") if line["name"] == "train_loss"]
    assert len(found) == 2
    assert isinstance(next(iter(adapter(result).values())), Tensor)
