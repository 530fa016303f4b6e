"""Ten thousand clients cost what ten do, and a run's peak of memory is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.helpers import run, tree

from fedloom import recipe as recipes
from fedloom.assets import prepare
from fedloom.outcome import reset_peaks
from fedloom.recipe import overlay
from fedloom.tracking import Sink

# VmHWM, since the kernel lets ru_maxrss begin with the size of whoever started the process: here, of all these tests
CODE = """
import pathlib, sys, fedloom
result = fedloom.run(sys.argv[1], "data.clients=" + sys.argv[2], out=sys.argv[3])
status = pathlib.Path("/proc/self/status").read_text()
peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
print(1024 * int(peak), result.summary["participations"])
"""
BETWEEN = """
import sys, fedloom, torch
folder, filled = sys.argv[2], []
first = fedloom.run(sys.argv[1], out=folder + "/first").summary
# one block that any allocator maps, and blocks that it keeps for later when they are freed
whole = torch.ones(1 << 28)
many = [torch.ones(1 << 18) for _ in range(256)]
del whole, many
second = fedloom.run(sys.argv[1], "compare=[local]", out=folder + "/second").summary
print(first["peak_rss_bytes"], second["peak_rss_bytes"], first["peak_of"], second["peak_of"])
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


@pytest.mark.skipif(not reset_peaks(), reason="this system does not let a peak begin anew")
def test_memory_of_earlier_work_is_not_in_a_run(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump({**tree(tiny_folder), "evaluate": []}))
    words = [sys.executable, "-c", BETWEEN, str(recipe), str(tmp_path)]
    told = subprocess.run(words, env={**os.environ}, capture_output=True, text=True, check=True).stdout.split()
    first, second = map(int, told[-4:-2])
    assert told[-2:] == ["regime", "regime"]
    assert second < first + 100e6


def test_a_peak_that_may_be_older_is_marked(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = iter([True, False])
    monkeypatch.setattr("fedloom.assets.reset_peaks", lambda: next(fresh))
    monkeypatch.setattr("fedloom.loop.reset_peaks", lambda: next(fresh))
    result = run(tiny_folder, tmp_path / "run", evaluate=[], compare=["local"])
    local = json.loads((tmp_path / "run" / "regimes" / "local" / "summary.json").read_text())
    assert (result.summary["peak_of"], local["peak_of"]) == ("regime", "process")
    assert min(result.summary["peak_rss_bytes"], local["peak_rss_bytes"]) > 0
