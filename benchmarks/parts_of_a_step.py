"""Where the time of a training step goes, and the rate of the kernels it stands on.

    python benchmarks/parts_of_a_step.py [--threads 1] [--steps 3]

Timers around each part of fedloom's step on GSM8K rows (8 a step, SmolLM2-135M, bf16, LoRA r = 8); then the same with
padded rows; then attention of one row by torch's fused kernel and by ours, and the rate of the base model's largest
product by number of rows. Prints JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import harness

from fedloom.client import attention, fit, lean, lora, objectives
from fedloom.client.batches import Piece, Pieces

PARTS: list[tuple[Any, str, str]] = [
    (lora, "multiply", "lora"),
    (lora, "add_product", "lora"),
    (lora, "correlate", "lora"),
    (lora._Fused, "forward", "linear layers"),
    (lora._Fused, "backward", "linear layers"),
    (attention._Packed, "forward", "attention"),
    (attention._Packed, "backward", "attention"),
    (objectives._ChunkedNll, "forward", "logits and loss"),
    (lean._RmsNorm, "forward", "norms and gated products"),
    (lean._RmsNorm, "backward", "norms and gated products"),
    (lean._SwiGlu, "forward", "norms and gated products"),
    (lean._SwiGlu, "backward", "norms and gated products"),
    (fit._Lane, "step", "optimiser"),
]


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Within the context, add the time spent in each part."""
    kept = [(owner, name, vars(owner)[name]) for owner, name, _ in PARTS]
    for owner, name, part in PARTS:
        setattr(owner, name, _timer(getattr(owner, name), part, seconds, isinstance(vars(owner)[name], staticmethod)))
    try:
        yield
    finally:
        for owner, name, before in kept:
            setattr(owner, name, before)


def _timer(work: Callable[..., Any], part: str, seconds: dict[str, float], static: bool) -> Any:
    def run(*args: Any, **more: Any) -> Any:
        began = time.perf_counter()
        out = work(*args, **more)
        seconds[part] += time.perf_counter() - began
        return out

    return staticmethod(run) if static else run


def step(threads: int, steps: int, packing: bool) -> dict[str, Any]:
    """Return tokens a second, and each part's share, of one client's steps after a first round."""
    changes = {"data": {"clients": 1}, "trainer": {"steps": steps, "packing": packing}, "runtime": {"threads": threads}}
    world, _, _ = harness.build(harness.recipe(**changes), Path(tempfile.mkdtemp()), harness.Sink())
    state, seconds = world.recipe.algorithm.init(world.assets.initial), defaultdict[str, float](float)
    state, _ = world.engine.round(world.crew, state, world.clients)
    with timed(seconds):
        _, report = world.engine.round(world.crew, state, world.clients)
    seconds["frozen base"] = seconds.pop("linear layers") - seconds["lora"]
    shares = {part: round(s / report.fit_seconds, 3) for part, s in sorted(seconds.items(), key=lambda one: -one[1])}
    return {"tokens_per_second": round(report.tokens / report.fit_seconds, 1), "shares": shares}


def row(tokens: int) -> dict[str, float]:
    """Return the ms of one row's attention, forward and backward, by both kernels: 9 heads on 3, of 64 numbers."""
    q = torch.randn(tokens, 9, 64, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(tokens, 3, 64, dtype=torch.bfloat16, requires_grad=True) for _ in "kv")
    pieces = Pieces((Piece(0, tokens),))

    def ours() -> None:
        attention._Packed.apply(q, k, v, pieces, 0.125, None).sum().backward()

    def fused() -> None:
        heads = [x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))]
        functional.scaled_dot_product_attention(*heads, is_causal=True).sum().backward()

    return {"pieces": round(1000 * _best(ours), 2), "fused": round(1000 * _best(fused), 2)}


def rate(rows: int) -> float:
    """Return the GFLOP/s of the product of `rows` rows with the gate and up weights."""
    x, weight = torch.randn(rows, 576, dtype=torch.bfloat16), torch.randn(3072, 576, dtype=torch.bfloat16)
    return round(2 * rows * 576 * 3072 / _best(lambda: functional.linear(x, weight)) / 1e9, 1)


def _best(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(8):
        began = time.perf_counter()
        for _ in range(5):
            work()
        times.append((time.perf_counter() - began) / 5)
    return min(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--started", action="store_true", help="the allocator is in force already")
    asked = parser.parse_args()
    if not asked.started:
        from fedloom import allocator

        os.execve(sys.executable, [sys.executable, *sys.argv, "--started"], allocator.for_child())
    torch.set_num_threads(asked.threads)
    result = {
        "machine": harness.machine(),
        "threads": asked.threads,
        "packed": step(asked.threads, asked.steps, True),
        "padded": step(asked.threads, asked.steps, False),
        "attention_ms": {tokens: row(tokens) for tokens in (56, 230, 400)},
        "product_gflops": {rows: rate(rows) for rows in (56, 230, 450, 1024)},
    }
    harness.save("parts_of_a_step", result)


if __name__ == "__main__":
    main()
