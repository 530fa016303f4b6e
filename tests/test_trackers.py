"""Trackers get the scalars of rounds and evaluations; what is not installed is named."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tests.helpers import run

import fedloom


def test_tensorboard_files(tiny_folder: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("needs tensorboard: pip install 'fedloom[tensorboard]'")
    result = run(tiny_folder, tmp_path / "a", trackers=["console", "tensorboard"])
    (events,) = (result.folder / "tensorboard").iterdir()
    assert b"validation/federated/loss/loss" in events.read_bytes()


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_library_is_named(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(fedloom.RecipeError, match=rf"pip install 'fedloom\[{name}\]'"):
        run(tiny_folder, tmp_path / "a", trackers=[name])
