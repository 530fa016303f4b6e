"""What the benchmarks share: real rows of GSM8K, our trainer on them, child processes, and a word about the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedloom import recipe as recipes
from fedloom.assets import Assets, prepare
from fedloom.client.trainer import step_rows
from fedloom.outcome import peak_rss as outcome_peak
from fedloom.recipe import Recipe
from fedloom.settle import settle
from fedloom.tracking import Sink, Step
from fedloom.types import ServerState
from fedloom.world import World

MODEL = "smollm2-135m"


def recipe(**changes: Any) -> Recipe:
    """Return FedAvg with LoRA r = 8 on all linear layers of SmolLM2-135M in bf16: GSM8K rows, 8 a step, AdamW."""
    tree: dict[str, Any] = {
        "model": {"name": MODEL, "dtype": "bf16", "device": "cpu"},
        "adapter": {"name": "lora", "r": 8, "alpha": 16},
        "data": {"source": {"name": "gsm8k"}, "clients": 4, "partition": "iid", "max_tokens": 512},
        "trainer": {"optimizer": "adamw", "lr": 1e-3, "steps": 2, "batch": 8},
        "runtime": {"threads": 2},
        "rounds": 2,
        "evaluate": [],
    }
    return recipes.load(recipes.overlay(tree, changes))


class Clock(Sink):
    """Notes every optimiser step: (seconds since the one before, tokens, loss)."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int, float]] = []
        self.last = time.perf_counter()

    def on(self, event: object) -> None:
        if isinstance(event, Step):
            now = time.perf_counter()
            self.steps.append((now - self.last, event.tokens, event.loss))
            self.last = now


def build(asked: Recipe, folder: Path, sink: Sink) -> tuple[World, Assets, Recipe]:
    """Return the world of a recipe, with everything chosen that was `auto`."""
    resolved = asked.resolved()
    assets = prepare(resolved, sink)
    settled = settle(resolved, assets)
    return World(settled, folder, assets, sink), assets, settled


def rounds(world: World, count: int) -> tuple[ServerState, list[Any]]:
    """Run `count` rounds with all clients; return the state and the reports."""
    state, reports = world.recipe.algorithm.init(world.assets.initial), []
    for _ in range(count):
        state, report = world.engine.round(world.crew, state, world.clients)
        reports.append(report)
    return state, reports


def order(world: World, round_: int, client: str) -> list[list[int]]:
    """Return the row numbers of each of a client's steps in a round."""
    lengths = world.rows(client).lengths()
    return step_rows(world.recipe.trainer, lengths, world.recipe.seed, round_, client)


def peak_rss() -> float:
    """Return the most memory that this process has held, in GB."""
    return outcome_peak() / 1e9


def child(arguments: Sequence[str], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run this benchmark's file with other arguments in a process of its own, and return the JSON it prints last."""
    whole = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(env or {})}
    ran = subprocess.run([sys.executable, *arguments], env=whole, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{ran.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "bf16": "amx" if "amx_bf16" in flags else "avx512" if "avx512_bf16" in flags else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(name: str, result: Mapping[str, Any]) -> None:
    """Print a result and keep it in benchmarks/results/."""
    text = json.dumps(result, indent=1)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
