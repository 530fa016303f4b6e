"""Every setting of another project's file changes the recipe, or is remarked on; what is written is a valid recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.importing.fs_file import FS, fs, lost
from typer.testing import CliRunner

from fedloom import recipe as recipes
from fedloom.cli.main import app
from fedloom.importing import FORMATS, convert
from fedloom.importing.base import Format, Settings, flatten, peft_targets
from fedloom.types import RecipeError

FLOWER = """
[project]
name = "app"
[tool.flwr.app.config]
model.name = "mistralai/Mistral-7B-v0.3"
model.quantization = 4
model.gradient-checkpointing = true
model.lora.peft-lora-r = 16
model.lora.peft-lora-alpha = 48
train.save-every-round = 5
train.learning-rate-max = 1e-4
train.learning-rate-min = 1e-6
train.seq-length = 300
train.training-arguments.output-dir = ""
train.training-arguments.per-device-train-batch-size = 4
train.training-arguments.gradient-accumulation-steps = 2
train.training-arguments.num-train-epochs = 3
train.training-arguments.max-steps = 7
train.training-arguments.lr-scheduler-type = "constant"
strategy.fraction-fit = 0.2
strategy.fraction-evaluate = 0.0
num-server-rounds = 30
[tool.flwr.app.config.static]
dataset.name = "flwrlabs/medical-meadow-medical-flashcards"
[tool.flwr.federations]
default = "sim"
[tool.flwr.federations.sim]
options.num-supernodes = 25
options.backend.client-resources.num-gpus = 1.0
"""

SCRIPT = r"""
# one run
lr=5e-5   # a remark
lora_r=32
fed_alg="fedprox"
CUDA_VISIBLE_DEVICES=2 python main_sft.py \
 --learning_rate $lr --model_name_or_path "meta-llama/Llama-2-7b-hf" \
 --dataset_name vicgalle/alpaca-gpt4 --dataset_sample 1000 --seq_length 256 \
 --fed_alg $fed_alg --prox_mu=0.1 --num_clients 20 --sample_clients 2 --num_rounds 40 --max_steps 9 \
 --num_train_epochs 3 --batch_size 8 --gradient_accumulation_steps 2 --peft_lora_r ${lora_r} --peft_lora_alpha 64 \
 --use_peft --load_in_8bit --gradient_checkpointing False --seed 7 --output_dir ./o --template "alpaca" \
 --fedopt_tau 0.1 --use_auth_token \
