"""Seconds and memory of the server's half of one round: 20 clients, LoRA r = 8 on all linear layers of SmolLM2-135M.

    python benchmarks/server.py [--clients 20] [--only flexlora ...]

Clients do not train: their updates are made up, in the shapes and dtype of the real ones. Counted is what the server
does with the decoded updates: `combine`, then `step`. The aggregation error, which every round logs, is timed apart.
Each method is a process of its own, one after another.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import harness

METHODS = ("fedavg", "ffa-lora", "flexlora", "hetlora", "flora", "fedex", "lora-fair", "fedsvd", "rac-lora")


def measure(name: str, count: int) -> dict[str, Any]:
    """Return the seconds and the memory of one method."""
    from fedloom.algorithms import Algorithm
    from fedloom.client.models import skeleton
    from fedloom.runtime.aggregation import AggregationError
    from fedloom.survey import Rehearsal, Shapes
    from fedloom.tensors import nbytes

    torch.set_num_threads(2)
    recipe, clients = harness.recipe().resolved(), [f"client-{i}" for i in range(count)]
    attached = recipe.adapter.attach(skeleton(recipe.model))
    layers = {m: (layer.d_out, layer.d_in) for m, layer in attached.layers.items()}
    ranks = recipe.adapter.lora_ranks(attached, clients)
    run = Rehearsal(
        Algorithm.known[name](), recipe, clients, Shapes(layers, dict.fromkeys(layers, 1), ranks, torch.float32)
    )
    algorithm, server = run.algorithm, run.server
    state = run.drive(algorithm.prepare(server, algorithm.init(run.draw(0))))
    updates = [run.train(client, 0, algorithm.broadcast(server, state, client))[0] for client in clients]
    began, before = time.perf_counter(), harness.peak_rss()
    combined = run.drive(algorithm.combine(server, state, updates))
    after = run.drive(algorithm.step(server, state, combined))
    seconds, peak = time.perf_counter() - began, harness.peak_rss()
    began, error = time.perf_counter(), AggregationError(algorithm, server, state)
    for _ in error.watched(iter(updates)):
        pass
    found = error.against(after)
    return {
        "method": name,
        "seconds": round(seconds, 2),
        "error_seconds": round(time.perf_counter() - began, 2),
        "aggregation_error": found,
        "peak_gb": round(peak, 2),
        "more_gb": round(peak - before, 2),
        "updates_gb": round(sum(nbytes(g.tensors) for u in updates for g in u.message.groups.values()) / 1e9, 2),
    }


def main() -> None:
    """Measure each method and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=list(METHODS))
    parser.add_argument("--method", help="measure this one in this very process")
    asked = parser.parse_args()
    if asked.method:
        print(json.dumps(measure(asked.method, asked.clients)))
        return
    results = []
    for name in asked.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results.append(harness.child([__file__, "--method", name, f"--clients={asked.clients}"]))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    harness.save("server", {"machine": harness.machine(), "clients": asked.clients, "results": results})


if __name__ == "__main__":
    main()
