"""LoRA-aware methods end to end on the tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers import MODEL, adapter, lines, run, same, tree

import fedloom
from fedloom import recipe as recipes
from fedloom.algorithms.fedsa import FedSaLora
from fedloom.algorithms.halves import half
from fedloom.checkpoint import Checkpoints, MemoryStore
from fedloom.client import fit
from fedloom.runtime import effects, engine
from fedloom.types import Fitted, Message, RecipeError, ServerState

FP64 = {"model": {"dtype": "fp64"}}
METHODS = ["ffa-lora", "rolora", "fedsa-lora", "hetlora", "lora-fair", "lora-fair-sgd", "hlora", "fedsvd"]
PER_MODULE = {"r": 4, "ranks": [{"q_proj": 1, "v_proj": 3, "down_proj": 2}, 2, 4]}
STATEFUL: list[tuple[str, dict[str, Any]]] = [
    ("rolora", {"server": {"optimizer": "fedavgm", "lr": 0.5}}),
    ("fedsa-lora", {"server": {"optimizer": "fedadam", "lr": 0.01}}),
    ("hetlora", {"adapter": PER_MODULE, "algorithm": {"gamma": 0.7, "prune_penalty": 3.0}}),
    ("fedsvd", {}),
    ("ffa-lora", {"server": {"optimizer": "fedadam", "lr": 0.01}}),
]


def states(result: fedloom.Result) -> list[ServerState]:
    """Return the state before every round, and the last one."""
    checkpoints = Checkpoints(result.folder / "checkpoints", 99)
    return [checkpoints.load(round_)[0] for round_ in checkpoints.rounds()]


def errors(result: fedloom.Result) -> list[float]:
    return [line["value"] for line in lines(result.folder / "metrics.jsonl") if line["name"] == "aggregation_error"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_learns(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    result = run(tiny_folder, tmp_path / "a", algorithm=method, rounds=3, **FP64)
    assert result.summary["rejected"] == 0
    assert result.metrics["federated"]["loss"]["loss"] < result.metrics["base"]["loss"]["loss"]
    assert (result.folder / "adapter").exists() == (method != "fedsa-lora")


@pytest.mark.parametrize("method", ["ffa-lora", "rolora", "fedsvd"])
def test_a_common_factor_makes_the_mean_exact(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    found = errors(run(tiny_folder, tmp_path / "a", algorithm=method, rounds=3, **FP64))
    assert len(found) == 3
    assert max(found) < 1e-12


def test_the_correction_lowers_the_error_of_averaging(tiny_folder: Path, tmp_path: Path) -> None:
    plain = errors(run(tiny_folder, tmp_path / "a", rounds=1, **FP64))
    for method in ("lora-fair", "lora-fair-sgd"):
        (found,) = errors(run(tiny_folder, tmp_path / method, algorithm=method, rounds=1, **FP64))
        assert 0 < found < plain[0]


@pytest.mark.parametrize("method", ["ffa-lora", "rolora"])
def test_the_frozen_factor_keeps_every_bit(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    result = run(tiny_folder, tmp_path / "a", algorithm=method, rounds=4, checkpoint={"keep": 9}, evaluate=[])
    found = states(result)
    for round_, (before, after) in enumerate(pairwise(found)):
        frozen = "lora_B" if method == "rolora" and round_ % 2 else "lora_A"
        moving = "lora_A" if frozen == "lora_B" else "lora_B"
        assert same(half(before.params, frozen), half(after.params, frozen))
        assert not same(half(before.params, moving), half(after.params, moving))


@pytest.mark.parametrize(("method", "changes"), STATEFUL)
def test_a_resumed_run_is_the_straight_run(
    tiny_folder: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    both = recipes.overlay({"algorithm": {"name": method}, "sampler": {"count": 2}, "evaluate": ["loss"]}, changes)
    whole = run(tiny_folder, tmp_path / "a", rounds=5, **both)
    run(tiny_folder, tmp_path / "b", rounds=2, **both)
    longer = fedloom.resume(tmp_path / "b", ["rounds=5"])
    for key in ("adapter_sha256", "metrics", "trained_tokens", "bytes_up", "bytes_down"):
        assert longer.summary[key] == whole.summary[key], key
    a, b = (states(one)[-1] for one in (whole, longer))
    assert same(dict(a.params), dict(b.params))
    assert a.slots.keys() == b.slots.keys()


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_fedsa_with_one_client_is_local_training(tiny_folder: Path, tmp_path: Path, dtype: str) -> None:
    changes = {"model": {"dtype": dtype}, "data": {"clients": 1, "partition": "iid"}, "rounds": 3}
    shared = run(tiny_folder, tmp_path / "a", algorithm="fedsa-lora", **changes)
    local = run(tiny_folder, tmp_path / "b", algorithm="local", **changes)
    a, b = (load_file(next((r.folder / "adapters" / "client-1").glob("*/*.safetensors"))) for r in (shared, local))
    assert same(a, b)
    assert shared.metrics["federated"] == local.metrics["local"]


@pytest.mark.parametrize("method", ["ffa-lora", "rolora", "lora-fair", "hetlora", "flexlora", "fedsvd"])
def test_one_client_is_what_it_trained(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    """The adapter that a lone client leaves the trainer with is the one that the next round starts from."""
    one = {"data": {"clients": 1, "partition": "iid"}, "rounds": 3, "evaluate": [], **FP64}
    seen = _watched(lambda: run(tiny_folder, tmp_path / "a", algorithm=method, checkpoint={"keep": 9}, **one))
    checkpoints = Checkpoints(tmp_path / "a" / "checkpoints", 9)
    for round_, fitted in enumerate(seen):
        state, _ = checkpoints.load(round_ + 1)
        for module in {name.rpartition(".")[0] for name in state.params}:
            a, b = (p[f"{module}.lora_B"] @ p[f"{module}.lora_A"] for p in (state.params, fitted.params))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_b_of_fedsa_is_in_no_message(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Message] = []
    sealed, broadcast = engine._sealed, FedSaLora.broadcast

    def noted(*arguments: Any) -> Message:
        message = broadcast(*arguments)
        sent.append(message)
        return message

    monkeypatch.setattr(engine, "_sealed", lambda message: sent.append(message) or sealed(message))
    monkeypatch.setattr(FedSaLora, "broadcast", noted)
    result = run(tiny_folder, tmp_path / "a", algorithm="fedsa-lora")
    assert len(sent) > 3 * 2 * 2
    names = {name for message in sent for group in message.groups.values() for name in group.tensors}
    assert names
    assert all(name.endswith("lora_A") for name in names)
    store = MemoryStore(result.folder / "memories")
    store.look_at(2)
    for client in ("client-1", "client-2", "client-3"):
        kept = {name for bundle in store.load(client).values() for name in bundle.tensors}
        assert kept == {name.replace("lora_A", "lora_B") for name in names}


def test_fedsa_clients_use_their_own_b(tiny_folder: Path, tmp_path: Path) -> None:
    result = run(tiny_folder, tmp_path / "a", algorithm="fedsa-lora", evaluate=["loss"])
    own = [load_file(p) for p in sorted((result.folder / "adapters").glob("*/personal/adapter_model.safetensors"))]
    assert len(own) == 3
    a, b = ([{n: t for n, t in one.items() if kind in n} for one in own] for kind in ("lora_A", "lora_B"))
    assert same(a[0], a[1])
    assert not same(b[0], b[1])


def test_a_rolora_client_whose_update_was_refused_gets_both_factors(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, down = fit.fit, {}

    def spoilt(bench: Any, jobs: Any) -> list[Fitted]:
        done = real(bench, jobs)
        for job, fitted in zip(jobs, done, strict=True):
            if (job.round, job.client) == (1, "client-2"):
                for t in fitted.params.values():
                    t.fill_(float("nan"))
        return done

    sealed = engine._sealed

    def noted(message: Message) -> bytes:
        down.setdefault(len(down), message)
        return sealed(message)

    monkeypatch.setattr(effects.fit, "fit", spoilt)
    monkeypatch.setattr(engine, "_sealed", noted)
    result = run(tiny_folder, tmp_path / "a", algorithm="rolora", rounds=3, evaluate=[])
    assert result.summary["rejected"] == 1
    both, single = len(adapter(result)), len(adapter(result)) // 2
    sent = [len(message.groups["params"].tensors) for message in down.values()]
    assert sorted(sent[:6]) == sorted([both] * 3 + [single] * 3)
    assert sorted(sent[6:12]) == [single] * 6
    assert sorted(sent[12:]) == sorted([both] + [single] * 5)


@pytest.mark.parametrize("method", ["hetlora", "flexlora", "hlora"])
def test_ranks_by_client_and_module(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    ranks: dict[str, set[tuple[int, ...]]] = {}

    def see(effect: Any) -> None:
        for name, t in effect.start.items():
            if name.endswith("lora_A"):
                ranks.setdefault(name.rpartition(".")[0].rpartition(".")[2], set()).add((len(t),))

    changes = {"adapter": PER_MODULE, "algorithm": method, **FP64}
    seen = _watched(lambda: run(tiny_folder, tmp_path / "a", **changes), see)
    assert len(seen) == 6
    assert ranks["q_proj"] == {(1,), (2,), (4,)}
    assert ranks["v_proj"] == {(3,), (2,), (4,)}
    assert ranks["k_proj"] == {(4,), (2,)}
    exported = adapter(tmp_path / "a")
    assert {len(t) for name, t in exported.items() if "lora_A" in name} == {4}
    assert all(float(t.abs().max()) > 0 for name, t in exported.items())


def test_hetlora_clients_prune_in_a_run(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {
        "adapter": {"r": 4, "ranks": [4, 2, 4]},
        "algorithm": {"name": "hetlora", "gamma": 0.7, "prune_penalty": 10.0},
        "rounds": 5,
        "evaluate": ["loss"],
    }
    result = run(tiny_folder, tmp_path / "a", **changes)
    mean = [
        [x["value"] for x in lines(result.folder / "metrics.jsonl") if (x["name"], x["client"]) == ("rank", client)]
        for client in ("client-1", "client-2", "client-3")
    ]
    for ranks in mean:
        assert ranks == sorted(ranks, reverse=True)
        assert ranks[-1] < ranks[0]
        assert ranks[-1] >= 1
    up = [x["value"] for x in lines(result.folder / "metrics.jsonl") if (x["name"], x["client"]) == ("bytes_up", None)]
    assert up[-1] < up[0]
    assert states(result)[-1].slots["ranks"].scalars


def test_fedsvd_sends_an_orthonormal_a(tiny_folder: Path, tmp_path: Path) -> None:
    result = run(tiny_folder, tmp_path / "a", algorithm="fedsvd", checkpoint={"keep": 9}, evaluate=[], **FP64)
    for state in states(result):
        for name, a in half(state.params, "lora_A").items():
            torch.testing.assert_close(a @ a.T, torch.eye(2, dtype=a.dtype), rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[
            ({"algorithm": method, "adapter": {"ranks": [1]}}, f"{method} needs one rank at all clients.*hetlora")
            for method in ("ffa-lora", "rolora", "fedsa-lora", "lora-fair", "lora-fair-sgd", "fedsvd")
        ],
        *[
            ({"algorithm": method, "server": {"optimizer": "fedavgm"}}, rf"fedavgm.*applies.*itself \({why}")
            for method, why in (
                ("fedsvd", "the basis of B is another one"),
                ("lora-fair", "the correction fits the mean"),
                ("lora-fair-sgd", "the correction fits the mean"),
                ("hlora", "the mean product replaces"),
            )
        ],
        *[
            (
                {"algorithm": method, "server": {"aggregator": {"name": "krum", "f": 0, "distance": "product"}}},
                rf"needs both factors.*algorithm={method} send one of them; set server.aggregator.distance=factors",
            )
            for method in ("ffa-lora", "rolora", "fedsa-lora", "fedsvd")
        ],
        *[
            (
                {"algorithm": "fedsvd", "server": {"aggregator": rule}},
                f"{rule} compares updates with earlier ones",
            )
            for rule in ("foolsgold", "centered-clipping")
        ],
        *[
            ({"algorithm": method, "server": {"aggregator": "median"}}, f"median: algorithm={method} combines")
            for method in ("lora-fair", "lora-fair-sgd", "hlora")
        ],
        ({"algorithm": "fedsvd", "server": {"lr": 0.5}}, "set server.optimizer=sgd and server.lr=1"),
        ({"algorithm": {"name": "hetlora", "gamma": 1.0}}, "algorithm.gamma: should be less than 1"),
        ({"algorithm": {"name": "hetlora", "gamma": 0.0}}, "algorithm.gamma: should be greater than 0"),
        (
            {"algorithm": {"name": "hetlora", "prune_penalty": -1}},
            "prune_penalty: should be greater than or equal to 0",
        ),
        (
            {"algorithm": {"name": "lora-fair", "penalty": -1}},
            "algorithm.penalty: should be greater than or equal to 0",
        ),
        ({"algorithm": {"name": "lora-fair", "steps": 3}}, "there is no key 'steps' here"),
        ({"algorithm": {"name": "lora-fair-sgd", "lr": 0}}, "algorithm.lr: should be greater than 0"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny_folder: Path, changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load(tree(tiny_folder, **changes))


def _watched(work: Any, see: Any = None) -> list[Fitted]:
    """Run `work` and return what left the trainer."""
    seen: list[Fitted] = []
    real = fit.fit

    def noted(bench: Any, jobs: Any) -> list[Fitted]:
        for job in jobs:
            if see is not None:
                see(job.effect)
        done = real(bench, jobs)
        seen.extend(done)
        return done

    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(effects.fit, "fit", noted)
        work()
    return seen


RECIPES = ["ffa-lora", "rolora", "fedsa-lora", "flexlora", "hetlora", "flora", "fedex", "lora-fair", "lora-fair-sgd"]


@pytest.mark.parametrize("name", [*RECIPES, "hlora", "fedsvd"])
def test_the_shipped_recipe_runs(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    texts = ["rounds=1", "trainer.batch=2", "trainer.steps=1", "runtime.threads=1", "data.max_tokens=2000"]
    texts += ["data.source.rows_per_category=6", "evaluate.1.items_per_category=1", "evaluate.1.max_new_tokens=2"]
    result = fedloom.run(name, *texts, out=tmp_path / "r", model={"name": str(tiny_folder), **MODEL})
    assert result.recipe.algorithm.part_name == name
    assert result.summary["participations"] == 4


@pytest.mark.parametrize(
    ("name", "shares", "down", "up"),
    [
        ("ffa-lora", {"B"}, 1.0, 1.0),
        ("rolora", {"A", "B"}, 1.0, 1.0),
        ("fedsa-lora", {"A"}, 1.0, 1.0),
        ("hetlora", {"A", "B"}, 2.0, 2.0),
        ("lora-fair", {"A", "B"}, 2.0, 2.0),
        ("lora-fair-sgd", {"A", "B"}, 2.0, 2.0),
        ("hlora", {"A", "B"}, 2.0, 2.0),
        ("fedsvd", {"A", "B"}, 2.0, 1.0),
    ],
)
def test_the_table_of_algorithms_tells_what_travels(name: str, shares: set[str], down: float, up: float) -> None:
    """In units of one factor of a square layer of 64 and rank 8."""
    from fedloom.algorithms import Algorithm
    from fedloom.survey import survey, toy_shapes

    kind = Algorithm.known[name]
    assert issubclass(kind, Algorithm)
    found = survey(kind(), recipes.Recipe(), ["client-1", "client-2"], toy_shapes())
    assert found.shares["params"] == shares
    assert (found.down, found.up) == (down * 4 * 8 * 64, up * 4 * 8 * 64)
    assert found.paper
    assert found.keeps == {"rolora": {"frozen": {"A", "B"}}, "fedsa-lora": {"own_b": {"B"}}}.get(name, {})
