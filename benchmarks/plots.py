"""Draws docs/images/speed.png from the figures that benchmarks/speed.py and benchmarks/scaling.py left.

python benchmarks/plots.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
INK, FAINT, OURS, OTHERS = "#1f2933", "#d9dee4", "#0b7285", "#adb5bd"


def read(name: str) -> dict[str, Any]:
    """Return a result that a benchmark kept."""
    found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Draw four panels: against TRL, by cohort, by rank, by row length."""
    speed, scaling = read("speed"), read("scaling")["results"]
    plt.rcParams.update({"font.size": 9, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK})
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.8), constrained_layout={"h_pad": 0.12})
    _bars(axes[0, 0], speed["results"])
    _lines(axes[0, 1], scaling["cohort"], "cohort", "clients in one pass, batch 1 (8 where said)")
    _lines(axes[1, 0], scaling["rank"], "r", "LoRA rank, 8 GSM8K rows a step")
    _lines(axes[1, 1], scaling["length"], "mean_tokens", "tokens of a row, 8 rows a step")
    machine = speed["machine"]
    figure.suptitle(f"SmolLM2-135M, bf16 ({machine['bf16']}), {machine['cores']} cores, torch {machine['torch']}")
    target = HERE.parent / "docs" / "images" / "speed.png"
    figure.savefig(target, dpi=130)
    print(target)


def _bars(axis: Any, results: dict[str, Any]) -> None:
    kinds = list(results)[::-1]
    values = [results[kind]["samples_per_second"] for kind in kinds]
    bars = axis.barh(
        [results[kind]["title"] for kind in kinds], values, color=[OTHERS if "trl" in k else OURS for k in kinds]
    )
    labels = [f"{results[k]['samples_per_second']:.2f}  ({results[k]['peak_gb']:.1f} GB)" for k in kinds]
    axis.bar_label(bars, labels, padding=4)
    axis.set_xlim(0, max(values) * 1.35)
    axis.set_xlabel("samples a second, GSM8K, 8 rows a step (peak memory)")
    _clean(axis)


def _lines(axis: Any, points: list[dict[str, Any]], key: str, label: str) -> None:
    series: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        name = f"{point['rows']}, batch {point['batch']}" if key == "cohort" else ""
        series.setdefault(name, []).append(point)
    for name, some in series.items():
        xs, ys = [p[key] for p in some], [p["tokens_per_second"] for p in some]
        axis.plot(xs, ys, marker="o", markersize=4, label=name, color=None if name else OURS)
    if any(series):
        axis.legend(frameon=False)
    axis.set_xscale("log", base=2)
    axis.set_xticks(
        [p[key] for p in next(iter(series.values()))], [f"{p[key]:.0f}" for p in next(iter(series.values()))]
    )
    axis.set_ylim(0, 1.12 * max(p["tokens_per_second"] for p in points))
    axis.set_xlabel(label)
    axis.set_ylabel("tokens a second")
    _clean(axis)


def _clean(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)


if __name__ == "__main__":
    main()
