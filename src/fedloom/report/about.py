"""The last sections: sample outputs before and after, settings, versions, machine, and how to repeat the run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from fedloom.report import parts, svg
from fedloom.report.compare import flat
from fedloom.report.parts import Section, paragraph, table, visible
from fedloom.report.read import Run
from fedloom.units import human_bytes

LONGEST = 1500
"""Characters of a text that are shown."""
KINDS = (("gained", 4), ("lost", 4), ("right before and after", 2), ("wrong before and after", 3), ("alike", 3))
"""Kinds of samples, and how many of each are shown."""


def samples(run: Run) -> Section:
    """Set answers of the base and of the run side by side, the same share of every kind whatever the result."""
    pieces = []
    for evaluator, lines in run.samples.items():
        pieces += _of(run, evaluator, lines)
    body = Markup("").join(pieces) or paragraph("The evaluators of this run keep no samples.")
    return Section("samples", "Answers before and after", body)


def _of(run: Run, evaluator: str, lines: Sequence[Mapping[str, Any]]) -> list[Markup]:
    base = {line["id"]: line for line in lines if line.get("regime") == "base"}
    after: dict[str, Mapping[str, Any]] = {}
    for line in lines:  # of personal adapters the first client's
        if line.get("regime") == run.own:
            after.setdefault(line["id"], line)
    kinds: dict[str, list[str]] = {name: [] for name, _ in KINDS}
    for name in after:
        if name in base:
            kinds[_kind(base[name].get("score"), after[name].get("score"))].append(name)
    if not any(kinds.values()):
        return []
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items() if names)
    pieces = [svg.tag("<h3>{}</h3>", evaluator), paragraph(f"Of {sum(map(len, kinds.values()))} items: {counts}.")]
    who = next(iter(after.values())).get("client")
    if who is not None:
        pieces.append(paragraph(f"Adapters are personal; shown are the answers of {who}.", "note"))
    chosen = [(kind, name) for kind, most in KINDS for name in parts.spread(kinds[kind], most)]
    cards = [_card(kind, base[name], after[name], run.own) for kind, name in chosen]
    return [*pieces, svg.tag('<div class="samples">{}</div>', Markup("").join(cards))]


def _kind(before: Any, after: Any) -> str:
    if before is None or after is None:
        return "alike"
    if after != before:
        return "gained" if after > before else "lost"
    return "right before and after" if after == 1 else "wrong before and after" if after == 0 else "alike"


def _card(kind: str, before: Mapping[str, Any], after: Mapping[str, Any], regime: str) -> Markup:
    form = (
        '<article class="sample"><h4><span class="verdict {}">{}</span> {}</h4>{}'
        '<p class="label">Wanted</p><pre>{}</pre><div class="pair">{}{}</div></article>'
    )
    mark = {"gained": "good", "lost": "bad"}.get(kind, "open")
    prompt = svg.tag(
        "<details><summary>Prompt<span> of {}</span></summary><pre>{}</pre></details>",
        before.get("id"),
        _cut(before.get("prompt")),
    )
    sides = [_side("base", before), _side(regime, after)]
    return svg.tag(form, mark, kind, visible(after.get("id")), prompt, _cut(after.get("reference")), *sides)


def _side(regime: str, line: Mapping[str, Any]) -> Markup:
    score = line.get("score")
    shown = "" if score is None else f", score {svg.plain(score)}"
    form = '<div><p class="label">{}{}</p><pre>{}</pre></div>'
    return svg.tag(form, regime, shown, _cut(line.get("output")) or "(empty)")


def _cut(text: Any) -> str:
    told = visible("" if text is None else text)
    return told if len(told) <= LONGEST else f"{told[:LONGEST]}… ({len(told) - LONGEST:,} more characters)"


def settings(run: Run) -> Section:
    """Tell how to repeat the run, on what it ran, and the whole recipe."""
    file = shlex.quote(str(run.folder / "recipe.yaml"))
    command = f"fedloom run {file} --out {shlex.quote(f'runs/{run.name}-again')}"
    body = [
        svg.tag('<p class="label">To repeat it</p><pre class="command">{}</pre>', command),
        _facts(run),
        svg.tag(
            "<details open><summary>The resolved recipe</summary><pre>{}</pre></details>",
            visible(yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True, width=80)),
        ),
    ]
    return Section("settings", "Settings and versions", Markup("").join(body))


def _facts(run: Run) -> Markup:
    known = run.summary
    machine = dict(known.get("machine") or {})
    if "memory_bytes" in machine:
        machine["memory"] = human_bytes(machine.pop("memory_bytes"))
    rows: list[list[object]] = [[f"machine: {name}", value] for name, value in machine.items()]
    rows += [[f"version: {name}", value] for name, value in known.get("versions", {}).items()]
    for name in ("source", "trainable_parameters", "base_parameters", "adapter_sha256"):
        if name in known:
            value = known[name]
            rows.append([name.replace("_", " "), f"{value:,}" if isinstance(value, int) else visible(value)])
    rows += [[f"evaluation: {name}", visible(value)] for name, value in flat(known.get("evaluation") or {}).items()]
    return table(["what", "value"], rows, "Machine, versions, model, evaluation") if rows else Markup("")
