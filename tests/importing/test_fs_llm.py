"""FS-LLM files become recipes, and what is lost on the way is told."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from tests.importing.fs_file import fs, lost

from fedloom.importing import convert
from fedloom.types import RecipeError


def test_fs_llm() -> None:
    found = fs()
    assert found.format == "FS-LLM"
    assert lost(found) == {}
    assert found.tree == {
        "model": {"name": "facebook/opt-125m"},
        "adapter": {"name": "lora", "r": 4, "alpha": 12, "dropout": 0.05, "targets": ["q_proj", "v_proj"]},
        "data": {
            "source": "dolly-15k", "template": "alpaca", "max_tokens": 200, "unseen": 0.0, "clients": 8,
            "partition": {"name": "dirichlet", "alpha": 0.3, "key": "category"},
            "splits": {"train": 0.9, "validation": 0.05, "test": 0.05},
        },
        "trainer": {
            "optimizer": {"name": "sgd", "weight_decay": 0.1}, "lr": 0.01, "steps": 6, "batch": 2,
            "schedule": "constant", "clip_norm": 2.0,
        },
        "algorithm": {"name": "fedavg", "weighting": "uniform"},
        "sampler": {"count": 4},
        "rounds": 20,
        "checkpoint": {"every": 5},
        "evaluate": [{"name": "loss", "every": 5}],
        "early_stop": {"evaluator": "loss", "patience": 2, "delta": 0.1},
        "seed": 3,
    }  # fmt: skip


def test_fs_llm_writes_out_that_projects_defaults() -> None:
    bare = {"federate": {"client_num": 2}, "data": {"type": "gsm8k@llm"}, "model": {"type": "gpt2@huggingface_llm"}}
    found = convert(yaml.safe_dump({**bare, "llm": {"adapter": {"use": True}}}), "f")
    trainer, data = found.tree["trainer"], found.tree["data"]
    assert (trainer["optimizer"]["name"], trainer["lr"], trainer["batch"], trainer["steps"]) == ("sgd", 0.1, 64, 1)
    assert (data["max_tokens"], data["splits"]["train"]) == (128, 0.8)
    assert data["source"] == {"name": "gsm8k", "marker": "The answer is "}
    assert found.tree["rounds"] == 50
    assert found.tree["adapter"]["targets"] == ["c_attn"]
    assert found.tree["early_stop"]["patience"] == 5
    assert found.tree["model"]["device"] == "cpu"


def test_fs_llm_algorithms_and_servers() -> None:
    prox = fs(fedprox={"use": True, "mu": 0.2}).tree["algorithm"]
    assert (prox["name"], prox["mu"]) == ("fedprox", 0.2)
    assert fs(fedprox={"use": False, "mu": 0.2}).tree["algorithm"]["name"] == "fedavg"
    assert fs(federate__method="local").tree["algorithm"]["name"] == "local"
    assert fs(federate__method="global").tree["algorithm"] == {"name": "centralized"}
    assert fs(train__batch_or_epoch="epoch").tree["algorithm"]["weighting"] == "examples"
    assert fs(train__batch_or_epoch="epoch").tree["trainer"]["epochs"] == 6
    adam = fs(fedopt={"use": True, "optimizer": {"type": "Adam", "lr": 0.02, "betas": [0.8, 0.95]}}).tree["server"]
    assert adam == {"optimizer": {"name": "fedadam", "beta1": 0.8, "beta2": 0.95}, "lr": 0.02}
    ditto = fs(federate__method="Ditto")
    assert ditto.tree["algorithm"] == {"name": "ditto", "lam": 0.1, "weighting": "uniform"}
    assert "federate.method" not in lost(ditto)
    moreau = fs(federate__method="pFedMe", personalization={"K": 3, "regular_weight": 0.5, "beta": 0.9, "lr": 0.01})
    assert moreau.tree["algorithm"] == {
        "name": "pfedme",
        "lam": 0.5,
        "inner_steps": 3,
        "beta": 0.9,
        "outer_lr": 0.01,
        "weighting": "uniform",
    }
    assert fs(federate__method="FedEM", model__model_num_per_trainer=2).tree["algorithm"]["components"] == 2
    kept = fs(personalization={"local_param": ["lora_B"]}).tree["algorithm"]
    assert (kept["name"], kept["private"]) == ("fedper", ["*lora_B*"])


def test_fs_llm_adapts_before_it_measures() -> None:
    assert fs(finetune={"before_eval": True, "local_update_steps": 7}).tree["adapt_steps"] == 7
    assert "adapt_steps" not in fs(finetune={"before_eval": False, "local_update_steps": 7}).tree


@pytest.mark.parametrize(
    ("method", "given", "adapter"),
    [
        ("prefix", {"num_virtual_tokens": 30}, {"name": "prefix-tuning", "tokens": 30}),
        ("prompt", {"prompt_tuning_init": "RANDOM"}, {"name": "prompt-tuning"}),
        (
            "prompt",
            {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Be brief."},
            {"name": "prompt-tuning", "text": "Be brief."},
        ),
        ("p-tuning", {"encoder_hidden_size": 64}, {"name": "p-tuning", "hidden": 64}),
    ],
)
def test_fs_llm_virtual_tokens(method: str, given: dict[str, object], adapter: dict[str, object]) -> None:
    args = [{"adapter_package": "peft", "adapter_method": method, **given}]
    assert fs(llm__adapter__args=args).tree["adapter"] == adapter


RATIO, NORM = {"trimmedmean_excluded_ratio": 0.25}, {"normbounding_norm_bound": 3.0}


@pytest.mark.parametrize(
    ("given", "aggregator"),
    [
        ({"robust_rule": "krum", "byzantine_node_num": 1}, {"name": "krum", "f": 1}),
        ({"robust_rule": "krum", "BFT_args": {"krum_agg_num": 3}}, {"name": "multi-krum", "f": 0, "m": 3}),
        ({"robust_rule": "median", "byzantine_node_num": 1}, {"name": "median"}),
        ({"robust_rule": "trimmedmean", "BFT_args": RATIO}, {"name": "trimmed-mean", "f": 2}),
        ({"robust_rule": "normbounding", "BFT_args": NORM}, {"name": "norm-bound", "norm": 3.0}),
        ({"robust_rule": "bulyan", "byzantine_node_num": 1}, {"name": "bulyan", "f": 1}),
    ],
)
def test_robust_rules(given: dict[str, Any], aggregator: dict[str, Any]) -> None:
    found = fs(aggregator=given, federate__sample_client_num=8)
    assert found.tree["server"]["aggregator"] == aggregator
    assert lost(found) == {}


def test_a_part_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloom.server.aggregate import Aggregator

    monkeypatch.delitem(Aggregator.known, "krum")
    found = fs(aggregator={"robust_rule": "krum", "byzantine_node_num": 1})
    assert "no aggregator 'krum'" in lost(found)["aggregator.robust_rule"]
    assert "aggregator.byzantine_node_num" in lost(found)
    assert "server" not in found.tree


def test_what_does_not_fit_together_is_told() -> None:
    with pytest.raises(RecipeError, match=r"(?s)f\.yaml \(FS-LLM\), translated: .*server\.aggregator=krum needs"):
        fs(aggregator={"robust_rule": "krum", "byzantine_node_num": 3})


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"federate__use_ss": True}, "federate.use_ss", "secret sharing"),
        ({"federate__mode": "distributed"}, "federate.mode", "simulates"),
        ({"llm__offsite_tuning": {"use": True, "emu_l": 2}}, "llm.offsite_tuning.emu_l", "offsite"),
        ({"asyn__use": True}, "asyn.use", "synchronous"),
        ({"grad__grad_accum_count": 4}, "grad.grad_accum_count", "multiplied the local steps"),
        ({"data__splitter": "odd"}, "data.splitter", "iid, lda, meta"),
        ({"data__type": "other@llm"}, "data.type", "no source"),
        ({"data__subsample": 0.5}, "data.subsample", "code-search-net"),
        ({"fedswa": {"use": True, "freq": 10}}, "fedswa.freq", "another method"),
        ({"train__scheduler": {"type": "StepLR"}}, "train.scheduler.type", "trainer.schedule"),
        ({"odd": {"thing": 3}}, "odd.thing", "no knob is known"),
    ],
)
def test_fs_llm_names_what_is_lost(changes: dict[str, Any], key: str, words: str) -> None:
    assert words in lost(fs(**changes))[key]
