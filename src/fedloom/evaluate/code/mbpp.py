"""MBPP (arXiv 2108.07732): short Python tasks told in a sentence, in the version that its authors verified."""

from __future__ import annotations

from typing import Any

from fedloom.data.sources import HubSource
from fedloom.evaluate.code.base import CodeEvaluator, Task, Tasks
from fedloom.evaluate.code.languages import LANGUAGES, Problem
from fedloom.evaluate.code.problems import read

FIELDS = ("task_id", "prompt", "code", "test_list", "test_imports")
TEST = range(11, 511)
"""Task numbers of MBPP's test split."""


class Mbpp(CodeEvaluator, name="mbpp"):
    """Share of the verified tasks of MBPP's test split that are solved; the checks are part of the question."""

    def tasks(self) -> Tasks:
        """Return the tasks of the test split."""
        hub = HubSource(id="google-research-datasets/mbpp", subset="sanitized", split="test")
        records = read(self.part_name, self.path, "code/sanitized-mbpp.json", hub, FIELDS)
        return Tasks([_task(record) for record in records if int(record["task_id"]) in TEST])


def _task(record: dict[str, Any]) -> Task:
    checks, told = "\n".join(record["test_list"]), record["prompt"]
    python = LANGUAGES["python"]
    name = f"MBPP/{record['task_id']}"
    entry = python.entry(record["code"])
    # without a declaration to go on from, the description stands in a comment, with one check to name the function
    bare = f'"""\n{told}\n{record["test_list"][0]}\n"""\n'
    setup = "\n".join(record["test_imports"])
    question = (
        f"{told}\nThe Python function must pass these checks:\n\n```python\n{checks}\n```\n\n"
        "Answer with the function in one code block."
    )
    return Task(name, python, Problem(name, bare, "", entry, checks, setup, record["code"]), question)
