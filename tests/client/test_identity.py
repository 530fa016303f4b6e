"""An adapter is put on the model that it was trained on, and on no other of the same shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_model, tiny_model_folder

from fedloom.client.identity import FILE, Base, check_base, identify, stamp
from fedloom.home import BUNDLED
from fedloom.types import ModelError


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the shapes of `tiny_folder` with other weights."""
    return tiny_model_folder(tmp_path_factory.mktemp("other"), seed=1)


def foreign(folder: Path, base: str | None) -> Path:
    """Write the configuration of a PEFT folder of other tools."""
    peft.LoraConfig(base_model_name_or_path=base).save_pretrained(str(folder))
    return folder


def stamped(folder: Path, base: Base) -> Path:
    folder.mkdir(exist_ok=True)
    stamp(folder, base)
    return folder


def changed(base: Base, factor: float, name: str = "") -> Base:
    """Return a base each of whose values is off by a factor, up and down in turn."""
    turned = {n: [v * (1 + factor * (-1) ** i) for i, v in enumerate(values)] for n, values in base.weights.items()}
    return Base(name or base.name, base.dtype, turned)


def test_weights_decide_whatever_the_name_is(tiny_folder: Path, other: Path, tmp_path: Path) -> None:
    mine = identify(str(tiny_folder), tiny_folder)
    folder = stamped(tmp_path / "a", mine)
    assert check_base(folder, mine) == ""
    assert check_base(folder, Base("a/copy", mine.dtype, mine.weights)) == ""
    with pytest.raises(ModelError, match="their weights differ"):
        check_base(folder, replace(mine, weights=identify(str(other), other).weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_copies_in_another_dtype_are_the_same_model(tiny_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    copy = tiny_model_folder(tmp_path / "copy", dtype)
    folder = stamped(tmp_path / "a", identify(str(tiny_folder), tiny_folder))
    assert check_base(folder, identify(str(copy), copy)) == ""


def test_a_model_with_an_adapter_merged_into_it_is_another(tiny_folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    weights = load_file(tiny_folder / "model.safetensors")
    more = {n: t * 1.001 if "q_proj" in n or "v_proj" in n else t for n, t in weights.items()}
    save_file(more, merged / "model.safetensors")
    with pytest.raises(ModelError, match="their weights differ"):
        check_base(stamped(tmp_path / "a", identify("x", tiny_folder)), identify("y", merged))


def test_shards_and_an_untied_head_change_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    model = tiny_model()
    model.save_pretrained(shards, max_shard_size="40KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    whole = {**load_file(tiny_folder / "model.safetensors"), "lm_head.weight": torch.ones(272, 32)}
    headed = tmp_path / "headed"
    headed.mkdir()
    save_file(whole, headed / "model.safetensors")
    folder = stamped(tmp_path / "a", identify("x", tiny_folder))
    assert check_base(folder, identify("y", shards)) == ""
    assert check_base(folder, identify("y", headed)) == ""


def test_the_hub_and_the_bundled_file_are_one_model(tiny_folder: Path, tmp_path: Path) -> None:
    short, one = next(iter(BUNDLED.items()))
    hub = replace(identify("x", tiny_folder), name=one.hub_id)
    folder = stamped(tmp_path / "a", hub)
    assert identify(short, tiny_folder).name == one.hub_id
    assert check_base(folder, changed(hub, 0.1)) == ""  # as 4 bits do
    with pytest.raises(ModelError, match="their weights differ"):
        check_base(folder, changed(hub, 0.1, "another/model"))
    with pytest.raises(ModelError, match="their weights differ"):
        check_base(folder, changed(hub, 2.0))


def test_names_decide_where_there_is_nothing_else(tiny_folder: Path, tmp_path: Path) -> None:
    mine = identify(str(tiny_folder), tiny_folder)
    short, one = next(iter(BUNDLED.items()))
    hub = Base(one.hub_id, "", {})
    assert check_base(foreign(tmp_path / "a", one.hub_id.lower()), hub) == ""
    assert check_base(foreign(tmp_path / "b", short), hub) == ""
    cached = f"/home/me/hub/models--{one.hub_id.replace('/', '--')}/snapshots/0123"
    assert check_base(foreign(tmp_path / "c", cached), hub) == ""
    with pytest.raises(ModelError, match=r"their names differ.*base_model_name_or_path"):
        check_base(foreign(tmp_path / "d", "meta-llama/Llama-2-7b-hf"), hub)
    assert "so nothing shows whether that is" in check_base(foreign(tmp_path / "e", "/no/longer/there"), mine)
    assert "so nothing shows whether that is" in check_base(foreign(tmp_path / "f", one.hub_id), mine)
    assert "does not tell its base model" in check_base(foreign(tmp_path / "g", None), mine)
    assert "does not tell its base model" in check_base(tmp_path, mine)


def test_the_base_of_another_tool_is_looked_at_where_it_is_a_folder(
    tiny_folder: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = identify(str(tiny_folder), tiny_folder)
    monkeypatch.chdir(tiny_folder.parent)
    assert check_base(foreign(tmp_path / "a", tiny_folder.name), mine) == ""
    with pytest.raises(ModelError, match="their weights differ"):
        check_base(foreign(tmp_path / "b", str(other)), mine)


def test_what_cannot_be_read_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    mine = identify(str(tiny_folder), tiny_folder)
    for text in ("{", "{}", "[]", json.dumps({"name": "x"})):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ModelError, match="its base model cannot be read"):
            check_base(tmp_path, mine)
