"""HumanEval-X (arXiv 2303.17568): HumanEval's problems by hand in six languages.

As published, some cannot be solved: the checks of JavaScript/112 and /155 fail for their own solutions, a body alone
cannot complete CPP/38, and Rust/10 opens another function than the one that is checked. CPP/22 and /137 need Boost,
CPP/162 OpenSSL and JavaScript/162 the module js-md5.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import field_validator

from fedloom.evaluate.code.base import CodeEvaluator, Task, Tasks
from fedloom.evaluate.code.humaneval import question
from fedloom.evaluate.code.languages import LANGUAGES, Language, Problem
from fedloom.evaluate.code.problems import read
from fedloom.types import DataError, suggest

FIELDS = ("task_id", "prompt", "declaration", "canonical_solution", "test")


class HumanEvalX(CodeEvaluator, name="humaneval-x"):
    """Share of the problems that are solved, by language and their mean, in the languages that this machine can run."""

    languages: tuple[str, ...] | None = None
    """Which languages; null: all that can be run here. One that is named and cannot be run makes the result partial."""

    @field_validator("languages")
    @classmethod
    def _known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            if name not in LANGUAGES:
                raise ValueError(
                    f"there is no language {name!r}{suggest(name, LANGUAGES)} (known: {', '.join(LANGUAGES)})"
                )
        return names

    def tasks(self) -> Tasks:
        """Return the problems of each language, those that cannot be run left out."""
        wanted = {name: LANGUAGES[name] for name in self.languages or LANGUAGES}
        skipped = {name: why for name, one in wanted.items() if (why := one.missing())}
        items = [task for name, one in wanted.items() if name not in skipped for task in self._of(one)]
        if not items:
            told = "; ".join(f"{name}: {why}" for name, why in skipped.items())
            raise DataError(f"evaluator {self.part_name}: no language can be run here ({told})")
        return Tasks(items, skipped, self.languages is not None)

    def _of(self, language: Language) -> list[Task]:
        local = f"code/humaneval-x/humaneval_{language.name}.jsonl.gz"
        path = None if self.path is None else self.path.expanduser() / f"humaneval_{language.name}.jsonl.gz"
        records = read(self.part_name, path, local, None, FIELDS)
        return [_task(language, record) for record in records]


def _task(language: Language, record: Mapping[str, str]) -> Task:
    name = record["task_id"]
    declaration, prompt = record["declaration"], record["prompt"]
    entry = language.entry(declaration)
    if entry not in prompt:  # Rust's prompts are the description alone
        prompt = f"{prompt}{declaration}"
    if record.get("import") and record["import"] not in declaration:
        declaration = f"{record['import']}\n{declaration}"
    number = name.rpartition("/")[2]
    setup = record.get("test_setup") or ""
    problem = Problem(number, prompt, declaration, entry, record["test"], setup, record["canonical_solution"])
    return Task(name, language, problem, question(language, problem))
