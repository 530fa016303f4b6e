"""The laws of a federation hold for every kind of adapter that is made of layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.helpers import MODEL, adapter, run, same, tree
from tests.messages import Passed, payload, watched
from tests.tiny import tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import fedloom
from fedloom import recipe as recipes
from fedloom.assets import prepare
from fedloom.checkpoint import Checkpoints
from fedloom.cli.algorithms import misfits, table
from fedloom.cli.main import app
from fedloom.plan import _memory
from fedloom.recipe import shipped
from fedloom.reopen import reopen
from fedloom.survey import shapes_of, survey
from fedloom.tracking import Sink
from fedloom.types import ModelError, RecipeError, Tensors
from fedloom.world import World

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"name": "dora", "r": 2, "alpha": 4},
    "ia3": {"name": "ia3"},
    "ada-lora": {"name": "ada-lora", "r": 3, "target": 2},
    "full": {"name": "full"},
}
LAYERS = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32), "g": (64, 32), "u": (64, 32), "d": (32, 64)}
"""(d_out, d_in) of the linear layers of one of the tiny model's two decoder layers."""
SIZES = {
    "dora": 2 * sum(2 * (o + i) + o for o, i in LAYERS.values()),
    "ia3": 2 * (16 + 16 + 64),
    "ada-lora": 2 * sum(3 * (o + i + 1) for o, i in LAYERS.values()),
    "full": 2 * (sum(o * i for o, i in LAYERS.values()) + 2 * 32) + 32 + 272 * 32,
}
"""Numbers in a message, from the formulas of each part."""
IDS = torch.arange(3, 43).view(2, 20)


