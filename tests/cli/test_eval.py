"""`fedloom eval` and its kin: on the right base model only, without a chat template, and with metrics that are null."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import peft
import pytest
from tests.cli.test_verbs import call, refused
from tests.helpers import run as run_recipe
from tests.tiny import tiny_model, tiny_model_folder, tiny_tokenizer

import fedloom
from fedloom.client.identity import FILE
from fedloom.evaluate.base import Evaluation
from fedloom.evaluate.loss import Loss
from fedloom.types import ModelError

UNITS = "evaluate=[{name: tasks, items_per_category: 2, categories: [units], max_new_tokens: 2}]"
LIKELY = "evaluate=[{name: truthfulqa, limit: 2}]"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the shapes of `tiny_folder` with other weights."""
    return tiny_model_folder(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def strange(other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on that model."""
    return run_recipe(other, tmp_path_factory.mktemp("runs") / "r", rounds=1, evaluate=[]).folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has no chat template."""
    folder = tmp_path_factory.mktemp("bare")
    tiny_model().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_of_another_model_is_refused(tiny_folder: Path, strange: Path, tmp_path: Path) -> None:
    own = run_recipe(tiny_folder, tmp_path / "own", rounds=1, evaluate=[]).folder
    adapter = strange / "adapter"
    assert "their weights differ" in refused("eval", own, "--adapter", adapter, UNITS)
    assert "their weights differ" in refused("eval", tiny_folder, "--adapter", adapter, UNITS)
    assert "their weights differ" in refused("chat", tiny_folder, "--adapter", adapter, "--prompt", "x")
    assert "their weights differ" in refused("chat", own, "--adapter", adapter, "--prompt", "x")
    with pytest.raises(ModelError, match="their weights differ"):
        run_recipe(tiny_folder, tmp_path / "r", init=str(adapter), rounds=1, evaluate=[])
    exported = tmp_path / "exported"
    assert call("export", strange, "--out", exported).exit_code == 0
    assert "their weights differ" in refused("eval", tiny_folder, "--adapter", exported, UNITS)
    assert peft.PeftModel.from_pretrained(tiny_model(seed=1), str(exported))
    assert call("eval", exported, UNITS).exit_code == 0


def test_a_run_whose_model_was_replaced_is_refused(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model")
    run = run_recipe(model, tmp_path / "r", rounds=1, evaluate=["loss"]).folder
    alone = run_recipe(model, tmp_path / "alone", rounds=1, algorithm="local", evaluate=["loss"]).folder
    tiny_model(seed=1).save_pretrained(model)
    for folder in (run, alone):
        assert "their weights differ" in refused("eval", folder)
        assert "their weights differ" in refused("eval", folder, "--checkpoint", "latest")
        with pytest.raises(ModelError, match="their weights differ"):
            fedloom.resume(folder, ["rounds=2"])
    assert "their weights differ" in refused("eval", run / "adapter", UNITS)
    assert "their weights differ" in refused("chat", run, "--prompt", "x")
    assert "their weights differ" in refused("chat", alone, "--client", "client-1", "--prompt", "x")
    assert "their weights differ" in refused("export", run, "--to", "merged", "--out", tmp_path / "merged")
    personal = alone / "adapters" / "client-1" / "local"
    assert "their weights differ" in refused("eval", model, "--adapter", personal, UNITS)


def test_what_cannot_be_checked_is_told(tiny_folder: Path, strange: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(strange / "adapter", foreign)
    (foreign / FILE).unlink()
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/away"}))
    for words in (("eval", UNITS), ("chat", "--prompt", "x", "--max-new-tokens", 1)):
        ran = call(words[0], tiny_folder, "--adapter", foreign, *words[1:])
        assert ran.exit_code == 0
        assert "so nothing shows whether that is" in " ".join(ran.stderr.split())


def test_a_model_without_a_chat_template(bare: Path, strange: Path, tmp_path: Path) -> None:
    assert "data.template=alpaca" in refused("eval", bare, UNITS)
    ran = call(
        "eval", bare, UNITS, "data.template=alpaca", "data.system=Be brief.", "--out", tmp_path / "out", "--json"
    )
    assert json.loads(ran.stdout)["base"]["tasks"]
    prompt = json.loads((tmp_path / "out" / "samples" / "tasks.jsonl").read_text().splitlines()[0])["prompt"]
    assert "Be brief.\n\n### Instruction:" in prompt
    words = (UNITS, "data.template=plain", "model.dtype=bf16", "model.quantize=int8", "model.device=cpu")
    assert call("eval", bare, *words, "model.attention=eager", "runtime.threads=1").exit_code == 0
    assert "data.template=alpaca" in refused("eval", bare, UNITS)  # nothing is left of what was set before


@pytest.mark.data
def test_no_chat_template_is_needed_where_nothing_is_rendered(bare: Path) -> None:
    ran = call("eval", bare, LIKELY, "--json")
    assert json.loads(ran.stdout)["base"]["truthfulqa"]


def test_other_keys_are_refused_with_those_that_are_allowed(bare: Path, strange: Path) -> None:
    told = refused("eval", bare, UNITS, "rounds=3")
    assert "data.template" in told
    assert "runtime.threads" in told
    assert "got 'rounds=3'" in told
    assert "name evaluators" in refused("eval", bare, "data.template=plain")
    assert "says the rest" in refused("eval", strange, "data.template=plain")


def test_a_metric_that_does_not_exist_is_null(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loss, "evaluate", lambda self, view: Evaluation({"loss": math.nan, "perplexity": math.inf}))
    run = run_recipe(tiny_folder, tmp_path / "r", rounds=1, evaluate=["loss"])
    assert run.summary["metrics"]["federated"]["loss"]["loss"] is None
    ran = call("eval", run.folder, "--json", "--out", tmp_path / "out")
    assert ran.exit_code == 0
    found = json.loads(ran.stdout, parse_constant=pytest.fail)
    assert found["federated"]["loss"]["loss"] is None
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["metrics"] == found
    assert call("eval", run.folder).exit_code == 0


def test_a_loss_without_rows_was_not_measured(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"splits": {"train": 1, "validation": 0, "test": 0}}
    run = run_recipe(tiny_folder, tmp_path / "r", rounds=1, data=changes, evaluate=["loss"])
    assert run.summary["metrics"]["federated"] == {}
    assert "no client has rows of its own in test" in run.summary["not_run"]["federated"]["loss"]
    ran = call("eval", run.folder, "--out", tmp_path / "out")
    assert ran.exit_code == 4
    assert "no client has rows of its own in test" in ran.output
