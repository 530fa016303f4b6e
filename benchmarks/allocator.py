"""What a memory allocator brings: the same training steps under each one that this machine has, in one run.

    python benchmarks/allocator.py [--turns 5] [--threads 1] [--steps 2] [--rows 4]

Each allocator has a process of its own, with the environment that the `fedloom` command would give it. The processes
take turns, so that whatever else the machine does hits all of them; the figure to read is the ratio of plain glibc's
processor seconds to each one's in the same turn (processor seconds, since the time of other programs is not in them).
A turn is one client's round of LoRA r = 8 on a bf16 model; the first one is not counted. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import numpy as np

from fedloom import allocator

Figures = dict[str, float]


def training(model: str, steps: int, rows: int) -> Callable[[], float]:
    """Return a client's round on random rows of 60 to 220 tokens; all that depends on fedloom's API is in here."""
    from fedloom.client.adapters import Lora
    from fedloom.client.fit import Job, fit
    from fedloom.client.models import Model, load_model
    from fedloom.client.objectives import Sft
    from fedloom.client.trainer import Bench, Rows, Trainer
    from fedloom.data.encode import Encoded
    from fedloom.types import Fit

    stream, count = np.random.default_rng(0), steps * rows
    lengths = stream.integers(60, 220, count)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    train = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    ids = stream.integers(3, 40000, starts[-1]).astype(np.int32)
    some = Rows(Encoded(ids, train, starts, lengths), np.arange(count))
    loaded = load_model(Model(name=model, dtype="bf16", device="cpu"))
    attached = Lora(r=8, alpha=16).attach(loaded.model)
    trainer = Trainer(steps=steps, batch=rows, packing=True, checkpointing=False)
    bench, start = Bench(loaded.model, attached, Sft(), trainer, 0, 1), attached.init(0)
    return lambda: fit(bench, [Job("client", 0, some, Fit(start))])[0].losses[-1]


def child(asked: argparse.Namespace) -> None:
    """Take a turn for each line of the standard input, and tell its figures."""
    import torch

    torch.set_num_threads(asked.threads)
    if asked.child == "glibc tuned" and not allocator.tune():
        raise SystemExit("glibc refuses to be tuned")
    turn = training(asked.model, asked.steps, asked.rows)
    turn()
    _tell({"in_force": allocator.found()})
    for _ in sys.stdin:
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        loss = turn()
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        faults = after.ru_minflt - before.ru_minflt
        _tell({"seconds": seconds, "cpu": cpu, "faults": faults, "peak": after.ru_maxrss / 1e6, "loss": loss})


def _tell(values: Mapping[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def environments() -> dict[str, dict[str, str]]:
    """Return the environment of each allocator that is here, plain glibc first; one that is in force here is left."""
    base = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "GLIBC_TUNABLES")}
    base.pop(allocator.SWITCH, None)
    choices = {one.name: allocator.choose(one.name) for one in allocator.PRELOADS}
    preloads = {name: allocator.environment(*choice, base) for name, choice in choices.items() if choice}
    return {"glibc": base, "glibc tuned": base, **preloads}


def measure(asked: argparse.Namespace) -> dict[str, list[Figures]]:
    """Return the figures of every turn, by allocator."""
    processes: dict[str, subprocess.Popen[str]] = {}
    turns: dict[str, list[Figures]] = {}
    try:
        for name, environment in environments().items():
            words = [sys.executable, __file__, *sys.argv[1:], "--child", name]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            processes[name], turns[name] = subprocess.Popen(words, env=environment, **pipes), []
            in_force = _hear(processes[name].stdout)["in_force"]
            if in_force != name:
                raise SystemExit(f"{name} was asked for, {in_force} is in force")
        for _ in range(asked.turns):
            for name, process in processes.items():
                print("go", file=process.stdin, flush=True)
                turns[name].append(_hear(process.stdout))
    finally:
        for process in processes.values():
            process.kill()
    return turns


def _hear(pipe: IO[str] | None) -> dict[str, Any]:
    line = pipe.readline() if pipe else ""
    if not line:
        raise SystemExit("a process ended before its turn; its error is above")
    heard: dict[str, Any] = json.loads(line)
    return heard


def summary(turns: Sequence[Figures], plain: Sequence[Figures]) -> dict[str, Any]:
    """Return one allocator's figures: medians over turns, and its speed relative to plain glibc's."""
    ratios = [p["cpu"] / one["cpu"] for p, one in zip(plain, turns, strict=True)]
    middle = {key: statistics.median(one[key] for one in turns) for key in ("seconds", "cpu", "faults")}
    return {
        "times_as_fast_as_glibc": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "cpu_seconds": round(middle["cpu"], 2),
        "wall_seconds": round(middle["seconds"], 2),
        "page_faults": round(middle["faults"]),
        "peak_rss_gb": round(turns[-1]["peak"], 2),
        "loss": round(turns[-1]["loss"], 4),
    }


def main() -> None:
    """Measure all and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="short name, folder or hub id")
    parser.add_argument("--turns", type=int, default=5, help="counted turns of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps of a turn")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked)
        return
    turns = measure(asked)
    turn = {"model": asked.model, "steps": asked.steps, "rows": asked.rows, "threads": asked.threads}
    result = {"turn": turn, **{name: summary(taken, turns["glibc"]) for name, taken in turns.items()}}
    lines = [f" {json.dumps(name)}: {json.dumps(figures)}" for name, figures in result.items()]
    print("{\n" + ",\n".join(lines) + "\n}")  # a line for each, to compare them


if __name__ == "__main__":
    main()