@dataclass(frozen=True)
class Ran:
    kind: str
    result: fedloom.Result
    seen: list[Passed]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return what a run left: its adapter, or the weights of its merged model."""
    whole = folder / "merged" / "model.safetensors"
    return load_file(whole) if whole.is_file() else adapter(folder)


def _state(result: fedloom.Result, round_: int = 2) -> Tensors:
    return Checkpoints(result.folder / "checkpoints", 9).load(round_)[0].params


@pytest.fixture(scope="module", params=KINDS)
def ran(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """A finished run in float64, one client after another, with what crossed the wire."""
    place = tmp_path_factory.mktemp(request.param) / "a"
    with watched() as seen:
        result = run(tiny_folder, place, **_changes(request.param), runtime={"cohort": 1}, checkpoint={"keep": 9})
    yield Ran(request.param, result, seen)


def _changes(kind: str, dtype: str = "fp64") -> dict[str, Any]:
    return {"model": {"dtype": dtype}, "adapter": KINDS[kind]}


def test_it_learns_and_the_base_is_measured_untouched(ran: Ran) -> None:
    found = ran.result.metrics
    assert found["federated"]["loss"]["loss"] < found["base"]["loss"]["loss"]
    again = json.loads(CliRunner().invoke(app, ["eval", str(ran.result.folder), "--json"]).stdout)
    for regime in ("base", "federated"):
        assert again[regime]["loss"]["loss"] == pytest.approx(found[regime]["loss"]["loss"], abs=1e-12)


def test_tensors_on_the_wire_are_the_formulas(ran: Ran, tiny_folder: Path) -> None:
    assert {payload(message) for one in ran.seen for message in (one.up, one.down)} == {8 * SIZES[ran.kind]}
    assert ran.result.summary["trainable_parameters"] == SIZES[ran.kind]
    recipe = recipes.load(tree(tiny_folder, **_changes(ran.kind)))
    clients = ["client-1", "client-2", "client-3"]
    found = survey(recipe.algorithm, recipe, clients, shapes_of(recipe, clients))
    assert found.up == found.down == pytest.approx(8 * SIZES[ran.kind])
    rows = {row[0]: row for row in table(recipe)[1]}
    assert rows.keys() >= {"fedavg", "fedprox", "scaffold", "local"}
    assert "flora" not in rows
    told = dict(misfits(recipe))
    for name in ("flora", "fedex", "flexlora", "ffa-lora", "fedsa-lora", "rolora", "hetlora"):
        assert f"works on LoRA factors, which adapter={ran.kind} has not; set adapter=lora" in told[name]


def test_a_cohort_equals_one_by_one(ran: Ran, tiny_folder: Path, tmp_path: Path) -> None:
    if ran.kind == "full":
        with pytest.raises(RecipeError, match=r"runtime.cohort=3: adapter=full has no layers for several clients"):
            run(tiny_folder, tmp_path / "b", **_changes("full"), runtime={"cohort": 3})
        return
    together = run(tiny_folder, tmp_path / "b", **_changes(ran.kind), runtime={"cohort": 3}, evaluate=["loss"])
    one, other = _state(ran.result), _state(together)
    for name, t in one.items():
        torch.testing.assert_close(other[name], t, rtol=0, atol=1e-10)


def test_without_pull_fedprox_is_fedavg(ran: Ran, tiny_folder: Path, tmp_path: Path) -> None:
    prox = {"name": "fedprox", "mu": 0}
    other = run(tiny_folder, tmp_path / "b", **_changes(ran.kind), algorithm=prox, runtime={"cohort": 1}, evaluate=[])
    assert same(_tensors(ran.result.folder), _tensors(other.folder))


def test_the_result_can_be_taken_up(ran: Ran, tiny_folder: Path, tmp_path: Path) -> None:
    """Exported, merged, by a chat, as the start of another run, and by name: always the same logits."""
    folder = ran.result.folder
    with torch.no_grad():
        opened = reopen(folder)
        expected = opened.loaded.model(input_ids=IDS).logits
        assert (
            CliRunner().invoke(app, ["export", str(folder), "--to", "merged", "--out", str(tmp_path / "m")]).exit_code
            == 0
        )
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=0, atol=1e-10)
    assert not torch.equal(expected, tiny_model(torch.float64)(input_ids=IDS).logits)
    own = folder / ("merged" if ran.kind == "full" else "adapter")
    recipe = recipes.load(tree(tiny_folder, **_changes(ran.kind), init=str(own)))
    assert same(dict(prepare(recipe.resolved(), Sink()).initial), dict(_state(ran.result)))
    told = CliRunner().invoke(app, ["chat", str(folder), "--prompt", "Hi", "--max-new-tokens", "3"])
    assert told.exit_code == 0, told.exception
    if ran.kind == "full":
        assert not (folder / "adapter").exists()
        refused = CliRunner().invoke(app, ["export", str(folder), "--out", str(tmp_path / "p")]).exception
        assert isinstance(refused, ModelError)
        assert "export with --to merged" in str(refused)
        return
    named = json.loads(CliRunner().invoke(app, ["eval", str(folder), "--adapter", str(own), "--json"]).stdout)
    assert named["adapter"]["loss"]["loss"] == pytest.approx(ran.result.metrics["federated"]["loss"]["loss"], abs=1e-12)
    words = ["chat", str(tiny_folder), "--adapter", str(own), "--prompt", "Hi", "--max-new-tokens", "3"]
    assert CliRunner().invoke(app, words).exit_code == 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_client_is_local_training(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    part = {**KINDS[kind], "target": 3} if kind == "ada-lora" else KINDS[kind]
    changes: dict[str, Any] = {"adapter": part, "data": {"clients": 1, "partition": "iid"}, "evaluate": []}
    federated = run(tiny_folder, tmp_path / "a", **changes)
    local = run(tiny_folder, tmp_path / "b", algorithm="local", **changes)
    (alone,) = (local.folder / "adapters" / "client-1" / "local").glob("*.safetensors")
    assert same(_tensors(federated.folder), load_file(alone))
    assert local.summary["bytes_up"] == 0
    opened = reopen(local.folder, client="client-1")
    assert same(dict(opened.params), dict(reopen(federated.folder).params))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_straight_one(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    """With moments at the server, dropout where there is some, and a cohort that is drawn."""
    drops = {} if kind in {"ia3", "full"} else {"dropout": 0.2}
    more: dict[str, Any] = {"server": {"optimizer": "fedadam", "lr": 0.01}, "sampler": {"count": 2}}
    changes = {**_changes(kind, "fp32"), **more, "adapter": {**KINDS[kind], **drops}, "rounds": 3, "evaluate": ["loss"]}
    changes["trainer"] = {"steps": 1}
    whole = run(tiny_folder, tmp_path / "a", **changes)

    class Stop(Sink):
        def on(self, event: Any) -> None:
            if isinstance(event, fedloom.tracking.RoundReport) and event.round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedloom.run(tree(tiny_folder, **changes), out=tmp_path / "b", sink=Stop())
    longer = fedloom.resume(tmp_path / "b")
    for key in ("adapter_sha256", "metrics", "trained_tokens"):
        assert longer.summary[key] == whole.summary[key], key
    assert len(longer.summary["adapter_sha256"]) == 64


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_scaffold_fedprox_and_a_robust_rule_run(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    sgd = {"optimizer": "sgd", "clip_norm": None, "lr": 0.01, "steps": 2}
    plain = run(tiny_folder, tmp_path / "a", **_changes(kind), trainer=sgd, evaluate=[])
    for i, changes in enumerate(
        ({"algorithm": "scaffold"}, {"algorithm": {"name": "fedprox", "mu": 1.0}}, {"server": {"aggregator": "median"}})
    ):
        other = run(tiny_folder, tmp_path / str(i), **_changes(kind), trainer=sgd, evaluate=[], **changes)
        assert not same(_tensors(plain.folder), _tensors(other.folder))
        assert other.summary["rejected"] == 0


def test_a_client_alone_in_full_is_a_plain_loop(tiny_folder: Path, tmp_path: Path) -> None:
    """In fp64, a loop that knows nothing of federations ends in the same weights: tied embeddings, norms and all."""
    changes: dict[str, Any] = {"model": {"dtype": "fp64"}, "data": {"clients": 1, "partition": "iid"}, "evaluate": []}
    changes["trainer"] = {"batch": 64, "packing": False, "lr": 1e-3}
    result = run(tiny_folder, tmp_path / "a", adapter="full", rounds=1, **changes)
    recipe = result.recipe
    rows = World(recipe, tmp_path, prepare(recipe, Sink()), Sink()).rows("client-1")
    model = tiny_model(torch.float64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        total, count = torch.zeros((), dtype=torch.float64), 0
        for i in range(len(rows)):
            ids, train = rows[i].ids, rows[i].train
            logits = model(input_ids=ids[None]).logits[0, :-1][train[1:]]
            total = total + torch.nn.functional.cross_entropy(logits, ids[1:][train[1:]], reduction="sum")
            count += int(train[1:].sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    found = _tensors(result.folder)
    for name, p in model.named_parameters():
        # transformers computes norms in float32
        torch.testing.assert_close(found[name], p.detach(), rtol=0, atol=2e-6)
        assert not torch.equal(found[name], tiny_model(torch.float64).state_dict()[name])


def test_full_in_bf16_with_packed_rows_and_checkpointing(tiny_folder: Path, tmp_path: Path) -> None:
    small = {"steps": 6, "lr": 1e-3}
    losses = []
    for i, more in enumerate(({}, {"checkpointing": True}, {"packing": False, "micro_tokens": 64})):
        changes = {"model": {"dtype": "bf16"}, "adapter": "full", "trainer": {**small, **more}}
        result = run(tiny_folder, tmp_path / str(i), **changes, evaluate=["loss"], rounds=1)
        losses.append(result.metrics["federated"]["loss"]["loss"])
        assert losses[-1] < result.metrics["base"]["loss"]["loss"] - 0.01
        assert {t.dtype for t in _state(result, 1).values()} == {torch.float32}
        assert {t.dtype for t in _tensors(result.folder).values()} == {torch.bfloat16}
    assert max(losses) - min(losses) < 5e-3


def test_the_plan_tells_the_memory_of_all_weights(tiny_folder: Path, tmp_path: Path) -> None:
    found = []
    for name in ("full", "ia3"):
        recipe = recipes.load(tree(tiny_folder, adapter=name)).resolved()
        found.append(World(recipe, tmp_path / name, prepare(recipe, Sink()), Sink()))
    from fedloom.outcome import peak_rss

    moments = _memory(found[0]) - peak_rss()
    assert moments == 3 * 4 * SIZES["full"] > 100 * (_memory(found[1]) - peak_rss())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "full", "model": {"quantize": "int8"}}, "full trains every weight, and model.quantize=int8 keeps"),
        ({"adapter": "full", "model": {"compile": True}}, "new weights in every pass; set model.compile=false"),
        (
            {"adapter": "full", "runtime": {"name": "processes", "workers": 2, "shard": 2}},
            "which runtime.shard cuts; set runtime.shard=1",
        ),
        ({"adapter": "dora", "algorithm": "flora"}, "works on LoRA factors, which adapter=dora has not"),
        ({"adapter": "ia3", "algorithm": {"name": "fed-sb", "start": "random"}}, "which adapter=ia3 has not"),
        ({"adapter": {"name": "ia3", "targets": ["q_proj"]}}, "belong together: set both"),
        (
            {"adapter": {"name": "ia3", "targets": ["down_proj"], "feedforward": ["down_prj"]}},
            "feedforward names 'down_prj', which is not in adapter.targets; did you mean 'down_proj'",
        ),
        ({"adapter": {"name": "ia3", "r": 4}}, "there is no key 'r' here"),
        ({"adapter": {"name": "rslora", "rslora": False}}, "rslora"),
        ({"adapter": "adalora"}, "no adapter named 'adalora'; did you mean 'ada-lora'"),
        (
            {"adapter": "dora", "server": {"aggregator": {"name": "krum", "distance": "product"}}},
            "distance=product compares products of LoRA factors, which adapter=dora has not",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        run(tiny_folder, tmp_path / "a", **changes)


@pytest.mark.parametrize("name", KINDS)
def test_two_rounds_of_the_shipped_recipe(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    written = yaml.safe_load(shipped()[name])
    assert recipes.load(name).adapter.part_name == name
    small = {"trainer": {"batch": 2, "steps": 1}, "runtime": {"threads": 1}, "evaluate": ["loss"]}
    data = {"max_tokens": 2000, "source": {"rows_per_category": 10}}
    changes: dict[str, Any] = {"model": {"name": str(tiny_folder), **MODEL}, "data": data, **small}
    result = fedloom.run(name, "rounds=2", "checkpoint.keep=1", out=tmp_path / "r", **changes)
    assert result.summary["rejected"] == 0
    assert result.recipe.trainer.lr == float(written["trainer"]["lr"])
    assert result.metrics["federated"]["loss"]["loss"] < result.metrics["base"]["loss"]["loss"]


def test_rslora_runs_as_lora_with_the_flag(tiny_folder: Path, tmp_path: Path) -> None:
    one = run(tiny_folder, tmp_path / "a", adapter={"name": "rslora", "r": 4, "alpha": 4}, evaluate=[])
    other = run(tiny_folder, tmp_path / "b", adapter={"name": "lora", "r": 4, "rslora": True}, evaluate=[])
    assert same(adapter(one), adapter(other))
    told = json.loads((one.folder / "adapter" / "adapter_config.json").read_text())
    assert told["use_rslora"] is True
    flora = run(tiny_folder, tmp_path / "c", adapter={"name": "rslora", "r": 2}, algorithm="flora", evaluate=[])
    assert flora.summary["rejected"] == 0
