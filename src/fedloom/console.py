"""What a person sees of a run: the plan, a live display that becomes plain lines in a pipe, and the result."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from fedloom.results import measures
from fedloom.tracking import Cohort, Evaluated, Event, Finished, Phase, Plan, RoundReport, Sink, Step, Trained, Warned
from fedloom.units import human_bytes, human_seconds

CLIENTS_SHOWN = 12


class ConsoleSink(Sink):
    """Shows a run on stderr: live on a terminal, one line an event elsewhere; nothing but warnings when quiet."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.display = Display(console) if console.is_terminal and not quiet else None
        self.told: set[tuple[str, str]] = set()
        self.phase = ""
        self.start, self.began = 0, 0.0

    def on(self, event: Event) -> None:
        if self.display:
            self.display.on(event)
        match event:
            case Plan():
                self._plan(event)
            case Phase() if not self.display:
                if event.text not in ("", self.phase):
                    self._say(Text(f"{event.text} ...", "dim"))
                self.phase = event.text or self.phase
            case Cohort():
                self.began = self.began or time.perf_counter()
            case RoundReport():
                self._round(event)
            case Evaluated():
                where = f"  {event.regime}, {'test' if event.final else 'validation'}: "
                main = measures(event.evaluator, event.metrics)
                found = ", ".join(f"{one.title} {one.text(event.metrics[one.metric])}" for one in main)
                self._say(Text.assemble((where, "dim"), found))
            case Warned():
                self.console.print(Text.assemble(("warning: ", "yellow"), event.text), soft_wrap=True)
            case _:
                pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.display:
            self.display.stop()

    def _say(self, text: Text) -> None:
        if not self.quiet:
            self.console.print(text, soft_wrap=True)

    def _plan(self, plan: Plan) -> None:
        """Print the plan; of a compared regime only what differs from the plans before."""
        self.start, self.began = plan.start, 0.0
        if self.quiet:
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in plan.lines:
            if (label, text) not in self.told:
                table.add_row(label, Text(text))
        self.told.update(plan.lines)
        title = plan.regime if plan.name == plan.regime else f"{plan.name}: {plan.regime}"
        title += f", going on after round {plan.start}" if plan.start else ""
        self.console.print(Panel(table, title=Text(title), title_align="left", border_style="cyan"))

    def _round(self, report: RoundReport) -> None:
        pace = (time.perf_counter() - self.began) / max(1, report.round - self.start)
        left = human_seconds(pace * (report.rounds - report.round))
        speed = report.tokens / report.fit_seconds if report.fit_seconds else 0.0
        if self.display:
            self.display.expect(left)
        # on a terminal the bar tells what is left, which also keeps the line within 80 columns
        rest = "" if self.display or report.round == report.rounds else f", {left} left"
        self._say(
            Text(
                f"round {report.round:>{len(str(report.rounds))}}/{report.rounds}  loss {report.loss:.3f}  "
                f"{speed:,.0f} tokens/s  ↓{human_bytes(report.bytes_down)} ↑{human_bytes(report.bytes_up)}  "
                f"{human_seconds(report.seconds)}{rest}"
            )
        )


class Display:
    """The moving part on a terminal: the rounds, this round's clients or the current phase, and the clients' losses.

    It is always three lines high: were its height to change, rich could erase lines that stand above it.
    """

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:7}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            console=console,
            expand=True,
        )
        self.rounds, self.below = (self.progress.add_task(name, count="", note="") for name in ("rounds", "phase"))
        self.losses: dict[str, float] = {}
        self.cohort, self.trained, self.tokens, self.began, self.bytes = 0, 0, 0, 0.0, (0, 0)
        self.live = Live(console=console, get_renderable=self._view, transient=True, refresh_per_second=5)

    def on(self, event: Event) -> None:
        """Follow one event."""
        self.live.start()
        match event:
            case Plan():
                self.bytes = (0, 0)
                self._bar(self.rounds, event.start, event.rounds)
            case Phase():
                self._phase(event)
            case Cohort():
                self.cohort, self.trained, self.tokens, self.began = len(event.clients), 0, 0, time.perf_counter()
                self.losses.clear()
                self.progress.reset(self.below, description="clients")
                self._clients()
            case Step():
                self.losses[event.client] = event.loss
                self.tokens += event.tokens
                self._clients()
            case Trained():
                self.trained += 1
                self._clients()
            case RoundReport():
                self.bytes = (self.bytes[0] + event.bytes_down, self.bytes[1] + event.bytes_up)
                self._bar(self.rounds, event.round, event.rounds)
            case Finished():
                self.stop()
            case _:
                pass

    def expect(self, left: str) -> None:
        """Show the time that is left."""
        self.progress.update(self.rounds, note=f"about {left} left")

    def stop(self) -> None:
        """Remove the display."""
        self.live.stop()

    def _phase(self, phase: Phase) -> None:
        if self.progress.tasks[self.below].fields["note"] != phase.text:
            self.losses.clear()
            self.progress.reset(self.below, description="phase")
        total = f"/{phase.total:,}" if phase.total else ""
        count = f"{phase.done:,}{total}" if phase.done else ""
        self.progress.update(self.below, completed=phase.done, total=phase.total or None, count=count, note=phase.text)

    def _clients(self) -> None:
        speed = self.tokens / max(1e-9, time.perf_counter() - self.began)
        down, up = map(human_bytes, self.bytes)
        self._bar(self.below, self.trained, self.cohort, f"{speed:,.0f} tokens/s  ↓{down} ↑{up}")

    def _bar(self, task: TaskID, done: int, total: int, note: str | None = None) -> None:
        self.progress.update(task, completed=done, total=total, count=f"{done}/{total}")
        if note is not None:
            self.progress.update(task, note=note)

    def _view(self) -> Group:
        latest = list(self.losses.items())[-CLIENTS_SHOWN:]
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in latest)
        return Group(self.progress, Text(losses, "dim", no_wrap=True, overflow="ellipsis"))
