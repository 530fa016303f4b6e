"""Laws between algorithms: neutral settings and degenerate federations are the same computation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers import adapter, lines, run, same

from fedloom.client.peft_files import load_peft


def test_fedprox_without_pull_is_fedavg(tiny_folder: Path, tmp_path: Path) -> None:
    plain = run(tiny_folder, tmp_path / "a")
    prox = run(tiny_folder, tmp_path / "b", algorithm={"name": "fedprox", "mu": 0})
    assert same(adapter(plain), adapter(prox))


def test_fedprox_pulls(tiny_folder: Path, tmp_path: Path) -> None:
    plain = run(tiny_folder, tmp_path / "a", rounds=1)
    prox = run(tiny_folder, tmp_path / "b", rounds=1, algorithm={"name": "fedprox", "mu": 1000.0})
    start = load_peft(tmp_path / "a" / "adapter")
    assert not same(adapter(plain), adapter(prox))
    norm = lambda a: sum(float(t.square().sum()) for n, t in a.items() if "lora_B" in n)
    assert norm(adapter(prox)) < norm(adapter(plain))
    assert start


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_one_client_is_local_training(tiny_folder: Path, tmp_path: Path, dtype: str) -> None:
    changes = {"model": {"dtype": dtype}, "data": {"clients": 1, "partition": "iid"}, "rounds": 3}
    federated = run(tiny_folder, tmp_path / "a", **changes)
    local = run(tiny_folder, tmp_path / "b", algorithm="local", **changes)
    alone = load_file(local.folder / "adapters" / "client-1" / "local" / "adapter_model.safetensors")
    assert same(adapter(federated), alone)
    assert not (local.folder / "adapter").exists()
    assert local.summary["bytes_up"] == local.summary["bytes_down"] == 0


def test_one_client_is_centralized(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"data": {"clients": 1, "partition": "iid"}}
    federated = run(tiny_folder, tmp_path / "a", **changes)
    central = run(tiny_folder, tmp_path / "b", algorithm="centralized", **changes)
    # the two draw their rows from streams of other clients' names, so only their budgets are equal
    assert federated.summary["samples"] == central.summary["samples"]


def test_identical_clients_scaffold_is_fedavg(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {
        "data": {"clients": 1, "partition": "iid"},
        "trainer": {"optimizer": "sgd", "clip_norm": None, "lr": 0.05},
        "model": {"dtype": "fp64"},
        "rounds": 3,
    }
    plain = run(tiny_folder, tmp_path / "a", algorithm={"name": "fedavg", "weighting": "uniform"}, **changes)
    scaffold = run(tiny_folder, tmp_path / "b", algorithm="scaffold", **changes)
    a, b = adapter(plain), adapter(scaffold)
    for name in a:  # with one client c_k = c, so the correction is zero in every round
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-14)


def test_scaffold_mean_of_controls_is_the_servers(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"trainer": {"optimizer": "sgd", "clip_norm": None}, "model": {"dtype": "fp64"}, "rounds": 3}
    result = run(tiny_folder, tmp_path / "a", "sampler.count=2", algorithm="scaffold", **changes)
    folder = result.folder
    server = load_file(folder / "checkpoints" / "latest" / "state.safetensors")
    controls = {n.removeprefix("slot:control/"): t for n, t in server.items() if n.startswith("slot:control/")}
    total = {n: torch.zeros_like(t) for n, t in controls.items()}
    for client in (folder / "memories").iterdir():
        if client.is_dir():
            newest = max(client.glob("*.safetensors"), key=lambda p: int(p.stem))
            for name, t in load_file(newest).items():
                total[name.removeprefix("control/")] += t
    for name, c in controls.items():
        torch.testing.assert_close(total[name] / 3, c, rtol=0, atol=1e-12)
    assert any(float(c.abs().max()) > 0 for c in controls.values())


def test_private_tensors_never_travel(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloom.runtime import engine

    sent: list[set[str]] = []
    real = engine.codec.encode
    monkeypatch.setattr(engine.codec, "encode", lambda groups: sent.append(set(groups)) or real(groups))
    run(tiny_folder, tmp_path / "a", algorithm="local", evaluate=[])
    assert all(groups <= {"adapter"} or groups == {"params"} for groups in sent)
    result = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert result["bytes_up"] == 0


def test_bytes_are_the_length_of_the_encoded_messages(tiny_folder: Path, tmp_path: Path) -> None:
    from fedloom.types import Bundle
    from fedloom.wire import codec

    result = run(tiny_folder, tmp_path / "a", rounds=1)
    state = codec.read(tmp_path / "a" / "checkpoints" / "0" / "state.safetensors")
    size = len(codec.encode({"params": Bundle(state["params"].tensors)}))
    assert result.summary["bytes_down"] == 3 * size
    assert result.summary["bytes_up"] == 3 * size


def test_weights_are_true_example_counts(tiny_folder: Path, tmp_path: Path) -> None:
    """A client's weight is the number of its rows, whatever the number of rows that it trained on."""
    data = {"partition": {"name": "quantity", "exponent": 1.0}}
    result = run(tiny_folder, tmp_path / "a", rounds=1, data=data)
    split = json.loads((result.folder / "split.json").read_text())
    sizes = [len(split[f"client-{i}"]["train"]) for i in (1, 2, 3)]
    assert len(set(sizes)) > 1
    uniform = run(tiny_folder, tmp_path / "b", rounds=1, data=data, algorithm={"weighting": "uniform"})
    assert not same(adapter(result), adapter(uniform))


