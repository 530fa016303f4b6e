"""Answers a second: ours against transformers' plain `generate`, SmolLM2-135M in bf16, GSM8K prompts, greedy.

Both answer the same prompts in one process and take turns, several times, so that what else the machine does falls on
both alike; beside the wall clock stands the process's own CPU time, which others' work hardly moves. Plain `generate`
gets its prompts sorted by length and padded on the left, 16 at a time, and its model as transformers loads it; ours is
as `fedloom run` has it, with the lean layers and the adapter's layers in place.

Tokens are counted up to each answer's end, as tokenised from its text.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import harness


def prompts(tokenizer: Any, count: int) -> list[str]:
    """Return GSM8K test problems with the chat template."""
    from fedloom.data.named import Gsm8k

    rows = Gsm8k(split="test").rows(0)[:count]
    ask = [[{"role": "user", "content": row.turns[0].text}] for row in rows]
    return [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in ask]


def plain(model: Any, tokenizer: Any, texts: list[str], batch: int, longest: int) -> list[str]:
    """Answer with transformers' `generate`."""
    order = sorted(range(len(texts)), key=lambda i: -len(tokenizer(texts[i])["input_ids"]))
    found = [""] * len(texts)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        ids = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=longest, do_sample=False)
        for i, row in zip(rows, out[:, ids["input_ids"].shape[1] :], strict=True):
            found[i] = tokenizer.decode(row, skip_special_tokens=True)
    return found


def timed(work: Callable[[], list[str]], tokenizer: Any) -> dict[str, float]:
    """Return tokens, seconds and CPU-seconds of one go."""
    wall, cpu = time.perf_counter(), time.process_time()
    texts = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    return {"tokens": tokens, "wall": wall, "cpu": cpu}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[32], help="batch_rows of ours")
    asked = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedloom.client.bundled import locate
    from fedloom.client.generate import Decoding, answers

    world, assets, _ = harness.build(harness.recipe(), Path(mkdtemp()), harness.Sink())
    torch.set_num_threads(asked.threads)
    model = assets.loaded.model
    place = locate(harness.MODEL, None, weights=True, code=False, notify=lambda text: None)
    other = AutoModelForCausalLM.from_pretrained(place.folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(place.folder, padding_side="left")
    texts = prompts(tokenizer, asked.prompts)

    def ours(rows: int) -> list[str]:
        with assets.attached.off():
            return answers(model, assets.loaded.tokenizer, texts, asked.tokens, Decoding(batch_rows=rows))

    kinds: dict[str, Callable[[], list[str]]] = {"plain-16": lambda: plain(other, tokenizer, texts, 16, asked.tokens)}
    kinds |= {f"fedloom-{rows}": lambda rows=rows: ours(rows) for rows in asked.rows}  # type: ignore[misc]
    goes: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for _ in range(asked.turns):
        for name, work in kinds.items():
            goes[name].append(timed(work, tokenizer))
            print(name, goes[name][-1], file=sys.stderr, flush=True)
    results = {}
    for name, every in goes.items():
        rates = {key: statistics.median(one["tokens"] / one[key] for one in every) for key in ("wall", "cpu")}
        results[name] = {f"tokens_per_{key}_second": round(rate, 1) for key, rate in rates.items()}
    for found in results.values():
        for key in ("wall", "cpu"):
            rate = f"tokens_per_{key}_second"
            found[f"times_plain_{key}"] = round(found[rate] / results["plain-16"][rate], 2)
    harness.save("generation", {"machine": harness.machine(), "asked": vars(asked), "goes": goes, "results": results})
    world.crew.close()


if __name__ == "__main__":
    main()
