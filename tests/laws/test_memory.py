"""Ten thousand clients cost what ten do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.helpers import tree

from fedloom import recipe as recipes
from fedloom.recipe import overlay
from fedloom.tracking import Sink
from fedloom.world import prepare

# VmHWM, since the kernel lets ru_maxrss begin with the size of whoever started the process: here, of all these tests
CODE = """
import pathlib, sys, fedloom
result = fedloom.run(sys.argv[1], "data.clients=" + sys.argv[2], out=sys.argv[3])
status = pathlib.Path("/proc/self/status").read_text()
peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
print(1024 * int(peak), result.summary["participations"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_clients_that_are_not_sampled(tiny_folder: Path, tmp_path: Path) -> None:
    """The same 12,000 rows on 10 and on 10,000 clients, 10 a round, with a method that keeps memories."""
    recipe = tmp_path / "many.yaml"
    changes = {
        "data": {"source": {"rows_per_category": 6000, "categories": ["units", "sorting"]}, "partition": "iid"},
        "trainer": {"optimizer": "sgd", "clip_norm": None},
        "algorithm": "scaffold",
        "sampler": {"count": 10},
        "rounds": 3,
        "evaluate": [],
    }
    plain = tree(tiny_folder)
    plain["data"].pop("partition")
    plain["data"]["source"] = {"name": "tasks"}
    recipe.write_text(yaml.safe_dump(overlay(plain, changes)))
    prepare(recipes.load(recipe).resolved(), Sink())  # tokenises, which would count for the first of the two only
    peaks = {}
    for clients in (10, 10_000):
        words = [sys.executable, "-c", CODE, str(recipe), str(clients), str(tmp_path / str(clients))]
        told = subprocess.run(words, env={**os.environ}, capture_output=True, text=True, check=True).stdout.split()
        peaks[clients] = int(told[-2])
        assert told[-1] == "30"
    assert peaks[10_000] < 1.05 * peaks[10]
