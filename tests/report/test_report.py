"""report.html of real runs, whole and broken ones; several runs over each other."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.helpers import lines, run
from typer.testing import CliRunner

import fedloom
from fedloom.cli.main import app
from fedloom.evaluate.stats import mcnemar, wilson
from fedloom.report import write_overlay, write_report
from fedloom.report.read import read
from fedloom.tracking import Event, Sink, Warned
from fedloom.types import RecipeError

SECTIONS = ("answer", "results", "course", "clients", "costs", "samples", "settings")


class Outline(HTMLParser):
    """The tags, ids and links of a page, and whether every tag is closed."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.open: list[str] = []
        self.nameless = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags[tag] += 1
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found[key] or "" for key in ("href", "src", "xlink:href") if key in found]
        self.nameless += tag == "svg" and not found.get("aria-label") and found.get("aria-hidden") != "true"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def drawn(folder: Path) -> tuple[str, Outline]:
    page = write_report(folder).read_text(encoding="utf-8")
    outline = Outline(page)
    assert set(SECTIONS) <= set(outline.ids) and outline.open == [] and outline.nameless == 0
    assert outline.tags["script"] == outline.tags["link"] == outline.tags["img"] == 0
    assert all(link.startswith("#") for link in outline.links) and "http://" not in page and "@import" not in page
    assert outline.tags["figure"] == outline.tags["figcaption"] <= outline.tags["table"]
    for wrong in (">nan<", ">None<", "=nan", "=inf", '"nan', "Infinity"):
        assert wrong not in page
    return page, outline


def test_a_run_draws_itself(compared: Path) -> None:
    assert (compared / "report.html").is_file()
    page, outline = drawn(compared)
    for text in (
        "Training loss by round",
        "Aggregation error by round",
        "Bytes against loss on validation data",
        "Loss by regime",
        "Rows of every client by category",
        "Training loss of clients by round",
        "Time by phase",
        "federated against clients that train alone",
        "base, score 0",
        "FLOPs of training",
        "version: torch",
        "machine: cores",
        f"fedloom run {compared / 'recipe.yaml'}",
    ):
        assert text in page
    for regime in ("base", "local", "federated", "centralized"):
        assert f">{regime}<" in page
    assert outline.tags["figure"] >= 10


def test_the_split_is_counted_as_it_is(compared: Path) -> None:
    told = json.loads((compared / "composition.json").read_text())
    split = json.loads((compared / "split.json").read_text())
    assert told["key"] == "category"
    for client, counts in told["counts"].items():
        naive = Counter(row.split("/")[0] for part in split[client].values() for row in part)
        assert {name: n for name, n in zip(told["values"], counts, strict=True) if n} == naive


def test_a_run_without_evaluators(tiny: Path, tmp_path: Path) -> None:
    page, _ = drawn(run(tiny, tmp_path / "bare", evaluate=[]).folder)
    assert "names no evaluators" in page and "Training loss by round" in page and "keep no samples" in page


def test_a_personal_method(tiny: Path, tmp_path: Path) -> None:
    tasks = {"name": "tasks", "items_per_category": 2, "max_new_tokens": 4, "categories": ["units"]}
    page, _ = drawn(run(tiny, tmp_path / "own", algorithm="local", evaluate=["loss", tasks]).folder)
    assert "Adapters are personal; shown are the answers of client-1" in page
    assert "Aggregation error" not in page


def test_scores_by_round_have_intervals(tiny: Path, tmp_path: Path) -> None:
    tasks = {"name": "tasks", "items_per_category": 4, "max_new_tokens": 4, "categories": ["units"], "every": 1}
    folder = run(tiny, tmp_path / "banded", evaluate=[tasks]).folder
    told = {
        (one["round"], one["name"].rpartition("/")[2]): one["value"]
        for one in lines(folder / "metrics.jsonl")
        if one["name"].startswith("validation/federated/tasks/")
    }
    for round_ in (1, 2):
        right = round(told[round_, "exact_match"] * 4)
        ends = told[round_, "exact_match_low"], told[round_, "exact_match_high"]
        assert ends == wilson(right, 4)
    page, outline = drawn(folder)
    assert "Shaded: 95 % intervals" in page and outline.tags["polygon"] == 1


