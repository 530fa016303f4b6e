"""Ten ways to federate LoRA at equal rank, those that take mixed ranks with them too: one split, one seed, one table.

    python examples/compare_methods.py [--rounds 5] [--rows 40] [--model smollm2-135m] [--out runs/methods]

The built-in task suite over four clients with three categories each; every run is an ordinary run folder, and finished
ones are not run again. `score` is the exact match on new items of all categories, `worst client` the loss of the worst
client on its own test rows, `error` the aggregation error of the last round.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import fedloom
from fedloom.units import human_bytes

METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {},
    "fedadam": {"algorithm": "fedavg", "server": {"optimizer": "fedadam", "lr": 0.003}},
    "ffa-lora": {},
    "rolora": {},
    "fedsa-lora": {},
    "flexlora": {},
    "flora": {},
    "fedex": {},
    "lora-fair": {},
}
MIXED = ("flexlora", "hetlora", "flora")
RANKS = [2, 4, 8, 8]


def recipe(asked: argparse.Namespace, method: str, changes: dict[str, Any], ranks: list[int]) -> dict[str, Any]:
    """Return the recipe of one run."""
    return {
        "model": {"name": asked.model, "attention": "eager"},
        "adapter": {"name": "lora", "r": 8, "alpha": 16, "ranks": ranks},
        "data": {
            "source": {"name": "tasks", "rows_per_category": asked.rows},
            "clients": 4,
            "partition": {"name": "by", "key": "category"},
            "max_tokens": 160,
            "system": "Answer with the result only.",
        },
        "trainer": {"optimizer": "adamw", "lr": 3e-3, "steps": asked.steps, "batch": 8, "schedule": "cosine"},
        "algorithm": method,
        "rounds": asked.rounds,
        "evaluate": ["loss", {"name": "tasks", "items_per_category": asked.items, "max_new_tokens": 16}],
        **changes,
    }


def run(asked: argparse.Namespace, label: str, tree: dict[str, Any]) -> dict[str, Any]:
    """Run one recipe, or read what an earlier call left, and return the figures of its row."""
    folder = asked.out / label.replace(" ", "-")
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    else:
        summary = dict(fedloom.run(tree, out=folder, overwrite=folder.exists()).summary)
    found = next(iter(value for name, value in summary["metrics"].items() if name != "base"))
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    errors = [line["value"] for line in logged if line["name"] == "aggregation_error"]
    return {
        "method": label,
        "score": found["tasks"]["exact_match"],
        "loss": found["loss"]["loss"],
        "worst client": found["loss"]["loss_worst10"],
        "up": summary["bytes_up"],
        "down": summary["bytes_down"],
        "error": errors[-1] if errors else None,
        "seconds": summary["round_seconds"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for i, head in enumerate(rows[0]):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        error = "" if row["error"] is None else "0" if row["error"] < 1e-5 else f"{row['error']:.1%}"
        table.add_row(
            row["method"],
            f"{row['score']:.1%}",
            f"{row['loss']:.3f}",
            f"{row['worst client']:.3f}",
            human_bytes(row["up"]),
            human_bytes(row["down"]),
            error,
            f"{row['seconds']:.0f}",
        )
    Console().print(table)


def main() -> None:
    """Run all methods and print one table; the rows stand in OUT/table.json too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps of a client in a round")
    parser.add_argument("--rows", type=int, default=40, help="rows of each of the 12 categories")
    parser.add_argument("--items", type=int, default=10, help="test items of each category")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    asked = parser.parse_args()
    todo = [(name, name, changes, []) for name, changes in METHODS.items()]
    todo += [(f"{name} mixed", name, {}, RANKS) for name in MIXED]
    rows = []
    for i, (label, method, changes, ranks) in enumerate(todo):
        print(f"{i + 1} of {len(todo)}: {label}", file=sys.stderr, flush=True)
        rows.append(run(asked, label, recipe(asked, method, changes, ranks)))
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows)


if __name__ == "__main__":
    main()
