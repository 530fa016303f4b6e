"""Real runs of the tiny model to draw, made once, and a browser to look at pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import run
from tests.tiny import tiny_model_folder

EVALUATE = [
    {"name": "loss", "every": 1},
    {"name": "tasks", "items_per_category": 4, "max_new_tokens": 6, "categories": ["units", "sorting", "logic"]},
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def compared(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both compared regimes."""
    out = tmp_path_factory.mktemp("runs") / "compared"
    return run(tiny, out, evaluate=EVALUATE, compare=["local", "centralized"], rounds=3).folder


@pytest.fixture(scope="session")
def other(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with another learning rate, alone."""
    return run(tiny, tmp_path_factory.mktemp("runs") / "other", evaluate=EVALUATE, trainer={"lr": 1e-3}).folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()
