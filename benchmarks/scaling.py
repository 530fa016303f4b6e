"""How fedloom's training speed and memory change with cohort, rank, row length and clients, one thing at a time.

    python benchmarks/scaling.py [--only cohort rank length fleet]

SmolLM2-135M in bf16, LoRA on all linear layers. Every point is a process of its own under the command's allocator;
tokens a second are those after a first, uncounted round. `cohort`: batch size 1 (FederatedScope-LLM's setting), rows of
about 56 tokens (the task suite) and of about 230 (GSM8K); cohort 1 is one client after another. `fleet`: a model of
1 MB, 10 of so many clients sampled a round; what is counted is the start-up, the rest of a round, and memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import harness

POINTS: dict[str, list[dict[str, Any]]] = {
    "cohort": [
        *({"rows": "tasks", "batch": 1, "clients": max(8, k), "cohort": k} for k in (1, 2, 4, 8, 16, 32)),
        *({"rows": "gsm8k", "batch": 1, "clients": max(8, k), "cohort": k} for k in (1, 2, 4, 8, 16, 32)),
        *({"rows": "tasks", "batch": 8, "clients": 8, "cohort": k} for k in (1, 8)),
    ],
    "rank": [{"rows": "gsm8k", "batch": 8, "clients": 2, "r": r} for r in (4, 8, 16, 32, 64)],
    "length": [{"rows": n, "batch": 8, "clients": 2} for n in (64, 128, 256, 512)],
    "fleet": [{"fleet": n} for n in (10, 100, 1000, 10_000)],
}


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Return the speed and memory at one point."""
    changes: dict[str, Any] = {
        "data": {"clients": point["clients"]},
        "trainer": {"steps": 2, "batch": point["batch"], "micro_tokens": 4096 if point.get("cohort", 1) > 1 else 1024},
        "adapter": {"r": point.get("r", 8), "alpha": 16},
        "runtime": {"cohort": point.get("cohort", 1)},
        "rounds": 2,
    }
    if point["rows"] == "tasks":
        changes["data"]["source"] = {"name": "tasks", "rows_per_category": 20}
    elif point["rows"] != "gsm8k":
        changes["data"].update(source=str(_cut(point["rows"])), max_tokens=2 * point["rows"])
    clock = harness.Clock()
    world, assets, _ = harness.build(harness.recipe(**changes), Path(tempfile.mkdtemp()), clock)
    state = world.recipe.algorithm.init(world.assets.initial)
    seconds = tokens = 0.0
    for counted in (False, True):
        began = time.perf_counter()
        state, report = world.engine.round(world.crew, state, world.clients)
        if counted:
            seconds, tokens = report.fit_seconds, report.tokens
            outside = time.perf_counter() - began - report.fit_seconds
    return {
        **point,
        "mean_tokens": round(float(np.diff(assets.federation.encoded.starts).mean()), 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "outside_ms_a_client": round(1000 * outside / point["clients"], 1),
        "peak_gb": round(harness.peak_rss(), 2),
    }


def fleet(clients: int) -> dict[str, Any]:
    """Return the seconds of the start-up, the milliseconds of a round beside fitting and the memory of a federation."""
    from tests.tiny import tiny_model_folder

    folder = Path(tempfile.mkdtemp())
    changes: dict[str, Any] = {
        "model": {"name": str(tiny_model_folder(folder / "tiny")), "dtype": "fp32"},
        "data": {"source": {"name": "tasks", "rows_per_category": 12_000, "categories": ["units"]}, "clients": clients},
        "trainer": {"steps": 1, "batch": 1},
        "sampler": {"count": 10},
        "rounds": 6,
    }
    began = time.perf_counter()
    world, _, settled = harness.build(harness.recipe(**changes), folder / "run", harness.Sink())
    setup, state, over = time.perf_counter() - began, world.recipe.algorithm.init(world.assets.initial), []
    for _ in range(settled.rounds):
        began = time.perf_counter()
        cohort = settled.sampler.cohort(state.round, world.clients, settled.seed)
        state, report = world.engine.round(world.crew, state, cohort)
        over.append(time.perf_counter() - began - report.fit_seconds)
    return {
        "clients": clients,
        "setup_seconds": round(setup, 2),
        "outside_ms_a_round": round(1000 * sorted(over[1:])[2], 1),
        "peak_gb": round(harness.peak_rss(), 3),
    }


def _cut(length: int) -> Path:
    """Write rows of GSM8K's text that have about `length` tokens each, and return the file."""
    from fedloom.data.named import Gsm8k

    words = " ".join(f"{turn.text}" for row in Gsm8k().rows(0)[:400] for turn in row.turns).split()
    size, file = int((length - 45) / 1.45), Path(tempfile.mkdtemp()) / "rows.jsonl"
    size = max(4, size)
    lines = [words[i : i + size] for i in range(0, 64 * size, size)]
    pairs = [{"instruction": "Go on.", "output": " ".join(line)} for line in lines]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return file


def main() -> None:
    """Measure the points that are asked for and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(POINTS), default=list(POINTS))
    parser.add_argument("--point", help="measure this one (JSON) in this very process")
    asked = parser.parse_args()
    if asked.point:
        point = json.loads(asked.point)
        print(json.dumps(fleet(point["fleet"]) if "fleet" in point else measure(point)))
        return
    from fedloom import allocator

    kept = Path(__file__).parent / "results" / "scaling.json"
    results: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))["results"] if kept.is_file() else {}
    for name in asked.only:
        results[name] = []
        for point in POINTS[name]:
            print(f"{name}: {point} ...", file=sys.stderr, flush=True)
            results[name].append(harness.child([__file__, "--point", json.dumps(point)], allocator.for_child()))
            harness.save("scaling", {"machine": harness.machine(), "results": results})


if __name__ == "__main__":
    main()