def test_local_takes_the_federations_tokens_and_centralized_as_many(tiny_folder: Path, tmp_path: Path) -> None:
    result = run(tiny_folder, tmp_path / "a", rounds=4, compare=["local", "centralized"])
    tokens = {
        name: json.loads((result.folder / "regimes" / name / "summary.json").read_text())["trained_tokens"]
        for name in ("local", "centralized")
    }
    assert tokens["local"] == result.summary["trained_tokens"]
    longest_step = 2 * 60
    assert abs(tokens["centralized"] - result.summary["trained_tokens"]) <= longest_step
    assert set(result.metrics) == {"base", "federated", "local", "centralized"}


def test_equal_rounds_budget(tiny_folder: Path, tmp_path: Path) -> None:
    result = run(tiny_folder, tmp_path / "a", compare=["centralized"], budget="equal_rounds")
    other = json.loads((result.folder / "regimes" / "centralized" / "summary.json").read_text())
    assert other["samples"] == 2 * 2 * 2  # rounds x steps x batch, of one participant


def test_frozen_weights_stay(tiny_folder: Path, tmp_path: Path) -> None:
    from tests.helpers import tree

    from fedloom import recipe as recipes
    from fedloom.assets import prepare
    from fedloom.tracking import Sink
    from fedloom.world import World

    recipe = recipes.load(tree(tiny_folder)).resolved()
    assets = prepare(recipe, Sink())
    before = {n: p.clone() for n, p in assets.loaded.model.named_parameters() if "lora_" not in n}
    world = World(recipe, tmp_path, assets, Sink())
    state = recipe.algorithm.init(assets.initial)
    world.engine.round(world.crew, state, world.clients)
    for name, p in assets.loaded.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name]), name


def test_metrics_lines_have_the_public_form(tiny_folder: Path, tmp_path: Path) -> None:
    result = run(tiny_folder, tmp_path / "a")
    found = lines(result.folder / "metrics.jsonl")
    assert all(set(line) == {"round", "client", "name", "value", "time"} for line in found)
    names = {line["name"] for line in found}
    assert {"train_loss", "loss", "bytes_up", "validation/federated/loss/loss", "test/base/loss/perplexity"} <= names
