"""A bench is its runs: cells are ordinary run folders, tables say what their summaries say."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.bench.runs import answers, outcome
from tests.helpers import run, tree
from typer.testing import CliRunner

from fedloom.bench import grid, tabulate
from fedloom.cli.main import app
from fedloom.cost import METRICS
from fedloom.types import RecipeError

TASKS = {"name": "tasks", "items_per_category": 2, "categories": ["units", "sorting"], "max_new_tokens": 2}


@pytest.fixture(scope="module")
def bench(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A bench of two methods, one refused, and two seeds."""
    folder = tmp_path_factory.mktemp("bench")
    recipe = folder / "small.yaml"
    recipe.write_text(yaml.safe_dump(tree(tiny_folder, evaluate=["loss", TASKS], compare=["local"])))
    words = ["bench", str(recipe), "rounds=1", "--vary", "algorithm=fedavg,fedprox,scaffold", "--seeds", "0,1"]
    return folder, [*words, "--out", str(folder / "out"), "--quiet"]


def _call(words: Any) -> Any:
    return CliRunner().invoke(app, words)


def test_cells_are_runs_and_the_table_is_their_summaries(bench: Any, tiny_folder: Path, tmp_path: Path) -> None:
    folder, words = bench
    result = _call(words)
    assert result.exit_code == 4, result.output  # scaffold needs plain SGD
    assert "sgd_exact holds for plain SGD only" in result.stdout
    table = json.loads((folder / "out" / "table.json").read_text())
    kinds = {(row["variation"], row["regime"]) for row in table["rows"]}
    assert kinds == {(v, r) for v in ("fedavg", "fedprox") for r in ("base", "local", "federated")}
    cells = [folder / "out" / "small" / "algorithm=fedavg" / f"seed-{seed}" for seed in (0, 1)]
    found = [json.loads((cell / "summary.json").read_text())["metrics"]["federated"]["loss"] for cell in cells]
    row = next(r for r in table["rows"] if (r["variation"], r["regime"]) == ("fedavg", "federated"))
    assert row["scores"]["loss loss"] == [one["loss"] for one in found]
    assert row["scores"]["loss loss_worst10"] == [one["loss_worst10"] for one in found]
    alone = run(tiny_folder, tmp_path / "a", rounds=1, evaluate=["loss", TASKS], compare=["local"], seed=1)
    assert alone.summary["adapter_sha256"] == json.loads((cells[1] / "summary.json").read_text())["adapter_sha256"]
    with (folder / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    mean = statistics.fmean(row["scores"]["loss loss"])
    mine = next(r for r in rows if (r["variation"], r["regime"]) == ("fedavg", "federated"))
    assert float(mine["loss loss_mean"]) == mean
    assert float(mine["bytes"]) > 0
    assert next(r for r in rows if r["regime"] == "local")["bytes"] == "0.0"
    assert "algorithm" in (folder / "out" / "report.html").read_text()
    for end in ("md", "tex"):
        assert "fedprox" in (folder / "out" / f"table.{end}").read_text()


def test_a_bench_goes_on_where_it_was_stopped(bench: Any) -> None:
    """Finished cells are not run again, a begun one is gone on with, and another recipe in its place is refused."""
    folder, words = bench
    _call(words)
    cell = folder / "out" / "small" / "algorithm=fedprox" / "seed-1"
    others = {p: p.stat().st_mtime_ns for p in (folder / "out").rglob("summary.json") if cell not in p.parents}
    before = json.loads((cell / "summary.json").read_text())
    (cell / "summary.json").unlink()
    _call(words)
    assert json.loads((cell / "summary.json").read_text())["adapter_sha256"] == before["adapter_sha256"]
    assert {p: p.stat().st_mtime_ns for p in others} == others
    odd = _call([*words, "trainer.lr=0.5"])
    assert "is a run of another recipe (trainer differ)" in odd.stdout


def test_a_cell_without_rows_leaves_its_reason(bench: Any, tmp_path: Path) -> None:
    folder, _ = bench
    data = json.dumps({"name": "file", "path": str(tmp_path / "none.jsonl")})
    words = [
        "bench",
        str(folder / "small.yaml"),
        "rounds=1",
        "compare=[]",
        "evaluate=[loss]",
        "--seeds",
        "0",
        "--quiet",
    ]
    told = _call([*words, "--vary", f"data.source={data},tasks", "--out", str(tmp_path / "out")])
    assert told.exit_code == 4, told.output
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    ((_, label, seed, why),) = table["missing"]
    assert "none.jsonl" in label and "none.jsonl" in why and seed == 0
    assert {row["variation"] for row in table["rows"]} == {"tasks"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 run has no result" in page and "none.jsonl" in page


def test_costs_that_only_some_runs_tell_are_in_no_mean(tmp_path: Path) -> None:
    later = dict.fromkeys(METRICS, 2.0)
    outcomes = [
        outcome(tmp_path, ("r", label, seed), {"federated": answers(1, 0)}, summary=more)
        for label, seed, more in (("old", 0, {}), ("old", 1, later), ("new", 0, later))
    ]
    old, new = tabulate(outcomes).rows
    assert "flops" not in old.costs
    assert "beside_flops" not in old.costs
    assert (new.costs["flops"], new.costs["beside_flops"], new.costs["beside_seconds"]) == (2.0, 8.0, 8.0)


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    together = grid(
        ["demo"], [], ["[{adapter: lora, trainer.lr: 0.001}, {adapter: ia3, trainer.lr: 0.01}]"], [0], Path()
    )
    assert [one.overrides for one in together] == [
        ("adapter=lora", "trainer.lr=0.001", "seed=0"),
        ("adapter=ia3", "trainer.lr=0.01", "seed=0"),
    ]
    assert [one.label for one in together] == ["adapter=lora, lr=0.001", "adapter=ia3, lr=0.01"]
    (alone,) = grid(["demo"], [], ["adapter={name: lora, r: 4}"], [0], Path())
    assert alone.label == "lora r=4"
    for wrong in ("[lora]", "[]", "[{}]"):
        with pytest.raises(RecipeError, match="is not of the form"):
            grid(["demo"], [], [wrong], [0], Path())
    with pytest.raises(RecipeError, match="--vary 'algorithm' is not of the form"):
        grid(["demo"], [], ["algorithm"], [0], tmp_path)
    with pytest.raises(RecipeError, match="two cells of the bench would be the same run"):
        grid(["demo"], [], ["algorithm=fedavg,fedavg"], [0], tmp_path)
    cells = grid(["demo"], ["rounds=1"], ["adapter={name: lora, r: 4},lora", "trainer.lr=1e-3,1e-2"], [0, 7], tmp_path)
    assert len(cells) == 8
    assert cells[0].overrides == ("rounds=1", 'adapter={"name": "lora", "r": 4}', "trainer.lr=1e-3", "seed=0")
    assert len({cell.folder for cell in cells}) == 8
    refused = CliRunner().invoke(app, ["bench", "demo", "--seeds", "a"])
    assert "--seeds 'a'" in str(refused.exception)
