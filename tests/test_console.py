"""What the console shows of a stream of events: on a terminal, in a pipe, when quiet; and the table of results."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from fedloom.console import ConsoleSink
from fedloom.evaluate import Evaluator
from fedloom.results import intervals, measures, report, results
from fedloom.tracking import Cohort, Evaluated, Event, Finished, Phase, Plan, RoundReport, Step, Trained, Warned

PLAN = Plan("r", "federated", Path("r"), [("model", "[tiny]: 1 parameter"), ("algorithm", "fedavg")], 2, 0, 2, 10)
LOCAL = Plan("local", "local", Path("r"), [("model", "[tiny]: 1 parameter"), ("algorithm", "local")], 2, 0, 2, 10)


def of_round(number: int) -> list[Event]:
    clients = {"client-1": {"loss": 2.5}, "client-2": {"loss": 3.5}}
    done = [event for name in clients for event in (Step(name, 100, 2.5), Trained(name, clients[name]))]
    return [
        Cohort(number - 1, list(clients)),
        *done,
        RoundReport(number, 2, 3.0, clients, [], 1000, 8, 2000, 3_000_000, 1.0, 0.5),
        Evaluated("federated", number, "loss", {"loss": 1.25, "loss_worst10": 9.0}, False),
    ]


STORY: list[Event] = [
    Phase("loading [tiny]"),
    Phase("encoding rows", 500),
    Phase("encoding rows", 1000),
    Phase(""),
    PLAN,
    *of_round(1),
    *of_round(2),
    Warned("client [b] is slow"),
    LOCAL,
    Finished({}),
]


def shown(terminal: bool, quiet: bool = False, width: int = 80) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, color_system=None, legacy_windows=False)
    with ConsoleSink(console, quiet) as sink:
        for event in STORY:
            sink.on(event)
    return file.getvalue()


def test_plain_lines_in_a_pipe() -> None:
    text = shown(terminal=False)
    assert "\x1b" not in text
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[:2] == ["loading [tiny] ...", "encoding rows ..."]
    rounds = [line for line in lines if line.startswith("round ")]
    assert rounds[0].startswith("round 1/2  loss 3.000  2,000 tokens/s  ↓2.0 kB ↑3.0 MB  1 s, ")
    assert rounds[1] == "round 2/2  loss 3.000  2,000 tokens/s  ↓2.0 kB ↑3.0 MB  1 s"
    assert lines.count("  federated, validation: loss 1.25") == 2
    assert "warning: client [b] is slow" in lines


def test_a_compared_regime_repeats_nothing_of_the_plan() -> None:
    text = shown(terminal=False)
    assert text.count("[tiny]: 1 parameter") == 1
    assert re.search(r"─ local ─", text)
    assert re.search(r"algorithm +local", text)


def test_quiet_shows_warnings_only() -> None:
    for terminal in (False, True):
        assert shown(terminal, quiet=True).split() == ["warning:", "client", "[b]", "is", "slow"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_display_keeps_its_height_and_width(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    sink = ConsoleSink(console)
    assert sink.display is not None
    heights = set()
    with sink:
        for event in STORY[:-1]:
            sink.on(event)
            lines = console.render_lines(sink.display._view(), pad=False)
            heights.add(len(lines))
            assert all(sum(segment.cell_length for segment in line) <= width for line in lines)
            if event == STORY[9]:  # both clients have trained
                drawn = "\n".join("".join(segment.text for segment in line) for line in lines)
                assert "2/2" in drawn
                assert "tokens/s" in drawn or width < 80
                assert "client-1 2.500  client-2 2.500" in drawn
        sink.on(Phase("evaluating federated: tasks", 3, 12))
        drawn = "".join(segment.text for line in console.render_lines(sink.display._view()) for segment in line)
        assert "3/12" in drawn
        assert "evaluating" in drawn
    assert heights == {3}
    assert "round 2/2" in file.getvalue()


FOUND = {
    "unseen": {"loss": {"loss": 3.0}},
    "federated": {"tasks": {"exact_match": 0.5, "exact_match_worst10": 0.1}, "loss": {"loss": 1.0, "perplexity": None}},
    "odd": {"loss": {"loss": 2.0}},
    "base": {"tasks": {"exact_match": 0.25}, "loss": {"loss": 1.5, "perplexity": None}},
}


def table(metrics: dict[str, dict[str, dict[str, float | None]]], width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, force_terminal=True, width=width, legacy_windows=False).print(results(metrics))
    return file.getvalue()


def test_results_name_the_best_of_each_column() -> None:
    text = table(FOUND)
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    rows = [line.split() for line in plain.splitlines() if line.split()][3:]
    assert [row[0] for row in rows] == ["base", "federated", "unseen", "odd"]
    assert rows[0] == ["base", "25.0", "%", "1.5", "-"]
    best = re.findall(r"\x1b\[1;32m *([\d.]+)", text)
    assert sorted(best) == ["1", "50.0"]
    assert "worst10" not in plain


def test_equal_values_have_no_best() -> None:
    assert "\x1b[1;32m" not in table({r: {"loss": {"loss": 1.0}} for r in ("base", "federated")})


def test_results_of_many_evaluators_fit_80_columns() -> None:
    one = {
        "loss": {"loss": 1.234, "perplexity": 1234.0, "bits_per_byte": 0.5},
        "tasks": {"exact_match": 0.1, "contained": 0.2},
        "gsm8k": {"numeric": 0.3, "flexible": 0.4, "strict": 0.5},
    }
    text = re.sub(r"\x1b\[[\d;]*m", "", table({"base": one, "centralized": one}))
    row = next(line.split() for line in text.splitlines() if line.startswith(" centralized"))
    assert row == ["centralized", "1.234", "1234", "10.0", "%", "20.0", "%", "30.0", "%", "40.0", "%"]
    two = {name: one[name] for name in ("loss", "gsm8k")}
    text = re.sub(r"\x1b\[[\d;]*m", "", table({"base": two, "centralized": two}))
    row = next(line.split() for line in text.splitlines() if line.startswith(" centralized"))
    assert row == ["centralized", "1.234", "1234", "0.5", "30.0", "%", "40.0", "%", "50.0", "%"]


def test_an_unknown_evaluator_is_shown_too() -> None:
    class Bleu(Evaluator, name="bleu-of-a-test"):
        """A test's own."""

        higher_is_better = True

    try:
        (one,) = measures("bleu-of-a-test", {"bleu": 31.0, "bleu_variance": 2.0})
        assert (one.title, one.text(31.0), one.best([30.0, 31.0])) == ("bleu-of-a-test bleu", "31", 31.0)
    finally:
        Evaluator.known.pop("bleu-of-a-test")
    (gone,) = measures("bleu-of-a-test", {"bleu": 31.0})
    assert gone.best([30.0, 31.0]) is None


