"""What a client costs beside its fitting: one round of many clients that take one step each, on a tiny model.

    python benchmarks/overhead.py [--clients 100] [--runtime local] [--model FOLDER|NAME]

Fitting is the time inside the training loop. All else is overhead: broadcast, encoding and decoding both ways, the
coroutines, transforms, the mean, memories on disk, metrics and the checkpoint. Prints JSON; the figure to read is
`overhead_ms_per_client`. With `--runtime processes` fitting in several workers at once counts once, and overhead holds
what workers wait and what pipes take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.tiny import tiny_model_folder  # noqa: E402 - found through the path above

from fedloom import recipe as recipes  # noqa: E402
from fedloom.assets import prepare  # noqa: E402
from fedloom.settle import settle  # noqa: E402
from fedloom.tracking import Sink  # noqa: E402
from fedloom.world import World  # noqa: E402

ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "scaffold": {"algorithm": "scaffold", "trainer": {"optimizer": "sgd", "clip_norm": None}},  # a memory a client
}


def tree(asked: argparse.Namespace, model: str) -> dict[str, Any]:
    """Return the recipe: every client has four rows and takes one step of two of them."""
    return {
        "model": {"name": model, "dtype": "fp32", "device": "cpu"},
        "data": {
            "source": {"name": "tasks", "rows_per_category": 4 * asked.clients, "categories": ["units"]},
            "clients": asked.clients,
        },
        "trainer": {"steps": 1, "batch": 2},
        "runtime": {"name": asked.runtime, "threads": 1, "cohort": asked.cohort},
        "rounds": asked.rounds + 1,
        "evaluate": [],
    }


def measure(asked: argparse.Namespace, model: str, algorithm: str, folder: Path) -> dict[str, float]:
    """Return the medians over the rounds; the first one, which pays for first-time allocations, is not counted."""
    base = recipes.overlay(tree(asked, model), ALGORITHMS[algorithm])
    recipe = recipes.load(base).resolved()
    assets = prepare(recipe, Sink())
    recipe = settle(recipe, assets)
    folder.mkdir()
    world = World(recipe, folder, assets, Sink())
    state, totals, fits = world.start({}), [], []
    try:
        world.crew.ready()
        for _ in range(recipe.rounds):
            began = time.perf_counter()
            cohort = recipe.sampler.cohort(state.round, world.clients, recipe.seed)
            state, report = world.engine.round(world.crew, state, cohort)
            world.after(state, report)
            totals.append(time.perf_counter() - began)
            fits.append(report.fit_seconds)
    finally:
        world.crew.close()
    over = [1000 * (total - fit) / asked.clients for total, fit in zip(totals[1:], fits[1:], strict=True)]
    return {
        "overhead_ms_per_client": round(statistics.median(over), 3),
        "worst_round_ms_per_client": round(max(over), 3),
        "fit_ms_per_client": round(1000 * statistics.median(fits[1:]) / asked.clients, 3),
        "message_bytes": report.bytes_up // asked.clients,
        "cohort": float(getattr(world.crew, "size", 1)),
    }


def main() -> None:
    """Measure each algorithm and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100, help="clients of a round")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after an uncounted one")
    parser.add_argument("--cohort", type=int, default=1, help="clients of one pass")
    parser.add_argument("--runtime", default="local", choices=["local", "processes"])
    parser.add_argument("--model", help="a model in the place of the tiny one, such as smollm2-135m")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model = asked.model or str(tiny_model_folder(Path(place) / "tiny"))
        found = {name: measure(asked, model, name, Path(place) / name) for name in ALGORITHMS}
    print(
        json.dumps({"clients": asked.clients, "runtime": asked.runtime, "torch": torch.__version__, **found}, indent=1)
    )


if __name__ == "__main__":
    main()
