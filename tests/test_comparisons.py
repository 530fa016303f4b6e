"""The two comparisons of adapters in examples/: their tables say what the run folders say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.helpers import lines

from fedloom import recipe as recipes

EXAMPLES = Path(__file__).parent.parent / "examples"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _table(monkeypatch: pytest.MonkeyPatch, name: str, out: Path, *words: str) -> list[dict[str, Any]]:
    """Run an example and return its rows."""
    monkeypatch.setattr(sys, "argv", [name, "--max-tokens", "2000", "--out", str(out), *words])
    _script(name).main()
    return json.loads((out / "table.json").read_text())


def test_personal_methods(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_folder), "--rows", "15", "--rounds", "1", "--steps", "1", "--adapt-steps", "1"]
    words += ["--seeds", "0", "--methods", "local", "--metric", "contained"]
    shared, local = _table(monkeypatch, "compare_personal", tmp_path, *words)
    assert (shared["method"], local["method"]) == ("fedavg", "local")
    assert shared["gain"] is None
    own = {}
    for name, regime in (("fedavg", "federated"), ("local", "local")):
        found = lines(tmp_path / f"{name}-0" / "metrics.jsonl")
        wanted = f"test/{regime}/own-answers/contained"
        own[name] = {line["client"]: line["value"] for line in found if line["name"] == wanted and line["client"]}
    assert len(own["fedavg"]) == 6  # of eight clients two are unseen
    assert local["own"] == pytest.approx(sum(own["local"].values()) / 6)
    assert local["worst"] == min(own["local"].values())
    assert local["clients"] == {"0": own["local"]}
    assert local["gain"][0] == pytest.approx(local["own"] - shared["own"])
    assert local["gain"][1] <= local["gain"][0] <= local["gain"][2]
    assert local["up"] == 0 < shared["up"]
    assert all(row[name] is not None for row in (shared, local) for name in ("adapted", "unseen", "unseen_adapted"))
    printed = capsys.readouterr().out
    assert "gain" in printed
    assert all(client in printed for client in own["local"])
    # finished runs are read, not run again
    before = (tmp_path / "local-0" / "summary.json").stat().st_mtime_ns
    assert _table(monkeypatch, "compare_personal", tmp_path, *words) == [shared, local]
    assert (tmp_path / "local-0" / "summary.json").stat().st_mtime_ns == before


def test_kinds(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model", str(tiny_folder), "--rows", "10", "--rounds", "1", "--tokens", "300", "--items", "1"]
    (found,) = _table(monkeypatch, "compare_kinds", tmp_path, *words, "--kinds", "lora")
    summary = json.loads((tmp_path / "lora" / "summary.json").read_text())
    assert found["tokens"] == summary["trained_tokens"]
    assert found["memory"] == summary["peak_rss_bytes"]
    assert found["loss"] == summary["metrics"]["federated"]["loss"]["loss"]


@pytest.mark.parametrize("name", ["compare_personal", "compare_kinds"])
def test_every_choice_is_a_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are too slow to run here."""
    module = _script(name)
    choices = module.METHODS if name == "compare_personal" else module.KINDS
    monkeypatch.setattr(sys, "argv", [name])
    if name == "compare_personal":
        for method in choices:
            recipes.load(module.recipe(module.arguments(), method, 0))
        return
    for kind in choices:
        recipes.load(module.recipe(module.arguments(), kind))
