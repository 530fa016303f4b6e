"""Java programs: a runner calls the checks' `Main`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedloom.evaluate.code import braces
from fedloom.evaluate.code.languages.base import MANAGED, Problem, lacking, last_name
from fedloom.evaluate.sandbox import Job

_HARNESS = """
public class FedloomRunner {
    public static void main(String[] words) throws Throwable {
        String token = new java.io.BufferedReader(new java.io.InputStreamReader(System.in)).readLine();
        Main.main(words);
        System.out.println("\\n" + token);
        System.out.flush();
        Runtime.getRuntime().halt(0);
    }
}
"""
_BUILD = (
    "set -e; javac -J-Xmx512m -J-XX:+UseSerialGC -J-XX:TieredStopAtLevel=1 -nowarn -d . {job}/Main.java "
    "{job}/FedloomRunner.java < /dev/null; "
    "exec java -Xmx512m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -cp . FedloomRunner"
)
_IMPORT = re.compile(r"^\s*import\s+[\w.*\s]+;[ \t]*$", re.MULTILINE)
_MAIN_CLASS = re.compile(r"^\s*(?:public\s+)?class\s+Main\b[^{]*(?=\{)", re.MULTILINE)
_MAIN = re.compile(r"^\s*public\s+static\s+void\s+main\s*\([^)]*\)[^{]*(?=\{)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Java:
    """Methods stand in a class `Solution`."""

    name: str = "java"
    title: str = "Java"

    def missing(self) -> str:
        """Return which of the compiler and the machine is missing."""
        return lacking(("javac", "java"), "apt-get install default-jdk-headless")

    def program(self, problem: Problem, code: str) -> str:
        """Return all imports, the answer in a class `Solution`, and the checks."""
        if not self.defines(problem.entry, code):
            code = f"{problem.declaration}{code}"
        imports = dict.fromkeys(line.strip() for line in _IMPORT.findall(f"{problem.declaration}\n{code}"))
        code = braces.without(braces.without(_IMPORT.sub("", code), _MAIN_CLASS), _MAIN)
        if not re.search(r"\bclass\s+Solution\b", code):
            code = f"class Solution {{\n{code}\n}}"
        code = re.sub(r"\bpublic\s+(?=(?:final\s+)?class\s+Solution\b)", "", code)
        return "\n".join([*imports, problem.setup, code, problem.tests, ""])

    def entry(self, declaration: str) -> str:
        """Return the name of the last function that a declaration opens."""
        return last_name(r"\b(\w+)\s*\([^(){};]*\)[^(){};]*\{", declaration)

    def defines(self, entry: str, code: str) -> bool:
        """Return whether the method's block is there."""
        return re.search(rf"[\w>\]]\s+{re.escape(entry)}\s*\([^;{{}}]*\)[^;{{}}]*\{{", code) is not None

    def body(self, declaration: str, text: str) -> str:
        """Return the text up to the brace that closes the class."""
        return braces.body(declaration, text)

    def job(self, program: str, token: str) -> Job:
        """Return the job: compile, run."""
        files = {"Main.java": program, "FedloomRunner.java": _HARNESS}
        return Job(files, ("/bin/sh", "-c", _BUILD), f"{token}\n", MANAGED)
