"""Personal methods under strong label skew, against one shared adapter: the same splits, several seeds, one table.

    python examples/compare_personal.py [--methods fedavg ditto ...] [--seeds 0 1 2] [--model smollm2-135m] [--out DIR]

The built-in task suite over eight clients, most rows of a category with few of them; two clients are kept out of
training. Every client's own adapter answers the client's own test rows. `own` is the mean over clients of the share of
right answers; `gain` the mean difference to `fedavg` over the same clients and seeds, with its 95 % bootstrap interval;
`worst` the worst client, a mean over seeds; `adapted` what some more steps on the client's own rows make of it;
`unseen` and `unseen adapted` the same for clients kept out of training. Bytes are of a whole run; `tokens` are trained
ones, which differ, as some methods train two adapters. Every run is an ordinary run folder, and finished ones are not
run again; the figures stand in OUT/table.json too, with each client's share of right answers, seed by seed. A second
table shows these for the first seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

import fedloom
from fedloom.evaluate.stats import paired_bootstrap
from fedloom.units import human_bytes

SHARED = "fedavg"
METHODS: dict[str, dict[str, Any]] = {
    SHARED: {"name": "fedavg"},
    "local": {"name": "local"},
    "fedsa-lora": {"name": "fedsa-lora"},
    "fedper": {"name": "fedper", "private": ["*.v_proj.*"]},
    "fedrep": {"name": "fedrep", "private": ["*.lora_B"]},
    "ditto": {"name": "ditto", "lam": 0.1},
    "pfedme": {"name": "pfedme", "lam": 1, "outer_lr": 0.5},
    "admm": {"name": "admm", "rho": 0.1},
    "fedamp": {"name": "fedamp", "lam": 0.5, "sigma": 1},
    "mira": {"name": "mira", "coupling": 0.5},
    "clustered": {"name": "clustered", "warmup": 1, "distance": 0.7},
    "fedem": {"name": "fedem", "components": 3},
    "feddpa-f": {"name": "feddpa-f", "local_steps": 10},
    "feddpa-t": {"name": "feddpa-t"},
    "fedalt": {"name": "fedalt"},
    "pf2lora": {"name": "pf2lora", "rank": 2},
}
COLUMNS = ("own", "gain", "worst", "adapted", "unseen", "unseen adapted", "up", "down", "tokens", "seconds")
Scores = dict[tuple[int, str], float]
"""(seed, client) -> share of right answers."""


@dataclass(frozen=True)
class Run:
    """What one run found.

    Attributes:
        scores: regime -> client -> share of right answers.  own: the regime that was trained.
    """

    scores: Mapping[str, Mapping[str, float]]
    own: str
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A method's figures; None: not measured.

    Attributes:
        clients: of each seed, client -> its own adapter's share of right answers.
    """

    method: str
    own: float
    gain: tuple[float, float, float] | None
    worst: float
    adapted: float | None
    unseen: float | None
    unseen_adapted: float | None
    up: float
    down: float
    tokens: float
    seconds: float
    clients: Mapping[str, Mapping[str, float]]


