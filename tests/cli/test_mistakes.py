"""Plain mistakes: each is refused in a sentence that names it, and none blocks the corrected command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
import yaml
from tests.cli.test_verbs import call, refused
from tests.helpers import run as run_recipe
from tests.helpers import tree

from fedloom.cli.main import app, main


@pytest.fixture(scope="module")
def recipe(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(yaml.safe_dump(tree(tiny_folder, rounds=1)))
    return path


@pytest.fixture(scope="module")
def shared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(tiny_folder, tmp_path_factory.mktemp("runs") / "shared").folder


def test_a_client_of_another_name_is_never_the_shared_adapter(shared: Path, tiny_folder: Path, tmp_path: Path) -> None:
    own = run_recipe(tiny_folder, tmp_path / "own", algorithm="ditto").folder
    for more in ([], ["--checkpoint", "latest"]):
        told = refused("export", own, "--client", "clinet-1", *more)
        assert "client-1" in told
        assert "no client 'clinet-1'" in told
        assert "one adapter for all clients" in refused("export", shared, "--client", "client-1", *more)


def test_what_was_refused_after_loading_does_not_block_the_corrected_command(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    refused("run", recipe, "init=nowhere", "--out", out)
    assert call("run", recipe, "--out", out).exit_code == 0
    assert "exists" in refused("run", recipe, "--out", out)


def test_files_in_the_place_of_folders_and_the_reverse(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("run", recipe, "--out", tmp_path / "file")
    assert "is a file" in refused("run", recipe, "--out", tmp_path / "file" / "below")
    assert "in a folder that is there" in refused("data", recipe, "--out", tmp_path / "no" / "x.json")
    assert "neither a run folder" in refused("chat", tmp_path, "--prompt", "a")


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"rounds: 3 # \xff\n")
    assert "not UTF-8" in refused("show", path)
    path.write_text("rounds: 3\nseed: 1\nrounds: 4\n")
    assert re.search(r"bad\.yaml: line 3: the key 'rounds' is there twice", refused("show", path))


def test_a_damaged_summary(shared: Path, tmp_path: Path) -> None:
    kept = (shared / "summary.json").read_text()
    try:
        for text in ("{", "[]"):
            (shared / "summary.json").write_text(text)
            for words in (["show", shared], ["run", "--resume", shared], ["report", shared]):
                assert "summary.json is damaged" in refused(*words)
    finally:
        (shared / "summary.json").write_text(kept)
    assert json.loads(kept)["metrics"]


@pytest.mark.parametrize("word", ["recipes", "recipe", "algorithm", "evaluators", "evaluator", "aggregators"])
def test_lists_by_plural_names(word: str) -> None:
    found = call("list", word)
    assert found.exit_code == 0
    assert ("fed-gsm8k-3" in found.stdout) == word.startswith("recipe")
    assert ("shipped recipes" in found.stdout) == word.startswith("recipe")


def test_every_argument_and_option_has_a_help_text() -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, verb in verbs.items():
        for one in verb.params:
            assert getattr(one, "help", None), f"{name}: {one.name}"


def test_a_mistyped_verb_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["fedloom", "rnu"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.count("'run'") == 1
