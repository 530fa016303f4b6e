"""What a recipe leaves to the machine: chosen once, written down, and refused in words where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import run, tree
from tests.tiny import tiny_tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM

import fedloom
from fedloom import recipe as recipes
from fedloom import settle as module
from fedloom.algorithms.base import Algorithm
from fedloom.assets import prepare
from fedloom.recipe import Recipe
from fedloom.settle import settle
from fedloom.tracking import Sink
from fedloom.types import RecipeError


def _settled(folder: Path, **changes: Any) -> Recipe:
    recipe = recipes.load(tree(folder, **changes)).resolved()
    return settle(recipe, prepare(recipe, Sink()))


def test_a_cohort_fills_a_pass(tiny_folder: Path) -> None:
    # rows have some 150 tokens, two a step
    assert _settled(tiny_folder).runtime.cohort == 3
    assert _settled(tiny_folder, trainer={"micro_tokens": 700}).runtime.cohort == 2
    assert _settled(tiny_folder, trainer={"micro_tokens": 64}).runtime.cohort == 1
    assert _settled(tiny_folder, sampler={"count": 2}).runtime.cohort == 2
    assert _settled(tiny_folder, runtime={"reference": True}).runtime.cohort == 1
    assert _settled(tiny_folder, runtime={"cohort": 2}).runtime.cohort == 2


def test_memory_bounds_the_cohort_and_asks_for_checkpointing(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = lambda size: monkeypatch.setattr(module, "free_bytes", lambda device: size)
    free(10**12)
    recipe = recipes.load(tree(tiny_folder)).resolved()
    assets = prepare(recipe, Sink())
    need, kept = module._pass_bytes(recipe, assets, False), module._pass_bytes(recipe, assets, True)
    assert kept < need / 2
    assert settle(recipe, assets).trainer.checkpointing is False
    free(2 * need - 100)  # a pass may take half of what is free
    settled = settle(recipe, assets)
    assert (settled.trainer.checkpointing, settled.runtime.cohort) == (True, 3)
    free(2 * kept + 100)
    assert settle(recipe, assets).runtime.cohort == 1
    free(kept // 2)
    with pytest.raises(RecipeError, match=r"needs about .* are free on cpu; set trainer.micro_tokens below 1024, or "):
        settle(recipe, assets)


def test_the_choice_is_kept_on_resume(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tiny_folder, tmp_path / "a", rounds=4)
    run(tiny_folder, tmp_path / "b", rounds=2)
    monkeypatch.setattr(module, "free_bytes", lambda device: 10**7)
    resumed = fedloom.resume(tmp_path / "b", ["rounds=4"])
    assert resumed.recipe.runtime.cohort == 3
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_packing_that_cannot_be_is_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        model = Gemma2ForCausalLM(Gemma2Config(vocab_size=272, head_dim=8, intermediate_size=64, **shape))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"trainer.packing=true: .* gemma2 .*allowed: auto, false"):
        _settled(tmp_path, model={"attention": "eager"}, trainer={"packing": True})
    assert _settled(tmp_path, model={"attention": "eager"}).trainer.packing is False


def test_a_cohort_that_cannot_be_says_which_part_prevents_it(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = lambda **runtime: recipes.load(tree(tiny_folder, runtime=runtime))
    with pytest.raises(RecipeError, match=r"runtime.cohort=4: runtime.reference=true computes one client at a time"):
        load(cohort=4, reference=True)
    monkeypatch.setattr(Algorithm, "alone", "its server moves in mid-round")
    with pytest.raises(
        RecipeError, match=r"runtime.cohort=4: algorithm=fedavg runs one client after another: its serv"
    ):
        load(cohort=4)
    assert load(cohort=1).runtime.cohort == 1
    with pytest.raises(RecipeError, match=r"runtime.cohort"):
        load(cohort=0)