def recipe(asked: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Return the recipe of one run."""
    return {
        "model": {"name": asked.model, "attention": "eager"},
        "runtime": {"threads": asked.threads},
        "adapter": {"name": "lora", "r": 8, "alpha": 16},
        "data": {
            "source": {"name": "tasks", "rows_per_category": asked.rows},
            "clients": 8,
            "unseen": 0.25,
            "partition": {"name": "dirichlet", "key": "category", "alpha": asked.alpha},
            "splits": {"train": 0.7, "validation": 0.0, "test": 0.3},
            "max_tokens": asked.max_tokens,
            "system": "Answer with the result only.",
        },
        "trainer": {"optimizer": "adamw", "lr": 3e-3, "steps": asked.steps, "batch": 8, "schedule": "cosine"},
        "algorithm": METHODS[method],
        "rounds": asked.rounds,
        "adapt_steps": asked.adapt_steps,
        "evaluate": [{"name": "own-answers", "max_new_tokens": 16}, {"name": "loss", "every": 0}],
        "seed": seed,
    }


def run(asked: argparse.Namespace, method: str, seed: int) -> Run:
    """Run one recipe, or read what an earlier call left."""
    folder = asked.out / f"{method}-{seed}"
    if not (folder / "summary.json").is_file():
        fedloom.run(recipe(asked, method, seed), out=folder, overwrite=folder.exists())
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    scores: dict[str, dict[str, float]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        split, _, rest = line["name"].partition("/")
        if split == "test" and line["client"] and rest.endswith(f"/own-answers/{asked.metric}"):
            scores.setdefault(rest.split("/")[0], {})[line["client"]] = line["value"]
    beside = ("base", "unseen", *(name for name in scores if name.endswith(" adapted")))
    return Run(scores, next(name for name in summary["metrics"] if name not in beside), summary)


def pooled(runs: Mapping[int, Run], regime: str) -> Scores:
    """Return the scores of one regime over all seeds; `own` in its name stands for the one that was trained."""
    found: Scores = {}
    for seed, one in runs.items():
        for client, value in one.scores.get(regime.replace("own", one.own), {}).items():
            found[seed, client] = value
    return found


def row(method: str, runs: Mapping[int, Run], shared: Mapping[int, Run] | None) -> Row:
    """Return a method's figures over all seeds."""
    own = pooled(runs, "own")
    mean = lambda scores: fmean(scores.values()) if scores else None
    gain = None
    if shared is not None and method != SHARED:
        other = pooled(shared, "own")
        both = sorted(own.keys() & other.keys())
        found = paired_bootstrap([own[k] for k in both], [other[k] for k in both], [seed for seed, _ in both])
        gain = found.mean, found.low, found.high
    cost = lambda name: fmean(one.summary[name] for one in runs.values())
    return Row(
        method,
        fmean(own.values()),
        gain,
        fmean(min(one.scores[one.own].values()) for one in runs.values()),
        mean(pooled(runs, "own adapted")),
        mean(pooled(runs, "unseen")),
        mean(pooled(runs, "unseen adapted")),
        cost("bytes_up"),
        cost("bytes_down"),
        cost("trained_tokens"),
        cost("round_seconds"),
        {str(seed): one.scores[one.own] for seed, one in runs.items()},
    )


def show(rows: Sequence[Row], seeds: Sequence[int], metric: str) -> None:
    """Print the table."""
    share = lambda value: "" if value is None else f"{value:.1%}"
    title = f"{metric} of the clients' own test rows, {len(seeds)} seeds"
    table = Table(title=title, title_justify="left", box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True)
    for head in COLUMNS:
        table.add_column(head, justify="right")
    for one in rows:
        gain = "" if one.gain is None else "{:+.1%} [{:+.1%}, {:+.1%}]".format(*one.gain)
        shares = (share(one.worst), share(one.adapted), share(one.unseen), share(one.unseen_adapted))
        costs = (human_bytes(one.up), human_bytes(one.down), f"{one.tokens:,.0f}", f"{one.seconds:.0f}")
        table.add_row(one.method, share(one.own), gain, *shares, *costs)
    console = Console(width=max(150, Console().width))
    console.print(table)
    console.print(by_client(rows, str(seeds[0])))


def by_client(rows: Sequence[Row], seed: str) -> Table:
    """Return the table of one seed's clients, from the worst to the best under the shared adapter."""
    first = rows[0].clients[seed]
    names = sorted(first, key=lambda name: first[name])
    table = Table(title=f"each client, seed {seed}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for one in rows:
        table.add_row(one.method, *(f"{one.clients[seed][name]:.1%}" for name in names))
    return table


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--metric", choices=("exact_match", "contained"), default="exact_match")
    parser.add_argument("--alpha", type=float, default=0.1, help="concentration of the Dirichlet shares")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of a client in a round")
    parser.add_argument("--adapt-steps", type=int, default=4, help="further steps before `adapted` is measured")
    parser.add_argument("--rows", type=int, default=80, help="rows of each of the 12 categories")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/personal"))
    return parser.parse_args()


def main() -> None:
    """Run all methods with all seeds and print one table."""
    asked = arguments()
    methods = [SHARED, *(name for name in asked.methods if name != SHARED)]
    runs: dict[str, dict[int, Run]] = {}
    todo = [(method, seed) for method in methods for seed in asked.seeds]
    for i, (method, seed) in enumerate(todo):
        print(f"{i + 1} of {len(todo)}: {method}, seed {seed}", file=sys.stderr, flush=True)
        runs.setdefault(method, {})[seed] = run(asked, method, seed)
    rows = [row(method, found, runs[SHARED]) for method, found in runs.items()]
    (asked.out / "table.json").write_text(json.dumps([asdict(one) for one in rows], indent=1) + "\n", encoding="utf-8")
    show(rows, asked.seeds, asked.metric)


if __name__ == "__main__":
    main()
