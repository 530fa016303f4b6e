"""The page: sections in a template, written as one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedloom import __version__
from fedloom.cost import beside, human_flops
from fedloom.report import about, clients, overlay, results, training
from fedloom.report.parts import Section
from fedloom.report.read import Run, read
from fedloom.units import human_bytes, human_seconds
from fedloom.wire.codec import write_atomic

FILE = "report.html"


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Draw a run folder, finished or not, and return the path of its page.

    Args:
        folder: the run folder.  out: the file; None: report.html in the folder.

    Raises:
        RecipeError: the folder is no run folder.
    """
    run = read(folder)
    sections = [
        results.answer(run),
        results.scores(run),
        training.course(run),
        clients.clients(run),
        training.costs(run),
        about.samples(run),
        about.settings(run),
    ]
    return write_sections(out or folder / FILE, run.name, _lead(run), _facts(run), sections)


def write_overlay(folders: Sequence[Path], out: Path) -> tuple[Path, list[str]]:
    """Draw several runs over each other.

    Returns:
        The page, and why results were not paired, a sentence each.

    Raises:
        RecipeError: a folder is no run folder.
    """
    runs = overlay.named([read(folder) for folder in folders])
    sections, refused = overlay.sections(runs)
    title = f"{len(runs)} runs: {', '.join(runs)}" if len(runs) <= 4 else f"{len(runs)} runs"
    return write_sections(out, title, "Several runs laid over each other.", [], sections), refused


def write_sections(
    out: Path, title: str, lead: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> Path:
    """Write sections (at least one) as a page under a title, a sentence and short facts; return its path."""
    folder = resources.files("fedloom") / "report"
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        title=title,
        lead=lead,
        facts=facts,
        sections=sections,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        foot=f"Drawn by fedloom {__version__}. This file needs no network and runs no script.",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page.encode("utf-8", errors="replace"))  # a model may write half a surrogate pair
    return out


def _lead(run: Run) -> str:
    recipe = run.recipe

    def name(key: str) -> str:
        value = recipe.get(key)
        return str(value.get("name", "")) if isinstance(value, dict) else str(value)

    adapter = recipe.get("adapter")
    rank = f" of rank {adapter['r']}" if isinstance(adapter, dict) and "r" in adapter else ""
    count = f"{len(run.sizes):,} clients" if run.sizes else "clients"
    source = run.summary.get("source")
    told = f"{name('model')}, {name('adapter')}{rank}, {name('algorithm')} over {count}"
    return f"{told}, on {source}." if source else f"{told}."


def _facts(run: Run) -> list[tuple[str, str]]:
    known = {**run.summary, "beside": beside(run.summary, "flops")}
    facts = [("rounds", f"{run.done} of {run.recipe.get('rounds', run.done)}")]
    for key, name, text in (
        ("trained_tokens", "trained tokens", lambda v: f"{v:,}"),
        ("bytes_down", "bytes down", human_bytes),
        ("bytes_up", "bytes up", human_bytes),
        ("flops", "FLOPs of training", human_flops),
        ("beside", "FLOPs beside training", human_flops),
        ("evaluate_flops", "FLOPs of evaluation", human_flops),
        ("wall_seconds", "time", human_seconds),
        ("peak_rss_bytes", "peak memory", human_bytes),
    ):
        if known.get(key) is not None:
            facts.append((name, text(known[key])))
    return facts
