"""C++ programs: the checks' `main` is renamed after compilation, and the harness's own calls it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedloom.evaluate.code import braces
from fedloom.evaluate.code.languages.base import COMPILED, Problem, head_of, lacking, last_name
from fedloom.evaluate.sandbox import Job

_HARNESS = r"""
#include <cstdio>
extern "C" int program_main(void);
int main() {
    char token[80];
    if (!std::fgets(token, sizeof token, stdin)) return 2;
    int status = program_main();
    if (status == 0) std::printf("\n%s\n", token);
    return status;
}
"""
_BUILD = (
    "set -e; g++ -std=c++17 -O1 -w -c {job}/program.cpp -o program.o < /dev/null; "
    "objcopy --redefine-sym main=program_main program.o; "
    "for library in /usr/lib/*/libcrypto.so; do if test -e $library; then crypto=-lcrypto; fi; done; "
    "g++ -O1 {job}/harness.cpp program.o -o run $crypto < /dev/null; "
    "exec ./run"
)
_MAIN = re.compile(r"^\s*(?:int|void)\s+main\s*\([^)]*\)\s*(?=\{)", re.MULTILINE)
_FUNCTION = r"\b(\w+)\s*\([^(){};]*\)\s*\{"


@dataclass(frozen=True, slots=True)
class Cpp:
    """Functions are told by their name before a parameter list and a block."""

    name: str = "cpp"
    title: str = "C++"

    def missing(self) -> str:
        """Return which of the compiler and binutils is missing."""
        return lacking(("g++", "objcopy"), "apt-get install g++")

    def program(self, problem: Problem, code: str) -> str:
        """Return the declaration's head, the answer without a `main` of its own, and the checks."""
        if self.defines(problem.entry, code):
            code = f"{head_of(self, problem, code, _FUNCTION)}{braces.without(code, _MAIN)}"
        else:
            code = f"{problem.declaration}{code}"
        return f"{problem.setup}\n{code}\n{problem.tests}\n"

    def entry(self, declaration: str) -> str:
        """Return the name of the last function that a declaration opens."""
        return last_name(_FUNCTION, declaration)

    def defines(self, entry: str, code: str) -> bool:
        """Return whether the function's block is there, behind a type: a call in a condition is none."""
        return re.search(rf"[\w>&*]\s+[&*]?{re.escape(entry)}\s*\([^;{{}}]*\)\s*(?:const\s*)?\{{", code) is not None

    def body(self, declaration: str, text: str) -> str:
        """Return the text up to the brace that closes the function."""
        return braces.body(declaration, text)

    def job(self, program: str, token: str) -> Job:
        """Return the job: compile, rename, link, run."""
        files = {"program.cpp": program, "harness.cpp": _HARNESS}
        return Job(files, ("/bin/sh", "-c", _BUILD), f"{token}\n", COMPILED)