def test_a_run_that_stopped_early(compared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(compared, folder)
    for name in ("summary.json", "report.html", "composition.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "regimes")
    told = [
        one for one in lines(folder / "metrics.jsonl") if one["round"] < 2 and "/federated/tasks" not in one["name"]
    ]
    text = "".join(json.dumps(one) + "\n" for one in told)
    (folder / "metrics.jsonl").write_text(text + '{"round": 2, "clie')
    page, _ = drawn(folder)
    assert "has not come to its end: 1 of 3 rounds are done" in page
    (folder / "metrics.jsonl").unlink()
    page, _ = drawn(folder)
    assert "0 of 3 rounds" in page


def test_values_that_do_not_exist(compared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gaps"
    shutil.copytree(compared, folder)
    told = lines(folder / "metrics.jsonl")
    for i, one in enumerate(told):
        one["value"] = [float("nan"), float("inf"), None, one["value"]][i % 4]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))
    summary = json.loads((folder / "summary.json").read_text())
    summary["metrics"]["federated"]["loss"]["loss"] = None
    summary["flops"] = summary["energy_joules"] = None
    summary["not_run"] = {"federated": {"humaneval": "there is no <sandbox>"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    path = folder / "samples" / "tasks.jsonl"
    path.write_text("".join(json.dumps({**one, "score": None}) + "\n" for one in lines(path)))
    page, _ = drawn(folder)
    assert "Not measured: federated, humaneval: there is no &lt;sandbox&gt;" in page


def test_ten_thousand_clients(tmp_path: Path) -> None:
    names = [f"client-{i}" for i in range(10_000)]
    rng = np.random.default_rng(0)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"rounds": 200, "model": "m"}))
    (tmp_path / "split.json").write_text(json.dumps({n: {"train": ["r"], "test": []} for n in names} | {"hash": "0"}))
    kinds = {"key": "k", "values": [str(i) for i in range(30)], "counts": {n: [1] * 30 for n in names}}
    (tmp_path / "composition.json").write_text(json.dumps(kinds))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for round_ in range(1, 201):
            for client in [None, *rng.choice(names, 100)]:
                name = "train_loss" if client is None else "loss"
                value = 3 / round_ + rng.random()
                file.write(json.dumps({"round": round_, "client": client, "name": name, "value": value}) + "\n")
        for client in names:
            line = {"round": 200, "client": client, "name": "test/federated/loss/loss", "value": rng.random()}
            file.write(json.dumps(line) + "\n")
    page, outline = drawn(tmp_path)
    assert len(page) < 2_000_000 and outline.tags["rect"] < 20_000
    assert "40 of 10,000 clients" in page


def test_what_a_model_writes_is_no_markup(compared: Path, tmp_path: Path) -> None:
    folder = hostile(compared, tmp_path)
    page, outline = drawn(folder)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script" not in page and "<img" not in page
    assert "␀" in page and outline.tags["iframe"] == 0


