"""HumanEval (arXiv 2107.03374): 164 Python functions to be completed."""

from __future__ import annotations

from fedloom.data.sources import HubSource
from fedloom.evaluate.code.base import CodeEvaluator, Task, Tasks
from fedloom.evaluate.code.languages import LANGUAGES, Language, Problem
from fedloom.evaluate.code.problems import read

FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


class HumanEval(CodeEvaluator, name="humaneval"):
    """Share of HumanEval's problems that are solved: pass@1, and pass@k of several samples."""

    def tasks(self) -> Tasks:
        """Return all problems."""
        hub = HubSource(id="openai/openai_humaneval", split="test")
        records = read(self.part_name, self.path, "code/HumanEval.jsonl.gz", hub, FIELDS)
        python = LANGUAGES["python"]
        return Tasks([Task(r["task_id"], python, p := _problem(r), question(python, p)) for r in records])


def _problem(record: dict[str, str]) -> Problem:
    entry, prompt = record["entry_point"], record["prompt"]
    checks = f"{record['test']}\ncheck({entry})"
    return Problem(record["task_id"], prompt, prompt, entry, checks, "", record["canonical_solution"])


def question(language: Language, problem: Problem) -> str:
    """Return what a chat model is asked: to complete a function."""
    return (
        f"Complete this {language.title} function. Answer with the whole function in one code block.\n\n"
        f"```{language.name}\n{problem.prompt.rstrip()}\n```"
    )
