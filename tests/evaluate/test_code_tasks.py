"""Code evaluators: from answers to programs, verdicts that cannot be had for nothing, and what is not run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from tests.evaluate.bare_view import BareView
from tests.helpers import lines, tree
from typer.testing import CliRunner

from fedloom import recipe as recipes
from fedloom.cli.main import app
from fedloom.client.generate import GREEDY, Decoding
from fedloom.evaluate import probe
from fedloom.evaluate.code import braces
from fedloom.evaluate.code.answers import fenced
from fedloom.evaluate.code.base import CodeEvaluator, Task
from fedloom.evaluate.code.humaneval import HumanEval
from fedloom.evaluate.code.humaneval_x import HumanEvalX
from fedloom.evaluate.code.judging import judge, pass_at_k, verdict
from fedloom.evaluate.code.languages import LANGUAGES, Problem
from fedloom.evaluate.code.mbpp import Mbpp
from fedloom.evaluate.sandbox import Bubblewrap, Sandbox, Unconfined
from fedloom.types import DataError, FedloomError, RecipeError, Tensors

FOUND = probe.sandbox()
needed = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))
ADD = Problem("0", "def add(a, b):\n", "def add(a, b):\n", "add", "assert add(2, 3) == 5", "", "    return a + b\n")
MORE = {
    "cpp": Problem(
        "0",
        "#include <vector>\nusing namespace std;\nint add(int a, int b) {\n",
        "#include <vector>\nusing namespace std;\nint add(int a, int b) {\n",
        "add",
        "#undef NDEBUG\n#include <cassert>\nint main() { assert(add(2, 3) == 5); }",
        "",
        "    return a + b;\n}\n",
    ),
    "java": Problem(
        "0",
        "class Solution {\n    public int add(int a, int b) {\n",
        "class Solution {\n    public int add(int a, int b) {\n",
        "add",
        "public class Main { public static void main(String[] words) {\n"
        "if (new Solution().add(2, 3) != 5) throw new AssertionError(); } }",
        "",
        "        return a + b;\n    }\n}\n",
    ),
    "js": Problem(
        "0",
        "const add = (a, b) => {\n",
        "const add = (a, b) => {\n",
        "add",
        "console.assert(add(2, 3) === 5)",
        "",
        "  return a + b;\n}\n",
    ),
    "go": Problem(
        "0",
        "func add(a int, b int) int {\n",
        'import (\n    "math"\n)\nfunc add(a int, b int) int {\n',
        "add",
        "func TestAdd(t *testing.T) {\n    assert := assert.New(t)\n    assert.Equal(5, add(2, 3))\n}",
        'package main\n\nimport (\n    "testing"\n    "github.com/stretchr/testify/assert"\n)\n',
        "    return a + b\n}\n",
    ),
    "rust": Problem(
        "0",
        "fn add(a: i32, b: i32) -> i32 {\n",
        "use rand::Rng;\nfn add(a: i32, b: i32) -> i32 {\n",
        "add",
        "#[cfg(test)]\nmod tests {\n    use super::*;\n    #[test]\n    fn sums() {\n"
        "        assert_eq!(add(2, 3), 5);\n    }\n}",
        "",
        "    a + b\n}\n",
    ),
}
ENDS = {  # bodies that end the process well, say so, or repeat what they are given
    "cpp": ['std::printf("passed\\n"); std::exit(0); }', "quick_exit(0); }", "return a - b; }"],
    "java": ['System.out.println("passed"); System.exit(0); return 0; } }', "return a - b; } }"],
    "js": ['console.log("passed"); process.exit(0) }', "console.assert = () => {}; return a - b }", "return a - b }"],
    "go": ["os.Exit(0)\nreturn 0 }", "return a - b }"],
    "rust": ["std::process::exit(0); }", "a - b }"],
}
SEARCH = """
import os, sys
for place in ("/job", "/tmp", "/proc/self"):
    for name in os.listdir(place):
        try:
            print(open(f"{place}/{name}").read())
        except (OSError, UnicodeDecodeError):
            pass