def test_intervals_are_those_of_the_samples(tmp_path: Path) -> None:
    def write(path: Path, regime: str, client: str | None, scores: list[float]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            for i, score in enumerate(scores):
                line = {"regime": regime, "client": client, "id": f"item-{i}", "score": score}
                file.write(json.dumps(line) + "\n")

    write(tmp_path / "samples" / "tasks.jsonl", "federated", None, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    write(tmp_path / "samples" / "tasks.jsonl", "base", None, [0] * 10)
    write(tmp_path / "regimes" / "local" / "samples" / "tasks.jsonl", "local", "client-1", [1] * 10)
    write(tmp_path / "samples" / "graded.jsonl", "federated", None, [0.5])
    assert intervals(tmp_path) == [
        "tasks exact match: 10 items, 95 % intervals (Wilson): base 0.0 to 27.8 %, federated 23.7 to 76.3 %"
    ]


def test_paths_and_commands_of_the_report_are_not_broken(tmp_path: Path) -> None:
    folder = Path("a-rather-long-name-of-a-folder/" * 4) / "[bold]"
    numbers = dict.fromkeys(
        ("trained_tokens", "tokens_per_second", "wall_seconds", "bytes_down", "bytes_up", "peak_rss_bytes"), 1
    )
    file = io.StringIO()
    report(Console(file=file, width=80), folder, {"metrics": FOUND, "adapter_sha256": "0123456789abcdef", **numbers})
    lines = file.getvalue().splitlines()
    assert f"run folder {folder}, adapter 0123456789ab" in lines
    for command in ("chat", "eval", "export", "run --resume"):
        assert any(line.startswith(f"  fedloom {command} {folder}") for line in lines)
