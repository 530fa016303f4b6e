"""Go programs: the checks' test functions are called by a `main`, with assertions that panic.

The checks are written against testify's `assert`; a small stand-in with the same names spares that package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedloom.evaluate.code import braces
from fedloom.evaluate.code.languages.base import MANAGED, Problem, head_of, lacking, last_name
from fedloom.evaluate.sandbox import Job
from fedloom.evaluate.watch import MIB

_HARNESS = """package main

import (
    "bufio"
    "fmt"
    "math"
    "os"
    "reflect"
    "testing"
)

type fedloomAssert struct{}

var assert fedloomAssert

func (fedloomAssert) New(t *testing.T) fedloomAssert { return fedloomAssert{} }
func fedloomCheck(held bool, words ...interface{}) bool {
    if !held { panic(fmt.Sprint("assertion failed: ", words)) }
    return true
}
func (fedloomAssert) Equal(want, got interface{}, words ...interface{}) bool {
    return fedloomCheck(reflect.DeepEqual(want, got), want, got)
}
func (fedloomAssert) NotEqual(want, got interface{}, words ...interface{}) bool {
    return fedloomCheck(!reflect.DeepEqual(want, got), got)
}
func (fedloomAssert) True(held bool, words ...interface{}) bool { return fedloomCheck(held) }
func (fedloomAssert) False(held bool, words ...interface{}) bool { return fedloomCheck(!held) }
func (fedloomAssert) Nil(got interface{}, words ...interface{}) bool {
    return fedloomCheck(got == nil || (reflect.ValueOf(got).Kind() == reflect.Ptr && reflect.ValueOf(got).IsNil()), got)
}
func (fedloomAssert) InDelta(want, got interface{}, delta float64, words ...interface{}) bool {
    a, b := reflect.ValueOf(want).Convert(reflect.TypeOf(delta)), reflect.ValueOf(got).Convert(reflect.TypeOf(delta))
    return fedloomCheck(math.Abs(a.Float()-b.Float()) <= delta, want, got)
}

func main() {
    token, err := bufio.NewReader(os.Stdin).ReadString('\\n')
    if err != nil { os.Exit(2) }
    t := new(testing.T)
    CALLS
    fmt.Print("\\n" + token)
}
"""
_BUILD = "set -e; go build -o run {job}/program.go {job}/harness.go < /dev/null; exec ./run"
_BLOCK = re.compile(r"^import\s*\((.*?)\)", re.MULTILINE | re.DOTALL)
_SINGLE = re.compile(r"^import\s+((?:[\w.]+\s+)?\"[^\"]+\")", re.MULTILINE)
_PACKAGE = re.compile(r"^package\s+\w+", re.MULTILINE)
_MAIN = re.compile(r"^func\s+main\s*\(\s*\)\s*(?=\{)", re.MULTILINE)
_TEST = re.compile(r"^func\s+(Test\w+)\s*\(\s*t\s+\*testing\.T\s*\)", re.MULTILINE)
_COMMON = ("fmt", "math", "sort", "strconv", "strings")
_FUNCTION = r"^func\s+(\w+)"


@dataclass(frozen=True, slots=True)
class Go:
    """Functions are told by `func name`."""

    name: str = "go"
    title: str = "Go"

    def missing(self) -> str:
        """Return whether the compiler is missing."""
        return lacking(("go",), "apt-get install golang-go")

    def program(self, problem: Problem, code: str) -> str:
        """Return one file with the imports that are used, the answer and the checks."""
        head = head_of(self, problem, code, _FUNCTION) if self.defines(problem.entry, code) else problem.declaration
        code = f"{head}{code}\n{problem.tests}\n"
        whole = f"{problem.setup}\n{problem.declaration}\n{code}"
        lines = [line.strip() for block in _BLOCK.findall(whole) for line in block.split("\n")]
        specs = dict.fromkeys(one for one in (*lines, *_SINGLE.findall(whole)) if one and not one.startswith("//"))
        code = _PACKAGE.sub("", _SINGLE.sub("", _BLOCK.sub("", code)))
        code = braces.without(code, _MAIN)
        # what is imported and not used is an error of the compiler's; the answer cannot know what the checks import
        used = [one for one in (*specs, *_lost(specs)) if "testify" not in one and _uses(code, one)]
        return "\n".join(["package main", "", "import (", *(f"    {one}" for one in used), ")", code])

    def entry(self, declaration: str) -> str:
        """Return the name of the last function that a declaration opens."""
        return last_name(_FUNCTION, declaration)

    def defines(self, entry: str, code: str) -> bool:
        """Return whether the function is declared."""
        return re.search(rf"^func\s+{re.escape(entry)}\b", code, re.MULTILINE) is not None

    def body(self, declaration: str, text: str) -> str:
        """Return the text up to the brace that closes the function."""
        return braces.body(declaration, text)

    def job(self, program: str, token: str) -> Job:
        """Return the job: build, run."""
        calls = "\n    ".join(f"{name}(t)" for name in _TEST.findall(program))
        files = {"program.go": program, "harness.go": _HARNESS.replace("CALLS", calls)}
        environment = {"GO111MODULE": "off", "CGO_ENABLED": "0", "GOCACHE": "/tmp/.gocache", "GOTOOLCHAIN": "local"}
        limits = replace(MANAGED, seconds=90.0, cpu_seconds=60, disk_bytes=512 * MIB)  # it compiles its library anew
        return Job(files, ("/bin/sh", "-c", _BUILD), f"{token}\n", limits, (), environment)


def _lost(specs: Iterable[str]) -> list[str]:
    """Return common packages that are not imported: some problems, as published, use one without importing it."""
    names = {_name(one) for one in specs}
    return [one for one in (f'"{path}"' for path in _COMMON) if _name(one) not in names]


def _uses(code: str, spec: str) -> bool:
    return re.search(rf"\b{_name(spec)}\.[A-Z]", code) is not None


def _name(spec: str) -> str:
    """Return the name that an import is used by."""
    alias, _, path = spec.rpartition(" ")
    return re.escape(alias.strip() or path.strip('"').rpartition("/")[2])