print(sys.argv, dict(os.environ), sys.stdin.read())
os._exit(0)
"""


def held() -> Sandbox:
    assert isinstance(FOUND, Bubblewrap)
    return FOUND


def judged(code: str, language: str = "python") -> tuple[float | None, str]:
    one, problem = LANGUAGES[language], ADD if language == "python" else MORE[language]
    found = verdict(held(), one, one.program(problem, code))
    return found.score, found.text


def solved(evaluator: CodeEvaluator, every: int) -> None:
    """Assert that each `every`-th canonical solution passes."""
    tasks = list(evaluator.tasks().items)[::every]
    right = [(task.language, task.language.program(task.problem, task.problem.solution)) for task in tasks]
    assert [(t.id, v.text) for t, v in zip(tasks, judge(held(), right), strict=True)] == [
        (t.id, "passed") for t in tasks
    ]


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 4), (7, 3, 5), (10, 1, 10)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, c: int, k: int) -> None:
    draws = list(combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_pass_at_k_refuses() -> None:
    for odd in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match="k between 1 and the samples"):
            pass_at_k(*odd)


@needed
@pytest.mark.data
def test_solutions_of_humaneval_pass() -> None:
    solved(HumanEval(), 11)


@needed
@pytest.mark.data
def test_solutions_of_mbpp_pass() -> None:
    solved(Mbpp(), 17)
    assert len(Mbpp().tasks().items) == 257


@needed
@pytest.mark.data
@pytest.mark.parametrize(("language", "every"), [("python", 31), ("cpp", 150), ("java", 150), ("js", 40), ("go", 150)])
def test_solutions_of_humaneval_x_pass(language: str, every: int) -> None:
    if why := LANGUAGES[language].missing():
        pytest.skip(why)
    solved(HumanEvalX(languages=(language,)), every)


@pytest.mark.data
def test_every_declaration_names_its_function() -> None:
    for name, language in LANGUAGES.items():
        tasks = HumanEvalX()._of(language)
        assert len(tasks) == 164
        for task in tasks:
            if task.id != "Rust/10":  # whose declaration opens another function than the one that is checked
                assert re.search(rf"\b{task.problem.entry}\b", task.problem.tests), (name, task.id)


@needed
@pytest.mark.parametrize(
    "code",
    [
        "    return a + b",
        "return a + b",
        "def add(a, b):\n    return a + b",
        "import operator\n\ndef add(a, b):\n    return operator.add(a, b)\n",
        "def add(a, b):\n    print('some words')\n    return a + b\nif __name__ == '__main__':\n    input()",
    ],
)
def test_right_python_passes(code: str) -> None:
    assert judged(code) == (1.0, "passed")


@needed
@pytest.mark.parametrize(
    "code",
    [
        "    return a - b",
        "    import os\n    os._exit(0)",
        "    raise SystemExit(0)",
        "    import os\n    print('passed', 'PASSED', 'ok')\n    os._exit(0)",
        f"{SEARCH}def add(a, b): ...",
        f"def add(a, b):{SEARCH.replace(chr(10), chr(10) + '    ')}",
        "print(input())\ndef add(a, b):\n    return 0",
        "    import os\n    os.execv('/bin/true', ['true'])",
        "    import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)",
        "    return a +",
    ],
)
def test_what_ends_early_or_says_so_does_not_pass(code: str) -> None:
    assert judged(code)[0] == 0.0


@needed
def test_verdicts_say_why() -> None:
    assert judged("    return 1")[1] == "failed (status 1): AssertionError"
    assert judged("    return bytearray(2**34)")[1] == "failed (status 1): MemoryError"


@needed
@pytest.mark.parametrize("language", list(MORE))
def test_other_languages_pass_and_are_not_fooled(language: str) -> None:
    if why := LANGUAGES[language].missing():
        pytest.skip(why)
    problem = MORE[language]
    signature = next(line for line in problem.declaration.split("\n") if "add" in line).strip()
    assert judged(problem.solution, language) == (1.0, "passed")
    if language != "java":  # whose body closes the class, too
        assert judged(f"{signature}\n{problem.solution}", language) == (1.0, "passed")
    for body in ENDS[language]:
        assert judged(body, language)[0] == 0.0, body


@needed
def test_memory_of_a_runtime_without_an_address_limit_is_capped() -> None:
    if why := LANGUAGES["js"].missing():
        pytest.skip(why)
    grab = "const all = []; for (;;) all.push(Buffer.alloc(64 * 2 ** 20, 1)) }"
    assert judged(grab, "js") == (0.0, "stopped: limit of memory")


@needed
def test_verdicts_come_in_order() -> None:
    python = LANGUAGES["python"]
    bodies = [f"    import time; time.sleep({0.4 - 0.1 * i}); return a + {'b' if i % 2 else '9'}" for i in range(4)]
    found = judge(held(), [(python, python.program(ADD, body)) for body in bodies])
    assert [one.score for one in found] == [0.0, 1.0, 0.0, 1.0]


def test_a_sandbox_that_fails_is_no_wrong_answer() -> None:
    python = LANGUAGES["python"]
    found = verdict(Bubblewrap("/usr/bin/false", "false"), python, python.program(ADD, ADD.solution))
    assert found.score is None
    assert found.text.startswith("sandbox error")


def test_blocks_of_an_answer() -> None:
    two = "First:\n```python\nx = 1\n```\nthen\n```py\ndef add(a, b):\n    return a + b\n```\nDone."
    has = lambda text: "def add" in text
    assert fenced(two, has) == "def add(a, b):\n    return a + b\n"
    assert fenced(two, lambda text: False) == "x = 1\n"
    assert fenced("```\ndef add(a, b):\n    return a", has) == "def add(a, b):\n    return a"
    assert fenced("no code", has) is None


def test_bodies_end_where_the_function_does() -> None:
    python, js = LANGUAGES["python"], LANGUAGES["js"]
    assert python.body("def f():", "    a = (\n1\n)\n\n    return a\nprint(f())\n").endswith("a = (")
    assert python.body("def f():", "    return 1\n\n# more\ndef g(): ...") == "    return 1\n"
    assert python.body("", "import re\ndef f():\n    return 1\n\nprint(2)") == "import re\ndef f():\n    return 1\n"
    text = 'if (a) { return "}" } // }\n return `}` }\n\nmore()'
    assert js.body("const f = (a) => {", text) == text[: -len("\n\nmore()")]
    assert braces.depth("class A { int f() { // {\n") == 2


def test_go_imports_what_is_used() -> None:
    program = LANGUAGES["go"].program(MORE["go"], 'import "fmt"\nimport "os"\nfunc add(a, b int) int {\n os.Exit(0)\n}')
    assert program.count("import") == 1
    assert '"os"' in program
    assert '"testing"' in program
    assert not any(name in program for name in ('"math"', '"fmt"', "testify"))


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
    """Six problems in HumanEval's format."""
    path = tmp_path / "problems.jsonl"
    records = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f"def plus{i}(x: int) -> int:\n",
            "entry_point": f"plus{i}",
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {1 + i}\n",
        }
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


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
