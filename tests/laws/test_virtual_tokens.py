"""Virtual tokens in whole runs: the laws of federations, what crosses the wire, and what a run leaves behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.cli.test_verbs import call, refused
from tests.helpers import MODEL, adapter, lines, same, tree
from tests.messages import Passed, payload, watched
from tests.tiny import tiny_model, tiny_model_folder
from transformers import GPT2Config, GPT2LMHeadModel

import fedloom
from fedloom import tensors
from fedloom.client.p_tuning import FILE
from fedloom.client.virtual import EMBEDDINGS
from fedloom.recipe import load, shipped
from fedloom.types import RecipeError
from fedloom.wire import codec

M, WIDTH, HIDDEN = 4, 32, 12
LAYERS, KEY_HEADS, HEAD = 2, 2, 8
KINDS: dict[str, dict[str, Any]] = {
    "prompt": {"name": "prompt-tuning", "tokens": M},
    "prefix": {"name": "prefix-tuning", "tokens": M},
    "encoder": {"name": "p-tuning", "tokens": M, "hidden": HIDDEN},
    "embeddings": {"name": "p-tuning", "tokens": M, "hidden": HIDDEN, "share": "embeddings"},
}
NUMBERS = {
    "prompt": M * WIDTH,
    "prefix": M * 2 * LAYERS * KEY_HEADS * HEAD,
    "encoder": M * WIDTH + (HIDDEN * WIDTH + HIDDEN) + (HIDDEN * HIDDEN + HIDDEN) + (WIDTH * HIDDEN + WIDTH),
    "embeddings": M * WIDTH,
}
each = pytest.mark.parametrize("kind", KINDS)
ASK = ("--prompt", "Sort: 3, 1, 2.", "--max-new-tokens", "6")


def go(folder: Path, out: Path, kind: str, *texts: str, **changes: Any) -> fedloom.Result:
    """Run the usual small recipe with an adapter of that kind."""
    recipe = {**tree(folder, **changes), "adapter": KINDS[kind]}
    return fedloom.run(recipe, *texts, out=out)


@pytest.fixture(scope="module", params=KINDS)
def finished(
    request: Any, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[Passed]]:
    """A kind, its run of two rounds, and what crossed the wire."""
    out = tmp_path_factory.mktemp(request.param) / "r"
    with watched() as seen:
        go(tiny_folder, out, request.param)
    return request.param, out, seen


Finished = tuple[str, Path, list[Passed]]


def test_only_virtual_tokens_are_sent_and_they_cost_what_the_formula_says(finished: Finished) -> None:
    kind, folder, seen = finished
    up = 0
    for one in seen:
        assert set(one.up.groups) == {"params"}
        names = set(one.up.groups["params"].tensors)
        assert names == {EMBEDDINGS} if kind != "encoder" else all(name.startswith("prompt_encoder.") for name in names)
        for message in (one.up, one.down):
            data = codec.encode(message.groups)
            header = 8 + int.from_bytes(data[:8], "little")
            assert len(data) - header == 4 * NUMBERS[kind] == payload(message)
        up += len(codec.encode(one.up.groups))
    told = [
        line["value"]
        for line in lines(folder / "metrics.jsonl")
        if line["name"] == "bytes_up" and line["client"] is None
    ]
    assert sum(told) == up


def test_a_resumed_run_is_the_straight_one(finished: Finished, tiny_folder: Path, tmp_path: Path) -> None:
    kind, folder, _ = finished
    go(tiny_folder, tmp_path / "r", kind, "rounds=1")
    fedloom.resume(tmp_path / "r", ["rounds=2"])
    assert same(adapter(folder), adapter(tmp_path / "r"))


def test_fedprox_without_pull_is_fedavg(finished: Finished, tiny_folder: Path, tmp_path: Path) -> None:
    kind, folder, _ = finished
    go(tiny_folder, tmp_path / "a", kind, algorithm={"name": "fedprox", "mu": 0})
    assert same(adapter(folder), adapter(tmp_path / "a"))


def test_the_reference_agrees(finished: Finished, tiny_folder: Path, tmp_path: Path) -> None:
    kind, folder, _ = finished
    go(tiny_folder, tmp_path / "a", kind, "runtime.reference=true")
    found = adapter(tmp_path / "a")
    assert max(float((t - found[n]).abs().max()) for n, t in adapter(folder).items()) < 2e-3


@each
def test_one_client_is_local_training(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    changes = {"data": {"clients": 1, "partition": "iid"}}
    federated = go(tiny_folder, tmp_path / "a", kind, **changes)
    local = go(tiny_folder, tmp_path / "b", kind, algorithm="local", **changes)
    place = Path("adapters") / "client-1" / "local"
    assert same(adapter(federated), load_file(local.folder / place / "adapter_model.safetensors"))
    assert local.summary["bytes_up"] == 0
    if kind == "encoder":
        assert same(load_file(federated.folder / "adapter" / FILE), load_file(local.folder / place / FILE))


@each
def test_server_optimisers_and_rules_take_them(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    server = {"optimizer": "fedadam", "lr": 0.01, "aggregator": "median"}
    result = go(tiny_folder, tmp_path / "a", kind, server=server)
    assert result.summary["rejected"] == 0
    assert all(t.isfinite().all() for t in adapter(result).values())


@pytest.mark.parametrize("kind", ["prompt", "prefix", "encoder"])
def test_scaffold_corrects_them(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    trainer = {"optimizer": "sgd", "clip_norm": None, "lr": 0.05}
    with watched() as seen:
        result = go(tiny_folder, tmp_path / "a", kind, trainer=trainer, algorithm="scaffold")
    assert result.summary["rejected"] == 0
    assert tensors.norm(seen[-1].up.groups["control"].tensors) > 0


def test_scaffold_with_an_encoder_in_its_way_is_refused(tiny_folder: Path) -> None:
    recipe = {**tree(tiny_folder, algorithm="scaffold", trainer={"optimizer": "sgd"}), "adapter": KINDS["embeddings"]}
    with pytest.raises(RecipeError, match=r"set adapter\.share=encoder"):
        load(recipe)


@pytest.mark.parametrize("kind", ["prompt", "encoder", "embeddings"])
def test_layers_that_were_cut_are_not_gone_through_twice(tiny_folder: Path, kind: str) -> None:
    runtime = {"name": "processes", "workers": 2, "shard": 2}
    with pytest.raises(RecipeError, match=r"set runtime\.shard=1, or adapter=prefix-tuning"):
        load({**tree(tiny_folder, runtime=runtime), "adapter": KINDS[kind]})
    load({**tree(tiny_folder, runtime=runtime), "adapter": KINDS["prefix"]})


@pytest.mark.parametrize("algorithm", ["flora", "fedex", "ffa-lora", "fedsa-lora", "flexlora", "hetlora", "fed-sb"])
def test_methods_for_lora_factors_are_refused(tiny_folder: Path, algorithm: str) -> None:
    with pytest.raises(RecipeError, match="prompt-tuning"):
        load({**tree(tiny_folder, algorithm=algorithm), "adapter": KINDS["prompt"]})


@each
def test_a_quantised_base_in_half_precision(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    base = ("model.quantize=int8", "model.dtype=bf16", "trainer.checkpointing=true")
    result = go(tiny_folder, tmp_path / "a", kind, "rounds=1", *base)
    assert result.summary["rejected"] == 0
    assert {t.dtype for t in adapter(result).values()} == {torch.float32}
    assert math.isfinite(result.metrics["federated"]["loss"]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefix", "embeddings"])
def test_workers_train_the_same(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    alone = go(tiny_folder, tmp_path / "a", kind, "runtime.cohort=1", "rounds=1")
    workers = {"name": "processes", "workers": 1, "cohort": 1, "threads": 1}
    go(tiny_folder, tmp_path / "b", kind, "rounds=1", runtime=workers)
    assert same(adapter(alone), adapter(tmp_path / "b"))


def test_a_run_starts_from_its_own_adapter(finished: Finished, tiny_folder: Path, tmp_path: Path) -> None:
    kind, folder, _ = finished
    with watched() as seen:
        go(tiny_folder, tmp_path / "a", kind, "rounds=1", init=str(folder / "adapter"))
    started = seen[0].down.groups["params"].tensors
    assert same(
        dict(started), load_file(folder / "adapter" / (FILE if kind == "encoder" else "adapter_model.safetensors"))
    )


def test_peft_answers_as_chat_does(finished: Finished, tiny_folder: Path) -> None:
    _, folder, _ = finished
    answer = call("chat", folder, *ASK).stdout
    assert answer == call("chat", folder, "--adapter", folder / "adapter", *ASK).stdout
    bare = call("chat", tiny_folder, "--adapter", folder / "adapter", *ASK)  # in the machine's own dtype
    assert bare.exit_code == 0, bare.output
    assert call("chat", folder, "--checkpoint", "latest", *ASK).stdout == answer
    loaded = peft.PeftModel.from_pretrained(tiny_model(), folder / "adapter")
    ids = torch.arange(3, 43).view(2, 20)
    recipe = load(folder / "recipe.yaml")
    model = tiny_model()
    recipe.adapter.attach(model).load([recipe.adapter.read(folder / "adapter")])
    torch.testing.assert_close(model(input_ids=ids).logits, loaded(input_ids=ids).logits[:, -20:], rtol=0, atol=1e-4)


def test_verbs_take_the_run(finished: Finished, tmp_path: Path) -> None:
    _, folder, _ = finished
    assert "export with --to adapter" in refused("export", folder, "--to", "merged", "--out", tmp_path / "m")
    assert call("export", folder, "--out", tmp_path / "a").exit_code == 0
    assert same(load_file(tmp_path / "a" / "adapter_model.safetensors"), adapter(folder))
    found = call("eval", folder)
    assert found.exit_code == 0, found.output
    told = call("list", "algorithms", "--recipe", folder / "recipe.yaml")
    assert told.exit_code == 0, told.output
    assert "fedavg" in told.stdout


def test_rows_that_leave_no_room_are_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=272, n_embd=32, n_layer=2, n_head=4, n_positions=160, bos_token_id=1, eos_token_id=2)
    folder = tiny_model_folder(tmp_path / "gpt2")
    GPT2LMHeadModel(config).save_pretrained(folder)
    data = {"max_tokens": 160}
    recipe = {**tree(folder, data=data), "adapter": {"name": "prompt-tuning", "tokens": 150}}
    with pytest.raises(RecipeError, match=r"adapter\.tokens=150 exceeds the 160 positions"):
        fedloom.run(recipe, out=tmp_path / "r")


@pytest.mark.parametrize("name", ["prompt-tuning", "prefix-tuning", "p-tuning"])
def test_their_recipes_run(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    assert name in shipped()
    changes: dict[str, Any] = {
        "model": {"name": str(tiny_folder), **MODEL},
        "data": {"max_tokens": 400, "source": {"rows_per_category": 10}},
        "trainer": {"batch": 2, "steps": 1},
        "runtime": {"threads": 1},
        "evaluate": ["loss"],
    }
    result = fedloom.run(name, "rounds=2", out=tmp_path / "r", **changes)
    assert result.summary["rejected"] == 0
    assert result.summary["trainable_parameters"] > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 0}, "greater than or equal to 1|greater than 0"),
        ({"share": "all"}, "encoder"),
        ({"virtual": 3}, "there is no key 'virtual'"),
    ],
)
def test_knobs_out_of_range_are_refused(tiny_folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load({**tree(tiny_folder), "adapter": {"name": "p-tuning", **changes}})
