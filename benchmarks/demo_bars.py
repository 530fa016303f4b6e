"""The claims about the demo, computed from a finished run folder.

    python benchmarks/demo_bars.py runs/demo

Prints exact match and "answer contained" of base, federated, local (mean of the clients' adapters) and centralised on
the same held-out items; the federated gain over base and over local with 95 % intervals (paired bootstrap over items,
stratified by category, 10,000 draws); and per category whether federated falls below base (exact McNemar, Holm).
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from fedloom.data import tasks
from fedloom.evaluate.stats import holm, mcnemar, paired_bootstrap

Scores = dict[str, dict[str, list[float]]]


def read(folder: Path) -> Scores:
    """Return metric -> regime -> item scores in a fixed order of items; local is the mean over clients."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {m: defaultdict(lambda: defaultdict(list)) for m in RULES}
    for path in (folder, folder / "regimes" / "local", folder / "regimes" / "centralized"):
        for line in (path / "samples" / "tasks.jsonl").read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            for metric, rule in RULES.items():
                found[metric][one["regime"]][one["id"]].append(float(rule(one["output"], one["reference"])))
    return {
        metric: {regime: [float(np.mean(items[i])) for i in sorted(items)] for regime, items in regimes.items()}
        for metric, regimes in found.items()
    }


RULES = {"exact match": tasks.exact_match, "contained": tasks.contained}


def main(folder: Path) -> None:
    """Print the table."""
    lines = (folder / "samples" / "tasks.jsonl").read_text(encoding="utf-8").splitlines()
    ids = sorted({json.loads(line)["id"] for line in lines})
    categories = [name.partition("/")[0] for name in ids]
    scores = read(folder)
    print(f"{len(ids)} items, {len(set(categories))} categories")
    for metric, regimes in scores.items():
        print(f"\n{metric}: " + ", ".join(f"{name} {100 * np.mean(values):.1f} %" for name, values in regimes.items()))
        for other in ("base", "local", "centralized"):
            gain = paired_bootstrap(regimes["federated"], regimes[other], categories)
            print(
                f"  federated - {other}: {100 * gain.mean:+.1f} points [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
            )
    exact = scores["exact match"]
    names = sorted(set(categories))
    rows = {name: [i for i, category in enumerate(categories) if category == name] for name in names}
    pairs = {n: ([exact["federated"][i] for i in r], [exact["base"][i] for i in r]) for n, r in rows.items()}
    adjusted = holm([mcnemar(*pair) for pair in pairs.values()])
    print("\ncategory          base  local  federated  centralized   p (federated against base, Holm)")
    for name, p in zip(names, adjusted, strict=True):
        means = [
            100 * np.mean([exact[r][i] for i in rows[name]]) for r in ("base", "local", "federated", "centralized")
        ]
        print(f"{name:16s} {means[0]:5.0f} {means[1]:6.0f} {means[2]:10.0f} {means[3]:12.0f}   {p:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
