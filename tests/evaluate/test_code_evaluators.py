"""Code evaluators on told answers: sampling, pass@k by problem, what is not run, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from tests.evaluate.bare_view import BareView
from tests.evaluate.problem_file import problem_file
from tests.helpers import lines, tree
from typer.testing import CliRunner

from fedloom import recipe as recipes
from fedloom.cli.main import app
from fedloom.client.generate import GREEDY, Decoding
from fedloom.evaluate import probe
from fedloom.evaluate.code.base import Task
from fedloom.evaluate.code.humaneval import HumanEval
from fedloom.evaluate.code.humaneval_x import HumanEvalX
from fedloom.evaluate.code.languages import LANGUAGES
from fedloom.evaluate.code.mbpp import Mbpp
from fedloom.evaluate.sandbox import Bubblewrap, Sandbox, Unconfined
from fedloom.types import DataError, FedloomError, RecipeError, Tensors

FOUND = probe.sandbox()
needed = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))


def held() -> Sandbox:
    assert isinstance(FOUND, Bubblewrap)
    return FOUND


@dataclass
class Answering(BareView):
    """A view whose model answers as it is told."""

    base: object = None  # type: ignore[assignment]
    tokenizer: object = None  # type: ignore[assignment]
    answer: Callable[[int, str], str] = lambda i, prompt: ""
    asked: list[tuple[list[str], Decoding]] = field(default_factory=list)

    def generate(
        self, params: Tensors | None, prompts: Sequence[str], max_new_tokens: int, decoding: Decoding = GREEDY
    ) -> list[str]:
        self.asked.append((list(prompts), decoding))
        return [self.answer(i, prompt) for i, prompt in enumerate(prompts)]


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    return problem_file(tmp_path)


@needed
def test_sampling_counts_by_problem(problems: Path) -> None:
    evaluator = HumanEval(path=problems, limit=2, samples=3, k=(1, 3), temperature=0.8)
    [first, second] = sorted(evaluator.chosen(evaluator.tasks().items, "test", 0), key=lambda t: t.id)
    right = {first.id: 1, second.id: 0}

    def answer(i: int, prompt: str) -> str:
        task: Task = first if first.problem.entry in prompt else second
        good = i % 3 < right[task.id]
        body = task.problem.solution if good else "    return 'no'\n"
        return f"Sure.\n```python\n{task.problem.prompt}{body}```"

    view = Answering(answer=answer)
    found = evaluator.evaluate(view)
    assert found.metrics == pytest.approx({"pass@1": 1 / 6, "pass@3": 0.5})
    assert [sample.score for _, sample in found.samples].count(1.0) == 1
    assert len(found.samples) == 6
    assert all(sample.verdict for _, sample in found.samples)
    assert view.asked[0][1].temperature == 0.8
    assert found.settings["sandbox"] == held().name
    assert (found.not_run, list(found.notes)) == ("", [])
    during = evaluator.chosen(evaluator.tasks().items, "validation", 0)
    assert not {task.id for task in during} & {first.id, second.id}


@needed
def test_bare_prompts_are_gone_on_from(problems: Path) -> None:
    view = Answering(answer=lambda i, prompt: f"    return x + {prompt[8]}\n\n\ndef next(): oops oops")
    found = HumanEval(path=problems, ask="completion").evaluate(view)
    assert found.metrics == {"pass@1": 1.0}
    assert view.asked[0][0][0].startswith("def plus")


@needed
@pytest.mark.data
def test_languages_are_averaged_and_the_missing_ones_named(data_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = LANGUAGES["java"]
    monkeypatch.setattr(type(java), "missing", lambda self: "javac not found")
    evaluator = HumanEvalX(languages=("python", "java"), limit=1)
    [task] = evaluator.chosen(evaluator.tasks().items, "test", 0)
    found = evaluator.evaluate(Answering(answer=lambda i, prompt: f"```\n{task.problem.solution}```"))
    assert found.metrics == {"pass@1": 1.0}
    assert found.settings["skipped"] == {"java": "javac not found"}
    assert "java is left out: javac not found" in found.not_run
    everything = HumanEvalX().tasks()
    assert "java" in everything.skipped
    assert not everything.asked


def test_a_failing_sandbox_takes_no_metric(problems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "sandbox", lambda: Bubblewrap("/usr/bin/false", "false"))
    found = HumanEval(path=problems).evaluate(Answering(answer=lambda i, prompt: "    return 1"))
    assert found.metrics == {}
    assert found.not_run.startswith("6 of 6 programs could not be run (sandbox error")
    assert {sample.score for _, sample in found.samples} == {None}


def test_without_a_sandbox_programs_are_kept_and_the_command_says_so(
    problems: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "sandbox", lambda: "bubblewrap is not installed; install it with: apt-get ...")
    path = tmp_path / "r.yaml"
    code = {"name": "humaneval", "path": str(problems), "limit": 2, "max_new_tokens": 4, "every": 1}
    path.write_text(yaml.safe_dump(tree(tiny_folder, rounds=1, evaluate=["loss", code])))
    ran = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "run")])
    assert ran.exit_code == 4, ran.exception
    assert "not run: humaneval (base, federated): bubblewrap is not installed" in " ".join(ran.stdout.split())
    assert "warning: base: humaneval: not run: bubblewrap" in ran.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["not_run"].keys() == {"base", "federated"}
    assert summary["metrics"]["federated"].keys() == {"loss"}
    kept = lines(tmp_path / "run" / "samples" / "humaneval.jsonl")
    assert [line["score"] for line in kept] == [None] * 4
    assert all("check(plus" in line["extracted"] for line in kept)
    evaluated = CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "evaluate=[loss]"])
    assert evaluated.exit_code == 0
    again = CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "--json"])
    assert again.exit_code == 4
    assert json.loads(again.stdout)["federated"].keys() == {"loss"}
    plain = CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "--json", "--unsafe-execution"])
    assert plain.exit_code == 0, plain.exception
    assert json.loads(plain.stdout)["federated"]["humaneval"] == {"pass@1": 0.0}
    assert "programs run without a sandbox" in plain.stderr


def test_running_plainly_is_marked(problems: Path) -> None:
    found = HumanEval(path=problems, unsafe_execution=True, limit=1).evaluate(
        Answering(
            answer=lambda i, prompt: f"```\n{prompt.split('```python')[1].split('```')[0].strip()}\n    return 0\n```"
        )
    )
    assert found.metrics == {"pass@1": 0.0}
    assert found.settings["sandbox"] == Unconfined().name
    assert found.notes == ["programs run without a sandbox (unsafe_execution)"]


def test_a_run_takes_the_flag(problems: Path, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    code = {"name": "humaneval", "path": str(problems), "limit": 1, "max_new_tokens": 2}
    path.write_text(yaml.safe_dump(tree(tiny_folder, rounds=1, evaluate=["loss", code])))
    words = ["run", str(path), "--out", str(tmp_path / "run"), "--unsafe-execution"]
    assert CliRunner().invoke(app, words).exit_code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["evaluation"]["humaneval"]["sandbox"] == Unconfined().name
    assert summary["evaluation"]["humaneval"]["unsafe_execution"] is True
    path.write_text(yaml.safe_dump(tree(tiny_folder, rounds=1, evaluate=["loss"])))
    error = CliRunner().invoke(app, [*words, "--overwrite"]).exception
    assert isinstance(error, FedloomError)
    assert "no evaluator of the recipe runs programs" in str(error)


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"k": [1, 10]}, "pass@10 needs at least 10 samples; set samples=10"),
        ({"samples": 5}, "5 times the same program; set temperature"),
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"name": "humaneval-x", "languages": ["pyhton"]}, "did you mean 'python'"),
    ],
)
def test_knobs_that_do_not_go_together_are_refused(knobs: dict[str, object], told: str, tiny_folder: Path) -> None:
    with pytest.raises(RecipeError, match=told):
        recipes.load(tree(tiny_folder, evaluate=[{"name": "humaneval", **knobs}]))


def test_problem_files_are_checked(problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(problems.read_text().replace("entry_point", "entry_pint"))
    with pytest.raises(
        DataError, match=r"broken.jsonl, line 1: .* needs the field 'entry_point'; did you mean 'entry_p"
    ):
        HumanEval(path=broken).tasks()
    with pytest.raises(DataError, match="no such file"):
        Mbpp(path=tmp_path / "gone.json").tasks()
    monkeypatch.delenv("FEDLOOM_DATA", raising=False)
    with pytest.raises(DataError, match=r"FEDLOOM_DATA/code/humaneval-x/humaneval_python\.jsonl\.gz"):
        HumanEvalX(languages=("python",)).tasks()
    with pytest.raises(DataError, match="set limit to at most 3"):
        evaluator = HumanEval(path=problems, every=1)
        evaluator.chosen(evaluator.tasks().items, "validation", 0)
