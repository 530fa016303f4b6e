"""The documentation is of the present."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import run

from fedloom import algorithms, types
from fedloom import recipe as recipes
from fedloom.checkpoint import Checkpoints
from fedloom.cli.main import app
from fedloom.client.adapters import Lora

ROOT = Path(__file__).parents[1]
OUTER = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*OUTER, *sorted((ROOT / "docs").glob("*.md"))]
VERBS = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_parts_is_up_to_date() -> None:
    assert (ROOT / "docs" / "parts.md").read_text(encoding="utf-8") == _generator().page(), (
        "run: python docs/generate.py"
    )


@pytest.mark.bundled
def test_the_page_of_methods_is_up_to_date() -> None:
    found = _generator().methods()
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == found, "run: python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_recipes_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))
    for verb in re.findall(r"(?<!from )\bfedloom ([a-z]+)\b", code):
        assert verb in VERBS, f"fedloom {verb}"
    for name in re.findall(r"--set-file ([\w.-]+)", code):
        # an ending, as `fedloom bench` takes it, is that of some recipes' own files
        ending = name.startswith("_") and any(one.endswith(name) for one in recipes.shipped())
        assert name in recipes.shipped() or ending or name == "NAME", name
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_the_recipes_of_commands_can_be_read(page: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for line in "\n".join(blocks).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["fedloom"] or words[1] not in ("run", "show", "data") or "/" in words[2] or words[2][0] == "-":
            continue
        files = [words[i + 1] for i, word in enumerate(words) if word == "--set-file"]
        recipes.load(words[2], [word for word in words[3:] if "=" in word], files)


def test_the_table_of_recipes_has_their_values() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|((?: [\d., ]+ \|){6})$", text, flags=re.MULTILINE)
    assert len(rows) == 4
    for name, cells in rows:
        said = [[float(x) for x in cell.split(",")] for cell in cells.strip(" |").split("|")]
        r = recipes.load(name)
        assert isinstance(r.adapter, Lora)
        plain = (r.data.clients, r.trainer.lr, r.adapter.alpha, r.adapter.dropout, r.data.max_tokens)
        assert said == [*([x] for x in plain), list(r.data.splits.shares)], name


def test_the_contracts_in_the_design_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "class " in block]
    classes = [one for block in blocks for one in ast.parse(block).body if isinstance(one, ast.ClassDef)]
    assert len(classes) == 13
    for one in classes:
        real = getattr(types, one.name, None) or getattr(algorithms, one.name)
        fields = [line.target.id for line in one.body if isinstance(line, ast.AnnAssign)]
        assert not fields or fields == list(real.__dataclass_fields__), one.name
        for method in (line for line in one.body if isinstance(line, ast.FunctionDef)):
            said = [argument.arg for argument in method.args.args]
            assert said == list(inspect.signature(getattr(real, method.name)).parameters), method.name


def test_the_example_of_an_algorithm_runs(tiny_folder: Path, tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "name=" in block)
    try:
        exec(compile(code, "CONTRIBUTING.md", "exec"), {"__name__": "contributing_example"})
        result = run(tiny_folder, tmp_path / "a", algorithm={"name": "fedavg-b-only"}, rounds=1)
    finally:
        algorithms.Algorithm.known.pop("fedavg-b-only", None)
    first, _ = Checkpoints(result.folder / "checkpoints", keep=2).load(0)
    last, _ = Checkpoints(result.folder / "checkpoints", keep=2).load(1)
    still = {name for name in first.params if torch.equal(first.params[name], last.params[name])}
    assert still == {name for name in first.params if name.endswith("lora_A")}
