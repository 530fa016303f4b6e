"""`fedloom score` runs programs that were kept; `fedloom eval` measures adapters and models without a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from tests.evaluate.problem_file import problem_file
from tests.helpers import lines, tree
from typer.testing import CliRunner, Result

from fedloom.cli.main import app
from fedloom.evaluate import probe

FOUND = probe.sandbox()
needed = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))


def command(*words: str) -> Result:
    return CliRunner().invoke(app, words)


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    return problem_file(tmp_path)


def unrun(tmp_path: Path, tiny_folder: Path, problems: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run folder whose programs wait, of a machine that had no sandbox."""
    recipe = tmp_path / "r.yaml"
    code = {"name": "humaneval", "path": str(problems), "limit": 2, "max_new_tokens": 4}
    recipe.write_text(yaml.safe_dump(tree(tiny_folder, rounds=1, evaluate=["loss", code], compare=["local"])))
    with monkeypatch.context() as patch:
        patch.setattr(probe, "sandbox", lambda: "bubblewrap is not installed")
        assert command("run", str(recipe), "--out", str(tmp_path / "run")).exit_code == 4
    return tmp_path / "run"


@needed
def test_kept_programs_get_their_scores_later(
    tiny_folder: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = unrun(tmp_path, tiny_folder, problems, monkeypatch)
    kept = run / "samples" / "humaneval.jsonl"
    before = lines(kept)
    # what the model should have written
    for line in before[:2]:
        number = line["id"].rpartition("/")[2]
        solution = f"def plus{number}(x):\n    return x + {number}\n"
        line["extracted"] = f"{solution}{line['reference']}\ncheck(plus{number})\n"
    kept.write_text("".join(json.dumps(line) + "\n" for line in before))
    scored = command("score", str(run))
    assert scored.exit_code == 0, scored.output
    after = lines(kept)
    assert [line["score"] for line in after] == [1.0, 1.0, 0.0, 0.0]
    assert [line["output"] for line in after] == [line["output"] for line in before]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["not_run"] == {}
    assert summary["metrics"]["base"]["humaneval"]["pass@1"] == 1.0
    assert summary["metrics"]["federated"]["humaneval"]["pass@1"] == 0.0
    # three clients of their own in the compared regime
    assert set(summary["metrics"]["local"]["humaneval"]) >= {"pass@1", "pass@1_worst10", "pass@1_variance"}
    # the rows of metrics.jsonl are those that a run with a sandbox would have
    for place in (run, run / "regimes" / "local"):
        rows = [line for line in lines(place / "metrics.jsonl") if "/humaneval/" in line["name"]]
        for regime in {line["name"].split("/")[1] for line in rows}:
            told = {
                line["name"].rpartition("/")[2]: line["value"]
                for line in rows
                if line["client"] is None and line["name"].startswith(f"test/{regime}/humaneval/")
            }
            assert told == summary["metrics"][regime]["humaneval"]
        assert {line["round"] for line in rows if "/base/" not in line["name"]} == {1}
        assert len({(line["client"], line["name"]) for line in rows}) == len(rows) > 0
    local = [line for line in rows if line["client"] is not None]
    assert len(local) == 3 and {line["name"] for line in local} == {"test/local/humaneval/pass@1"}
    again = command("score", str(run))
    assert again.exit_code != 0
    assert "no program waits to be run" in str(again.exception)


def test_without_a_sandbox_nothing_is_scored(
    tiny_folder: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = unrun(tmp_path, tiny_folder, problems, monkeypatch)
    before = (run / "summary.json").read_bytes()
    monkeypatch.setattr(probe, "sandbox", lambda: "bubblewrap is not installed")
    refused = command("score", str(run))
    assert "still cannot be run: bubblewrap is not installed" in str(refused.exception)
    assert (run / "summary.json").read_bytes() == before
    plainly = command("score", str(run), "--unsafe-execution")
    assert plainly.exit_code == 0, plainly.output
    settings = json.loads((run / "summary.json").read_text())["evaluation"]["humaneval"]
    assert settings["sandbox"] != "bubblewrap"


def evaluated(tmp_path: Path, words: Sequence[str]) -> dict[str, object]:
    ran = command("eval", *words, "--json")
    assert ran.exit_code == 0, ran.output
    found: dict[str, object] = json.loads(ran.stdout)
    return found


def test_adapters_and_models_are_measured_without_a_run(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    suite = {"name": "tasks", "items_per_category": 2, "categories": ["units"]}
    recipe.write_text(yaml.safe_dump(tree(tiny_folder, rounds=1, evaluate=["loss", suite])))
    assert command("run", str(recipe), "--out", str(tmp_path / "run")).exit_code == 0
    asked = f"evaluate=[{json.dumps(suite)}]"
    run = evaluated(tmp_path, [str(tmp_path / "run"), asked])
    adapter = tmp_path / "run" / "adapter"
    out = tmp_path / "kept"
    alone = evaluated(tmp_path, [str(adapter), asked, "--out", str(out)])
    assert alone == {"base": run["base"], "adapter": run["federated"]}
    assert (out / "samples" / "tasks.jsonl").is_file()
    assert json.loads((out / "summary.json").read_text())["metrics"]["adapter"]
    assert evaluated(tmp_path, [str(tiny_folder), asked]) == {"base": run["base"]}
    beside = evaluated(tmp_path, [str(tiny_folder), asked, "--adapter", str(adapter)])
    assert beside == alone


def test_what_cannot_be_measured_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    nothing = command("eval", str(tiny_folder))
    assert "name evaluators, such as" in str(nothing.exception)
    owning = command("eval", str(tiny_folder), "evaluate=[loss]")
    assert "evaluator loss measures clients on their own rows" in str(owning.exception)
    other = command("eval", str(tiny_folder), "evaluate=[tasks]", "--checkpoint", "best")
    assert "--checkpoint chooses among a run's own adapters" in str(other.exception)
    there = command("eval", str(tiny_folder), "evaluate=[tasks]", "--out", str(tmp_path))
    assert "exists; name a folder that does not" in str(there.exception)
