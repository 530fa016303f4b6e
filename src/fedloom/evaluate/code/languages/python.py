"""Python programs: the checks are imported with the program as one module."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from fedloom.evaluate.code.languages.base import Problem, last_name
from fedloom.evaluate.probe import interpreter
from fedloom.evaluate.sandbox import Job
from fedloom.evaluate.watch import USUAL

_HARNESS = """
import os, sys
def judge(end=os._exit, say=os.write):
    token = sys.stdin.readline()
    import program
    sys.stdout.flush()
    say(1, f"\\n{token}\\n".encode())
    end(0)
judge()
"""
_BRACKETS = (")", "]", "}")
_DEFINITIONS = ("def ", "async def ", "class ", "import ", "from ", "@")


@dataclass(frozen=True, slots=True)
class Python:
    """Functions are told by `def` at the margin."""

    name: str = "python"
    title: str = "Python"

    def missing(self) -> str:
        """Return why there is no interpreter."""
        found = interpreter()
        return found if isinstance(found, str) else ""

    def program(self, problem: Problem, code: str) -> str:
        """Return the imports and other functions of the prompt, the answer, and the checks."""
        if self.defines(problem.entry, code):
            head = re.split(rf"^def {re.escape(problem.entry)}\b", problem.prompt, maxsplit=1, flags=re.MULTILINE)[0]
            code = f"{head}{code}"
        elif problem.declaration:
            code = f"{problem.prompt}{_indented(code)}"
        return f"{problem.setup}\n{code}\n{problem.tests}\n"

    def entry(self, declaration: str) -> str:
        """Return the name of the last function that a declaration opens."""
        return last_name(r"^(?:async )?def (\w+)", declaration)

    def defines(self, entry: str, code: str) -> bool:
        """Return whether the function is defined at the margin."""
        return re.search(rf"^(?:async )?def {re.escape(entry)}\b", code, re.MULTILINE) is not None

    def body(self, declaration: str, text: str) -> str:
        """Return the lines up to the first at the margin; without a declaration, definitions stand there."""
        stays = _BRACKETS if declaration else (*_BRACKETS, *_DEFINITIONS)
        lines = text.split("\n")
        ends = (i for i, line in enumerate(lines) if i and line[:1].strip() and not line.startswith(stays))
        return "\n".join(lines[: next(ends, len(lines))])

    def job(self, program: str, token: str) -> Job:
        """Return the job; the token is read before the module is imported."""
        python = interpreter()
        if isinstance(python, str):
            raise RuntimeError(python)
        files = {"main.py": _HARNESS, "program.py": program}
        return Job(files, (python.path, "-B", "{job}/main.py"), f"{token}\n", USUAL, python.trees)


def _indented(body: str) -> str:
    first = next((line for line in body.split("\n") if line.strip()), "")
    return body if first[:1].isspace() else textwrap.indent(body, "    ")
