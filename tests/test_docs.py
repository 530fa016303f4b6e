"""The documentation is of the present."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from fedloom import recipe as recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
VERBS = {"run", "show", "list", "data", "eval", "chat", "export", "doctor"}


def test_the_page_of_parts_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "parts.md").read_text(encoding="utf-8") == module.page(), "run: python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_recipes_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))
    for verb in re.findall(r"(?<!from )\bfedloom ([a-z]+)\b", code):
        assert verb in VERBS, f"fedloom {verb}"
    for name in re.findall(r"--set-file ([\w.-]+)", code):
        assert name in recipes.shipped() or name == "NAME", name
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_the_example_of_an_algorithm_runs(tiny_folder: Path, tmp_path: Path) -> None:
    from tests.helpers import run

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "name=" in block)
    exec(compile(code, "CONTRIBUTING.md", "exec"), {"__name__": "contributing_example"})
    result = run(tiny_folder, tmp_path / "a", algorithm={"name": "fedavg-b-only"}, rounds=1)
    assert result.summary["rounds"] == 1