def hostile(folder: Path, place: Path) -> Path:
    """Return a copy of a run whose texts attack the page that shows them."""
    copy = place / 'x"><script>alert(2)<'
    shutil.copytree(folder, copy)
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)></pre></article>{{ 7*7 }}\x00\x1b[2J\ud800\u202e"
    for path in copy.rglob("samples/*.jsonl"):
        told = [{**one, "output": attack, "prompt": attack, "reference": attack + "w" * 5000} for one in lines(path)]
        path.write_text("".join(json.dumps(one) + "\n" for one in told))
    for path in (copy / "metrics.jsonl", copy / "split.json", copy / "composition.json"):
        path.write_text(
            path.read_text().replace("client-1", "<b onclick=1>client-1").replace("units", "</svg><i>units")
        )
    return copy


def test_a_failure_to_draw_is_told_and_stops_nothing(tiny: Path, tmp_path: Path) -> None:
    told: list[Event] = []

    class Notes(Sink):
        def on(self, event: Event) -> None:
            told.append(event)

    first = run(tiny, tmp_path / "run", evaluate=[])
    (first.folder / "report.html").unlink()
    (first.folder / "report.html").mkdir()  # no file can take its place
    (first.folder / "report.html" / "in the way").touch()
    again = fedloom.resume(first.folder, ["rounds=+1"], Notes())
    assert again.summary["rounds"] == 3
    warned = [one.text for one in told if isinstance(one, Warned)]
    assert any("report.html could not be drawn" in text and "fedloom report" in text for text in warned)


def test_several_runs_are_paired_on_the_same_items(compared: Path, other: Path, tmp_path: Path) -> None:
    page, refused = write_overlay([compared, other], tmp_path / "both.html")
    assert refused == []
    text = page.read_text()
    outline = Outline(text)
    assert outline.open == [] and outline.tags["figure"] >= 4 and "trainer.lr" in text
    first, second = (
        {one["id"]: one["score"] for one in lines(folder / "samples" / "tasks.jsonl") if one["regime"] == "federated"}
        for folder in (compared, other)
    )
    a, b = (np.array([scores[name] for name in first]) for scores in (first, second))
    row = re.search(r'<th scope="row">tasks, other</th>(.*?)</tr>', text)
    assert row is not None
    cells = re.findall("<td>(.*?)</td>", row[1])
    assert cells[0] == str(len(a)) and cells[3] == f"{100 * (b - a).mean():+.1f} points"
    assert cells[-1] == f"p = {mcnemar(b, a):.3f}"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r["model"].update(dtype="bf16"), "model.dtype is 'fp32' in compared and 'bf16' in odd"),
        (lambda r: r["evaluate"][1].update(max_new_tokens=9), "evaluate.tasks.max_new_tokens is 6 in compared and 9"),
        (lambda r: r["runtime"].update(threads=2), "runtime.threads is 1 in compared and 2 in odd"),
    ],
)
def test_results_of_other_settings_are_not_paired(
    compared: Path, other: Path, tmp_path: Path, change: Any, named: str
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(other, odd)
    recipe = yaml.safe_load((odd / "recipe.yaml").read_text())
    change(recipe)
    (odd / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = CliRunner().invoke(app, ["report", str(compared), str(odd), "--out", str(tmp_path / "x.html")])
    assert told.exit_code == 0
    assert "not paired: tasks" in told.stderr and named in told.stderr
    assert "Not paired." in (tmp_path / "x.html").read_text()


def test_recorded_settings_count_and_so_do_the_items(compared: Path, other: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(other, odd)
    summary = json.loads((odd / "summary.json").read_text())
    summary.setdefault("evaluation", {})["tasks"] = {"engine": {"batch": 77}}
    (odd / "summary.json").write_text(json.dumps(summary))
    _, refused = write_overlay([compared, odd], tmp_path / "x.html")
    assert "evaluation.engine.batch is" in refused[0] and "77 in odd" in refused[0]
    shutil.copy(other / "summary.json", odd / "summary.json")
    path = odd / "samples" / "tasks.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines(path) if one["id"] != "units/test/0"))
    _, refused = write_overlay([compared, odd], tmp_path / "x.html")
    assert "they answered other items (12 and 11, 11 in common)" in refused[0]


def test_an_evaluator_that_one_run_lacks_is_told_in_a_word(tiny: Path, compared: Path, tmp_path: Path) -> None:
    odd = run(tiny, tmp_path / "odd", evaluate=["loss"], rounds=1).folder
    for runs in ([compared, odd], [odd, compared]):
        told = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(tmp_path / "x.html")])
        names = [one.name for one in runs]
        said = f"not paired: tasks: {names[1]} was not paired with {names[0]}: odd did not run tasks"
        assert told.stderr.splitlines() == [said]


def test_what_is_no_run_folder_is_refused(tmp_path: Path, compared: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds no recipe.yaml, so it is no run folder"):
        write_report(tmp_path)
    folder = tmp_path / "torn"
    shutil.copytree(compared, folder)
    (folder / "summary.json").write_text('{"rounds": ')
    with pytest.raises(RecipeError, match=r"summary.json is damaged"):
        read(folder)


def test_the_command_prints_where_the_page_is(compared: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["report", str(compared), "--out", str(tmp_path / "page.html")])
    assert told.exit_code == 0 and told.stdout.strip() == str(tmp_path / "page.html")
