"""What personal adapters cost: the time of a round against FedAvg's, and the memory of many clients.

    python benchmarks/personal.py [--only time memory] [--model tiny] [--laps 5] [--steps 4]

`time`: SmolLM2-135M in bf16, LoRA on all linear layers, 4 clients with the same steps on the same rows. All methods run
in one process on one resident model, round after round in turn, so that a busy moment hits all of them; a ratio is the
median over the laps of a method's round to FedAvg's round beside it. Two rounds before are not counted: some methods
train their personal adapters from a client's second round on. `memory`: a model of 1 MB, 10 of so many clients sampled
a round for 200 rounds, so that most of a thousand have trained, each point a process of its own.
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

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import harness

from fedloom.algorithms import Algorithm
from fedloom.assets import prepare
from fedloom.settle import settle
from fedloom.tracking import Sink
from fedloom.types import ServerState
from fedloom.world import World

METHODS = ("fedavg", "ditto", "feddpa-t", "fedalt", "pf2lora")
FLEETS = (10, 1000)
UNCOUNTED = 2


def seconds(model: str, laps: int, steps: int) -> dict[str, Any]:
    """Return the seconds of a round of each method, and its ratio to FedAvg's."""
    folder = Path(tempfile.mkdtemp())
    changes: dict[str, Any] = {"trainer": {"steps": steps, "batch": 8}, "rounds": UNCOUNTED + laps}
    if model == "tiny":
        changes |= {"model": _tiny(folder), "data": {"source": {"name": "tasks", "rows_per_category": 20}}}
    recipe = harness.recipe(**changes).resolved()
    assets = prepare(recipe, Sink())
    settled = settle(recipe, assets)
    worlds: dict[str, World] = {}
    for name in METHODS:
        its = settled.model_copy(update={"algorithm": Algorithm.resolve(name)})
        (folder / name).mkdir()
        worlds[name] = World(its, folder / name, assets, Sink())
    states: dict[str, ServerState] = {n: w.recipe.algorithm.init(assets.initial) for n, w in worlds.items()}
    taken: dict[str, list[float]] = {name: [] for name in METHODS}
    for lap in range(UNCOUNTED + laps):
        for name, world in worlds.items():
            began = time.perf_counter()
            states[name], _ = world.engine.round(world.crew, states[name], world.clients)
            world.memories.commit(states[name].round)
            if lap >= UNCOUNTED:
                taken[name].append(time.perf_counter() - began)
    ratios = {n: statistics.median(a / b for a, b in zip(taken[n], taken["fedavg"], strict=True)) for n in METHODS}
    return {
        "model": model,
        "cohort": settled.runtime.cohort,
        "laps": laps,
        "steps": steps,
        "seconds_a_round": {name: round(statistics.median(values), 3) for name, values in taken.items()},
        "ratio_to_fedavg": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }


def memory(method: str, clients: int) -> dict[str, Any]:
    """Return the memory of a federation of which ten clients train in each of 200 rounds."""
    folder = Path(tempfile.mkdtemp())
    changes: dict[str, Any] = {
        "model": _tiny(folder),
        "data": {"source": {"name": "tasks", "rows_per_category": 12_000, "categories": ["units"]}, "clients": clients},
        "algorithm": method,
        "trainer": {"steps": 1, "batch": 1},
        "sampler": {"count": 10},
        "rounds": 200,
    }
    world, _, settled = harness.build(harness.recipe(**changes), folder / "run", Sink())
    state = world.recipe.algorithm.init(world.assets.initial)
    for _ in range(settled.rounds):
        cohort = settled.sampler.cohort(state.round, world.clients, settled.seed)
        state, _ = world.engine.round(world.crew, state, cohort)
        world.memories.commit(state.round)
    return {"method": method, "clients": clients, "peak_gb": round(harness.peak_rss(), 4)}


def _tiny(folder: Path) -> dict[str, str]:
    from tests.tiny import tiny_model_folder

    return {"name": str(tiny_model_folder(folder / "tiny")), "dtype": "fp32"}


def main() -> None:
    """Measure what is asked for and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument("--model", choices=[harness.MODEL, "tiny"], default=harness.MODEL)
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a client and round")
    parser.add_argument("--point", help="measure this one (JSON) in this very process")
    asked = parser.parse_args()
    if asked.point:
        point = json.loads(asked.point)
        print(json.dumps(memory(**point) if "method" in point else seconds(**point)))
        return
    from fedloom import allocator

    run = lambda point: harness.child([__file__, "--point", json.dumps(point)], allocator.for_child())
    results: dict[str, Any] = {}
    if "time" in asked.only:
        results["time"] = run({"model": asked.model, "laps": asked.laps, "steps": asked.steps})
    if "memory" in asked.only:
        points = [run({"method": name, "clients": n}) for name in METHODS for n in FLEETS]
        results["memory"] = points
        gb = {(one["method"], one["clients"]): one["peak_gb"] for one in points}
        results["memory_ratio"] = {name: round(gb[name, FLEETS[1]] / gb[name, FLEETS[0]], 3) for name in METHODS}
    if asked.model == "tiny":
        print(json.dumps({"machine": harness.machine(), "results": results}, indent=1))
    else:
        harness.save("personal", {"machine": harness.machine(), "results": results})


if __name__ == "__main__":
    main()
