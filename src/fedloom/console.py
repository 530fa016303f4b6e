"""What a person sees of a run: the plan, a live display that becomes plain lines in a pipe, and the result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedloom.tracking import Cohort, Evaluated, Event, Finished, Phase, Plan, RoundReport, Sink, Step, Trained, Warned
from fedloom.units import human_bytes, human_seconds

REGIMES = ("base", "local", "federated", "centralized", "personal", "unseen")
SHOWN = (
    ("loss", "loss", "lower"),
    ("loss", "perplexity", "lower"),
    ("loss", "bits_per_byte", "lower"),
    ("tasks", "exact_match", "higher"),
    ("tasks", "contained", "higher"),
    ("gsm8k", "numeric", "higher"),
    ("gsm8k", "flexible", "higher"),
    ("gsm8k", "strict", "higher"),
)


class ConsoleSink(Sink):
    """Shows a run on stderr: live on a terminal, one line an event elsewhere; nothing but warnings when quiet."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.live = console.is_terminal and not quiet
        self.progress: Progress | None = None
        self.rounds: TaskID | None = None
        self.clients: TaskID | None = None
        self.cohort, self.tokens, self.began, self.left = 0, 0, 0.0, ""
        self.phase = ""

    def on(self, event: Event) -> None:
        match event:
            case Plan():
                self._plan(event)
            case Phase():
                self._phase(event)
            case Cohort():
                self.cohort, self.tokens, self.began = len(event.clients), 0, time.perf_counter()
                self._show_clients(0, f"round {event.round + 1}")
            case Step():
                self.tokens += event.tokens
                speed = self.tokens / max(1e-9, time.perf_counter() - self.began)
                self._show_clients(None, f"{event.client}: loss {event.loss:.3f}, {speed:,.0f} tokens/s")
            case Trained():
                self._show_clients(1, f"{event.client}: loss {event.metrics['loss']:.3f}")
            case RoundReport():
                self._round(event)
            case Evaluated():
                self._evaluated(event)
            case Warned():
                self.console.print(f"[yellow]warning:[/] {event.text}", highlight=False)
            case Finished():
                self._stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _say(self, text: str) -> None:
        if not self.quiet:
            (self.progress.console if self.progress else self.console).print(text, highlight=False, soft_wrap=True)

    def _plan(self, plan: Plan) -> None:
        if self.quiet:
            return
        self._stop()
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in plan.lines:
            table.add_row(label, text)
        title = f"{plan.name}: {plan.regime}" + (f", from round {plan.start}" if plan.start else "")
        self.console.print(Panel(table, title=title, title_align="left", border_style="cyan"))
        if self.live:
            self.progress = Progress(
                SpinnerColumn(),
                TextColumn("[bold]{task.fields[name]}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                transient=True,
            )
            self.rounds = self.progress.add_task("", name="rounds", total=plan.rounds, completed=plan.start, note="")
            self.clients = self.progress.add_task("", name="clients", total=1, note="")
            self.progress.start()

    def _phase(self, phase: Phase) -> None:
        text = phase.text + (f" ({phase.done:,})" if phase.done else "")
        if self.progress and self.clients is not None:
            self.progress.update(self.clients, note=text)
        elif phase.text and phase.text != self.phase and not phase.done:
            self._say(f"[dim]{text} ...[/]")
        self.phase = phase.text

    def _show_clients(self, advance: int | None, note: str) -> None:
        if self.progress is None or self.clients is None:
            return
        if advance == 0:
            self.progress.reset(self.clients, total=self.cohort)
        self.progress.update(self.clients, advance=advance or 0, note=note)

    def _round(self, report: RoundReport) -> None:
        left = (report.rounds - report.round) * report.seconds
        speed = report.tokens / report.fit_seconds if report.fit_seconds else 0.0
        if self.progress and self.rounds is not None:
            note = f"loss {report.loss:.3f}, about {human_seconds(left)} left"
            self.progress.update(self.rounds, completed=report.round, note=note)
        self._say(
            f"round {report.round:>{len(str(report.rounds))}}/{report.rounds}  loss {report.loss:.3f}  "
            f"{speed:,.0f} tokens/s  ↓{human_bytes(report.bytes_down)} ↑{human_bytes(report.bytes_up)}  "
            f"{human_seconds(report.seconds)}, {human_seconds(left)} left"
        )

    def _evaluated(self, event: Evaluated) -> None:
        chosen = [(m, event.metrics[m]) for e, m, _ in SHOWN if e == event.evaluator and m in event.metrics]
        chosen = chosen or list(event.metrics.items())[:3]
        text = ", ".join(f"{name} {value:.4g}" for name, value in chosen)
        where = "test" if event.final else "validation"
        self._say(f"  [dim]{event.regime}, {where}:[/] {text}")

    def _stop(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None


def results(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Return a table of regimes by metrics, the best value of each column in bold.

    Args:
        metrics: regime -> evaluator -> metric -> value or None, as in summary.json.
    """
    regimes = [name for name in REGIMES if name in metrics]
    columns = [c for c in SHOWN if any(c[1] in metrics[r].get(c[0], {}) for r in regimes)]
    table = Table(title="results on held-out data", title_justify="left", header_style="bold")
    table.add_column("regime", style="cyan", no_wrap=True)
    best: dict[tuple[str, str, str], float | None] = {}
    for column in columns:
        table.add_column(column[1].replace("_", " "), justify="right")
        values = [v for r in regimes if (v := metrics[r].get(column[0], {}).get(column[1])) is not None]
        best[column] = (max if column[2] == "higher" else min)(values) if values else None
    for regime in regimes:
        cells = []
        for column in columns:
            value = metrics[regime].get(column[0], {}).get(column[1])
            cells.append(_cell(value, column, value is not None and value == best[column]))
        table.add_row(regime, *cells)
    return table


def _cell(value: float | None, column: tuple[str, str, str], bold: bool) -> str:
    if value is None:
        return "-"
    text = f"{100 * value:.1f} %" if column[2] == "higher" else f"{value:.4g}"
    return f"[bold green]{text}[/]" if bold else text


def report(console: Console, folder: Path, summary: Mapping[str, Any]) -> None:
    """Print the result of a run: the table, what it cost, where it is, and what to do next."""
    console.print(results(summary["metrics"]))
    console.print(
        f"{summary['trained_tokens']:,} tokens at {summary['tokens_per_second']:,.0f} tokens/s, "
        f"{human_bytes(summary['bytes_down'])} down, {human_bytes(summary['bytes_up'])} up, "
        f"{human_seconds(summary['wall_seconds'])} in all, {human_bytes(summary['peak_rss_bytes'])} of memory at most",
        highlight=False,
    )
    console.print(f"run folder [bold]{folder}[/], adapter {summary['adapter_sha256'][:12]}", highlight=False)
    console.print("next:", style="bold")
    for command in (
        f"fedloom chat {folder}",
        f"fedloom export {folder} --to merged",
        f"fedloom run --resume {folder} rounds=+10",
    ):
        console.print(f"  {command}", highlight=False)
