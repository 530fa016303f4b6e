"""Rust programs: the checks' test functions are called by a `main`.

The problems name the crates rand, regex and md5 whether they use them or not; without them their `use` lines go, and
the few problems that need them cannot be answered.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fedloom.evaluate.code import braces
from fedloom.evaluate.code.languages.base import MANAGED, Problem, head_of, last_name, tool
from fedloom.evaluate.probe import reachable
from fedloom.evaluate.sandbox import Job

_HARNESS = """
mod program;
fn main() {
    let mut token = String::new();
    std::io::stdin().read_line(&mut token).unwrap();
    CALLS
    println!("\\n{}", token);
}
"""
_BUILD = "set -e; rustc --edition 2018 --cap-lints allow {job}/main.rs -o run < /dev/null; exec ./run"
_CRATES = re.compile(r"^use (?:rand|regex|md5)\b[^;]*;", re.MULTILINE)
_MAIN = re.compile(r"^\s*(?:pub\s+)?fn\s+main\s*\(\s*\)\s*(?=\{)", re.MULTILINE)
_TEST = re.compile(r"#\[test\]\s*(?:pub\s+)?fn\s+(\w+)")
_FUNCTION = r"\bfn\s+(\w+)"


@dataclass(frozen=True, slots=True)
class Rust:
    """Functions are told by `fn name`."""

    name: str = "rust"
    title: str = "Rust"

    def missing(self) -> str:
        """Return whether the compiler is missing, or where programs cannot reach it."""
        found = toolchain()
        return found if isinstance(found, str) else ""

    def program(self, problem: Problem, code: str) -> str:
        """Return the `use` lines of the declaration, the answer without a `main` of its own, and the checks."""
        if self.defines(problem.entry, code):
            head = head_of(self, problem, code, _FUNCTION)
            ours = {line.strip() for line in head.split("\n") if line.startswith("use ")}
            code = "\n".join(line for line in code.split("\n") if line.strip() not in ours)
            code = f"{head}{braces.without(code, _MAIN)}"
        else:
            code = f"{problem.declaration}{code}"
        tests = problem.tests.replace("#[cfg(test)]", "").replace("mod tests", "pub mod tests")
        return f"{problem.setup}\n{_CRATES.sub('', code)}\n{tests}\n"

    def entry(self, declaration: str) -> str:
        """Return the name of the last function that a declaration opens."""
        return last_name(_FUNCTION, declaration)

    def defines(self, entry: str, code: str) -> bool:
        """Return whether the function is declared."""
        return re.search(rf"\bfn\s+{re.escape(entry)}\b", code) is not None

    def body(self, declaration: str, text: str) -> str:
        """Return the text up to the brace that closes the function."""
        return braces.body(declaration, text)

    def job(self, program: str, token: str) -> Job:
        """Return the job: build, run."""
        calls = "\n    ".join(f"program::tests::{name}();" for name in _TEST.findall(program))
        program = _TEST.sub(r"pub fn \1", program)
        files = {"program.rs": program, "main.rs": _HARNESS.replace("CALLS", calls)}
        found = toolchain()
        trees = (found,) if isinstance(found, Path) and not found.is_relative_to("/usr") else ()
        return Job(files, ("/bin/sh", "-c", _BUILD), f"{token}\n", MANAGED, trees)


@cache
def toolchain() -> Path | str:
    """Return the folder of a toolchain that programs' user can reach, or why there is none."""
    import shutil

    path = tool("rustc") or shutil.which("rustc")
    if path is None:
        return "rustc not found; install: apt-get install rustc"
    told = subprocess.run([path, "--print", "sysroot"], capture_output=True, text=True, check=False)
    folder = Path(told.stdout.strip() or "/nowhere")
    if not reachable(folder / "bin" / "rustc"):
        return f"the user that programs run as cannot reach the rustc in {folder}; install: apt-get install rustc"
    return folder
