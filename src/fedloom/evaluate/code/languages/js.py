"""JavaScript programs: loaded as a module of the harness, in which a failed `console.assert` throws."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedloom.evaluate.code import braces
from fedloom.evaluate.code.languages.base import MANAGED, Problem, head_of, lacking, last_name, tool
from fedloom.evaluate.sandbox import Job

_HARNESS = """
const fs = require("fs");
const token = fs.readFileSync(0, "utf8").trim();
const say = fs.writeSync;
const check = (held, ...words) => { if (!held) throw new Error(["assertion failed", ...words].join(" ")); };
Object.defineProperty(console, "assert", { value: check, writable: false, configurable: false });
require("./program.js");
say(1, "\\n" + token + "\\n");
process.exit(0);
"""
_FUNCTION = r"\b(?:const|let|var|function)\s+(\w+)"


@dataclass(frozen=True, slots=True)
class JavaScript:
    """Functions are told by `const name =` or `function name`."""

    name: str = "js"
    title: str = "JavaScript"

    def missing(self) -> str:
        """Return whether Node is missing."""
        return lacking(("node",), "apt-get install nodejs")

    def program(self, problem: Problem, code: str) -> str:
        """Return the declaration's head, the answer and the checks."""
        whole = self.defines(problem.entry, code)
        code = f"{head_of(self, problem, code, _FUNCTION) if whole else problem.declaration}{code}"
        return f"{problem.setup}\n{code}\n{problem.tests}\n"

    def entry(self, declaration: str) -> str:
        """Return the name of the last function that a declaration opens."""
        return last_name(_FUNCTION, declaration)

    def defines(self, entry: str, code: str) -> bool:
        """Return whether the function is declared; a mere variable of its name is no function."""
        value = r"(?:async\s*)?(?:function\b|\(|\w+\s*=>)"
        name = re.escape(entry)
        return re.search(rf"\bfunction\s+{name}\b|\b(?:const|let|var)\s+{name}\s*=\s*{value}", code) is not None

    def body(self, declaration: str, text: str) -> str:
        """Return the text up to the brace that closes the function."""
        return braces.body(declaration, text)

    def job(self, program: str, token: str) -> Job:
        """Return the job."""
        files = {"program.js": program, "main.js": _HARNESS}
        command = (tool("node") or "node", "--max-old-space-size=512", "{job}/main.js")
        return Job(files, command, f"{token}\n", MANAGED)
