"""The contract of a language: from an answer to a program, and from a program to a job with a verdict.

A harness reads a random token from its standard input before anything of the program runs, and prints it once all
checks have held. The token lies in no file and no environment, so that a program that ends early, prints "passed" or
reads its own files does not pass. (Checks share a process with what they check; a program that was written to search
this very process's memory could still forge a verdict.)
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedloom.evaluate.probe import reachable
from fedloom.evaluate.sandbox import Job
from fedloom.evaluate.watch import MIB, Limits


@dataclass(frozen=True, slots=True)
class Problem:
    """What a program must do.

    Attributes:
        prompt: the text to go on from, up to the function's body.
        declaration: imports and the signature without the description; where a body alone is answered, it stands here.
        entry: name of the function.  tests: code that checks it.  setup: code that the tests need before the program.
        solution: the body of a right answer.
    """

    id: str
    prompt: str
    declaration: str
    entry: str
    tests: str
    setup: str
    solution: str


class Language(Protocol):
    """A language whose programs can be judged."""

    @property
    def name(self) -> str:
        """Its name in recipes and files."""
        ...

    @property
    def title(self) -> str:
        """Its name in prompts."""
        ...

    def missing(self) -> str:
        """Return what its toolchain lacks on this machine and how to get it, or ""."""
        ...

    def program(self, problem: Problem, code: str) -> str:
        """Return answered code, a function or its body, as a program with its checks."""
        ...

    def entry(self, declaration: str) -> str:
        """Return the name of the function that a declaration leaves open."""
        ...

    def defines(self, entry: str, code: str) -> bool:
        """Return whether code holds the function itself, not only its body."""
        ...

    def body(self, declaration: str, text: str) -> str:
        """Return a continuation of a declaration up to where the function ends."""
        ...

    def job(self, program: str, token: str) -> Job:
        """Return the job that prints the token if the checks hold."""
        ...


COMPILED = Limits(seconds=60.0, cpu_seconds=20, processes=24, address_space=1024 * MIB)
"""Of languages whose compiler runs in the sandbox, too."""
MANAGED = Limits(seconds=60.0, cpu_seconds=30, processes=80, address_space=None)
"""Of languages whose runtime reserves far more addresses than it uses: the resident size is watched."""


def last_name(pattern: str, declaration: str) -> str:
    """Return the first group of the last match of a pattern in a declaration, or ""."""
    found = re.findall(pattern, declaration, re.MULTILINE)
    return found[-1] if found else ""


def head_of(language: Language, problem: Problem, code: str, pattern: str) -> str:
    """Return what a declaration says before its open function, for code that brings the function itself.

    Other functions that stand there go where the code brings one of them, too; lines without a block stay.
    """
    lines = problem.declaration.split("\n")
    opened = max((i for i, line in enumerate(lines) if re.search(rf"\b{problem.entry}\b", line)), default=0)
    head = "\n".join(lines[:opened])
    names = set(re.findall(pattern, head, re.MULTILINE)) - {"if", "for", "while", "switch"}
    if any(language.defines(name, code) for name in names):
        head = "\n".join(line for line in lines[:opened] if line.startswith(("#include", "using ", "use ", "import ")))
    return f"{head}\n"


def tool(name: str) -> str | None:
    """Return the path of a tool that programs' user can reach, or None."""
    found = shutil.which(name, path=f"/usr/local/bin:/usr/bin:/bin:{os.environ.get('PATH', '')}")
    return found if found and reachable(Path(found)) else None


def lacking(names: tuple[str, ...], install: str) -> str:
    """Return which of these tools programs cannot use, and how to get them, or ""."""
    gone = [name for name in names if (path := tool(name)) is None or not Path(path).resolve().is_relative_to("/usr")]
    return f"{', '.join(gone)} not found below /usr; install: {install}" if gone else ""