"""


def test_flowertune() -> None:
    found = convert(FLOWER, "pyproject.toml")
    assert found.format == "FlowerTune"
    assert lost(found) == {}
    tree = found.tree
    assert tree["model"] == {"name": "mistralai/Mistral-7B-v0.3", "quantize": "nf4"}
    assert tree["adapter"] == {
        "name": "lora", "r": 16, "alpha": 48, "dropout": 0.075, "targets": ["q_proj", "v_proj"],
    }  # fmt: skip
    assert tree["data"]["source"]["keys"] == {"prompt": "input", "completion": "output"}
    assert (tree["data"]["clients"], tree["data"]["partition"], tree["data"]["max_tokens"]) == (25, "iid", 300)
    trainer = tree["trainer"]
    assert (trainer["lr"], trainer["steps"], trainer["batch"], trainer["accumulate"]) == (1e-4, 7, 4, 2)
    assert trainer["schedule"] == {"name": "cosine", "floor": 0.01}
    assert (tree["sampler"], tree["rounds"], tree["checkpoint"]) == ({"fraction": 0.2}, 30, {"every": 5})
    assert trainer["checkpointing"] is True


def test_flowertune_newer_key_and_epochs() -> None:
    text = FLOWER.replace("fraction-fit", "fraction-train").replace("max-steps = 7", "max-steps = -1")
    tree = convert(text, "p").tree
    assert tree["sampler"] == {"fraction": 0.2}
    assert tree["trainer"]["epochs"] == 3


def test_kinds_of_training_that_have_parts() -> None:
    every = fs(llm__adapter__use=False)
    assert every.tree["adapter"] == {"name": "full"}
    assert "llm.adapter.use" not in lost(every)
    dora = convert(FLOWER.replace("peft-lora-r = 16", "peft-lora-r = 16\nmodel.lora.peft-use-dora = true"), "p")
    assert dora.tree["adapter"]["name"] == "dora"
    assert lost(dora) == {}


def test_openfedllm() -> None:
    found = convert(SCRIPT, "run_sft.sh")
    assert found.format == "OpenFedLLM"
    assert set(lost(found)) == {"use_auth_token"}
    tree = found.tree
    assert tree["model"] == {"name": "meta-llama/Llama-2-7b-hf", "quantize": "int8"}
    assert tree["adapter"]["r"] == 32
    assert tree["data"]["source"] == {"name": "hub", "id": "vicgalle/alpaca-gpt4", "split": "train[:1000]"}
    assert tree["algorithm"] == {"name": "fedprox", "mu": 0.1, "weighting": "examples"}
    trainer = tree["trainer"]
    assert (trainer["lr"], trainer["steps"], trainer["batch"], trainer["accumulate"]) == (5e-5, 9, 8, 2)
    assert trainer["checkpointing"] is False
    assert (tree["sampler"], tree["rounds"], tree["seed"]) == ({"count": 2}, 40, 7)


@pytest.mark.parametrize(
    ("flags", "algorithm", "server"),
    [
        ("--fed_alg fedavg", "fedavg", None),
        ("--fed_alg scaffold", "scaffold", None),
        ("--fed_alg local3", "local", None),
        ("--fed_alg fedavgm --fedopt_beta1 0.8", "fedavg", {"name": "fedavgm-ema", "momentum": 0.8}),
        ("--fed_alg fedyogi --fedopt_tau 0.1", "fedavg", {"name": "fedyogi", "beta1": 0.9, "beta2": 0.99, "tau": 0.1}),
        ("--fed_alg fedadagrad", "fedavg", {"name": "fedadagrad", "beta1": 0.9, "tau": 1e-3}),
    ],
)
def test_openfedllm_algorithms(flags: str, algorithm: str, server: Any) -> None:
    found = convert(f"python main_sft.py {flags} --use_peft", "line")
    assert found.tree["algorithm"]["name"] == algorithm
    assert found.tree.get("server", {}).get("optimizer") == server
    assert lost(found) == {}
    assert found.tree["rounds"] == 500  # its own default


def test_openfedllm_dpo_is_told() -> None:
    from fedloom.client.objectives import Objective

    found = convert("python main_dpo.py --fed_alg fedavg --dpo_beta 0.2 --use_peft", "line")
    if "dpo" in Objective.known:
        assert found.tree["objective"]["name"] == "dpo"
    else:
        assert "no objective 'dpo'" in lost(found)["main_dpo.py"]
        assert "dpo_beta" in lost(found)


OTHERS: Mapping[type, Callable[[Any], Any]] = {
    bool: lambda value: not value,
    int: lambda value: value + 1,
    float: lambda value: value / 2 + 0.001,
    str: lambda value: f"{value}x",
    list: lambda value: [*value[1:], *value[:1]],
}


def values(one: Format) -> Mapping[str, Any]:
    text = {"FS-LLM": yaml.safe_dump(FS), "FlowerTune": FLOWER, "OpenFedLLM": SCRIPT}[one.name]
    found = one.read(text)
    assert found is not None
    return found


def cases() -> Iterator[tuple[Format, str]]:
    for one in FORMATS:
        for key in values(one):
            yield one, key


@pytest.mark.parametrize(("one", "key"), cases(), ids=lambda value: getattr(value, "name", value))
def test_no_setting_passes_unseen(one: Format, key: str) -> None:
    """Changing any single setting changes the recipe, or a remark is made on it."""

    def translated(settings: Mapping[str, Any]) -> tuple[Any, set[str]]:
        box = Settings(settings)
        tree = one.translate(box)
        box.close()
        return tree, {remark.key for remark in (*box.lost, *box.moot, *box.notes)}

    before = values(one)
    other = OTHERS[type(before[key])](before[key])
    if key == "llm.adapter.args":
        other = [{**before[key][0], "r": 2}]
    if key == "data.splitter_args":
        other = [{"alpha": 7.0}]
    tree, _ = translated(before)
    changed_tree, changed_remarks = translated({**before, key: other})
    assert changed_tree != tree or key in changed_remarks


def test_data_root_leads_to_a_file() -> None:
    assert fs(data__root="d", data__type="mine.jsonl@llm").tree["data"]["source"] == "d/mine.jsonl"


@pytest.mark.parametrize("text", [yaml.safe_dump(FS), FLOWER, SCRIPT], ids=["fs", "flower", "openfedllm"])
def test_the_command_writes_a_recipe_that_loads(tmp_path: Path, text: str) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "recipe.yaml"
    source.write_text(text)
    done = CliRunner().invoke(app, ["import", str(source), "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = convert(text, "x")
    assert recipes.load(out) == recipes.load(found.tree)
    written = out.read_text()
    assert f"# Imported from {source} ({found.format})." in written
    for remark in (*found.lost, *found.notes, *found.moot):
        assert f"#   {remark}"[:60] in written
    for remark in found.lost:
        assert f"not translated: {remark.key}=" in done.stderr
    again = CliRunner().invoke(app, ["import", str(source), "--out", str(out)])
    assert "exists" in str(again.exception)
    piped = CliRunner().invoke(app, ["import", "-"], input=text)
    assert yaml.safe_load(piped.stdout) == yaml.safe_load(written)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "hello",
            r"(?s)x: not a file that can be imported; looked for:.*FlowerTune: .*FS-LLM: .*`federate`.*--fed_alg",
        ),
        ("rounds: 3\nseed: 1", "looks like a recipe of fedloom's own"),
        ("federate: {}\ndata: {type: femnist}\nmodel: {type: convnet2}", "no language model's"),
        ("[tool.flwr.app.config]\nnum-server-rounds = 3", "none of FlowerTune"),
        ("--fed_alg fedavg\n--fed_alg fedprox", "starts 2 runs"),
        ("--fed_alg 'fedavg", "quotation mark has no partner"),
        ("python x.py --fed_alg fedavg --num_rounds 0", "rounds: should be greater than 0"),
        ("python x.py --fed_alg fedavg --num_clients $N", "data.clients"),
    ],
)
def test_bad_files(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        convert(text, "x")


@pytest.mark.parametrize("name", ["none.yaml", "folder", "bytes"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    done = CliRunner().invoke(app, ["import", str(tmp_path / name)])
    words = {"none.yaml": "no such file", "folder": "is a folder", "bytes": "cannot be read as text"}
    assert words[name] in str(done.exception)


def test_default_targets_are_pefts() -> None:
    assert peft_targets("huggyllama/llama-7b") == ["q_proj", "v_proj"]
    assert peft_targets("EleutherAI/pythia-70m") == ["query_key_value"]
    assert peft_targets("bigscience/bloom-560m") == ["query_key_value"]
    assert peft_targets("someone/unheard-of") is None
    assert flatten({"a": {"b": {"c": 1}}, "d": [1]}) == {"a.b.c": 1, "d": [1]}
