"""Kinds of parameter-efficient fine-tuning with federated averaging at equal trained tokens: one split, one table.

    python examples/compare_kinds.py [--kinds lora dora ...] [--tokens 1200] [--model smollm2-135m] [--out runs/kinds]

The built-in task suite over four clients with three categories each. All kinds take as many input tokens a round, each
at a learning rate of its own. Every run is a process of its own, so that its peak memory is its own; `score` is the
exact match on new items of all categories, `loss` that of the clients' own test rows, `up` and `down` the bytes of the
whole run. Finished runs are not run again; the figures stand in OUT/table.json too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from fedloom.units import human_bytes

KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"name": "lora", "r": 8, "alpha": 16}, 3e-3),
    "rslora": ({"name": "rslora", "r": 8, "alpha": 16}, 3e-3),
    "dora": ({"name": "dora", "r": 8, "alpha": 16}, 3e-3),
    "ada-lora": ({"name": "ada-lora", "r": 12, "target": 8, "final": 1}, 3e-3),
    "ia3": ({"name": "ia3"}, 1e-2),
    "prefix-tuning": ({"name": "prefix-tuning", "tokens": 20}, 1e-2),
    "prompt-tuning": ({"name": "prompt-tuning", "tokens": 20}, 3e-2),
    "p-tuning": ({"name": "p-tuning", "tokens": 20}, 5e-3),
    "full": ({"name": "full"}, 5e-5),
}
"""Kind -> its adapter and learning rate."""


def recipe(asked: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Return the recipe of one run."""
    adapter, lr = KINDS[kind]
    return {
        "model": {"name": asked.model, "attention": "eager"},
        "runtime": {"threads": asked.threads},
        "adapter": adapter,
        "data": {
            "source": {"name": "tasks", "rows_per_category": asked.rows},
            "clients": 4,
            "partition": {"name": "by", "key": "category"},
            "max_tokens": asked.max_tokens,
            "system": "Answer with the result only.",
        },
        "trainer": {"optimizer": "adamw", "lr": lr, "tokens": asked.tokens, "batch": 8, "schedule": "cosine"},
        "checkpoint": {"keep": 1},
        "algorithm": "fedavg",
        "rounds": asked.rounds,
        "evaluate": [
            {"name": "loss", "every": 0},
            {"name": "tasks", "items_per_category": asked.items, "max_new_tokens": 16},
        ],
    }


def run(asked: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Run one kind in a process of its own, or read what an earlier call left, and return the figures of its row."""
    folder = asked.out / kind
    if not (folder / "summary.json").is_file():
        path = asked.out / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(recipe(asked, kind), sort_keys=False), encoding="utf-8")
        again = ["--overwrite"] if folder.exists() else []
        subprocess.run(
            [sys.executable, "-m", "fedloom", "run", str(path), "--out", str(folder), *again],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found = summary["metrics"]["federated"]
    return {
        "kind": kind,
        "score": found["tasks"]["exact_match"],
        "loss": found["loss"]["loss"],
        "parameters": summary["trainable_parameters"],
        "tokens": summary["trained_tokens"],
        "up": summary["bytes_up"],
        "down": summary["bytes_down"],
        "memory": summary["peak_rss_bytes"],
        "seconds": summary["round_seconds"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for i, head in enumerate(rows[0]):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        scores = (f"{row['score']:.1%}", f"{row['loss']:.3f}")
        counts = (f"{row['parameters']:,}", f"{row['tokens']:,}")
        sizes = (human_bytes(row[name]) for name in ("up", "down", "memory"))
        table.add_row(row["kind"], *scores, *counts, *sizes, f"{row['seconds']:.0f}")
    Console(width=max(120, Console().width)).print(table)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--tokens", type=int, default=1200, help="input tokens of a client in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=40, help="rows of each of the 12 categories")
    parser.add_argument("--items", type=int, default=10, help="test items of each category")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/kinds"))
    return parser.parse_args()


def main() -> None:
    """Run all kinds and print one table."""
    asked = arguments()
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, kind in enumerate(asked.kinds):
        print(f"{i + 1} of {len(asked.kinds)}: {kind}", file=sys.stderr, flush=True)
        rows.append(run(asked, kind))
    (asked.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows)


if __name__ == "__main__":
    main()
