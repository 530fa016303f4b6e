"""From answers to programs, and verdicts that cannot be had for nothing."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from fedloom.evaluate import probe
from fedloom.evaluate.code import braces
from fedloom.evaluate.code.answers import fenced
from fedloom.evaluate.code.base import CodeEvaluator
from fedloom.evaluate.code.humaneval import HumanEval
from fedloom.evaluate.code.humaneval_x import HumanEvalX
from fedloom.evaluate.code.judging import judge, pass_at_k, verdict
from fedloom.evaluate.code.languages import LANGUAGES, Problem
from fedloom.evaluate.code.mbpp import Mbpp
from fedloom.evaluate.sandbox import Bubblewrap, Sandbox

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


GRABS = {  # bodies that fill 64 MiB after 64 MiB
    "cpp": "vector<vector<char>> all; for (;;) all.emplace_back(size_t(1) << 26, 'x'); }",
    "java": "java.util.List<byte[]> all = new java.util.ArrayList<>(); while (true) all.add(new byte[1 << 26]); } }",
    "js": "const all = []; for (;;) all.push(Buffer.alloc(64 * 2 ** 20, 1)) }",
    "go": "all := [][]byte{}\nfor { x := make([]byte, 1<<26)\nfor i := range x { x[i] = 1 }\nall = append(all, x) } }",
    "rust": "let mut all: Vec<Vec<u8>> = Vec::new(); loop { all.push(vec![1u8; 1 << 26]); } }",
}


@needed
@pytest.mark.parametrize("language", list(GRABS))
def test_memory_of_every_language_is_capped(language: str) -> None:
    if why := LANGUAGES[language].missing():
        pytest.skip(why)
    score, told = judged(GRABS[language], language)
    assert score == 0.0
    assert re.search("limit of memory|OutOfMemoryError|bad_alloc|allocation|cannot allocate", told), told


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
