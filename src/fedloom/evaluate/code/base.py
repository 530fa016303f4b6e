"""What all code evaluators share: sampling, running, pass@k, and what happens where nothing can be run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from fedloom import seeds
from fedloom.client.generate import Decoding
from fedloom.data.rows import Turn
from fedloom.evaluate.base import Evaluation, Evaluator, Sample, View
from fedloom.evaluate.code.answers import fenced
from fedloom.evaluate.code.judging import Verdict, judge, pass_at_k
from fedloom.evaluate.code.languages import Language, Problem
from fedloom.evaluate.probe import chosen
from fedloom.evaluate.sandbox import Sandbox
from fedloom.types import DataError, Split


@dataclass(frozen=True, slots=True)
class Task:
    """A problem in a language; `id` is its own within the evaluator, `question` what a chat model is asked."""

    id: str
    language: Language
    problem: Problem
    question: str


@dataclass(frozen=True, slots=True)
class Tasks:
    """What there is to do, and which languages are left out: name -> why."""

    items: Sequence[Task]
    skipped: Mapping[str, str] = field(default_factory=dict)
    asked: bool = False
    """Whether the recipe names the languages that are skipped."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One answer to a task, and what became of it."""

    task: Task
    prompt: str
    output: str
    program: str
    verdict: Verdict


class CodeEvaluator(Evaluator):
    """Samples programs, runs them in a sandbox against their checks, and counts those that pass.

    Where there is no sandbox nothing is run: the programs are kept with their samples, and the evaluator is `not_run`.
    """

    primary: ClassVar[str] = "pass@1"
    higher_is_better: ClassVar[bool] = True

    limit: PositiveInt | None = None
    """Problems, drawn with the recipe's seed; null: all."""
    samples: PositiveInt = 1
    """Programs sampled for each problem."""
    k: tuple[PositiveInt, ...] = (1,)
    """The k of pass@k; none above `samples`."""
    temperature: NonNegativeFloat = 0.0
    """Of sampling; 0 takes the most likely token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sampling draws from the smallest set of tokens whose probabilities sum to at least this."""
    ask: Literal["chat", "completion"] = "chat"
    """Whether the model is asked in the training template, or goes on from the bare prompt."""
    max_new_tokens: PositiveInt = 512
    """Longest answer."""
    path: Path | None = None
    """The problem file; by default it is found below $FEDLOOM_DATA."""
    unsafe_execution: bool = False
    """Run programs as plain processes, which can do whatever their user can; the result is marked."""

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if max(self.k) > self.samples:
            raise ValueError(f"pass@{max(self.k)} needs at least {max(self.k)} samples; set samples={max(self.k)}")
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples={self.samples} at temperature=0 are {self.samples} times the same program; "
                "set temperature, such as 0.8"
            )
        return self

    def tasks(self) -> Tasks:
        """Return all problems, in the order of their file."""
        raise NotImplementedError

    def chosen(self, everything: Sequence[Task], split: Split, seed: int) -> list[Task]:
        """Return the tasks of `split`; those that judge a run in its course are none of those that judge its end.

        A problem that is drawn is drawn in all its languages.

        Raises:
            DataError: `validation` problems are asked for and none is left beside the `limit` of the end.
        """
        numbers = list(dict.fromkeys(task.problem.id for task in everything))
        order = seeds.numpy_generator(seed, None, None, self.part_name).permutation(len(numbers)).tolist()
        size = len(numbers) if self.limit is None else self.limit
        drawn = order[:size] if split == "test" else order[size : 2 * size]
        if not drawn:
            raise DataError(
                f"evaluator {self.part_name}: all {len(numbers)} problems are kept for the end, so none is left for "
                f"`every: {self.every}`; set limit to at most {len(numbers) // 2}, or every: 0"
            )
        kept = {numbers[i] for i in drawn}
        return [task for task in everything if task.problem.id in kept]

    def check(self, seed: int) -> None:
        self.chosen(self.tasks().items, "validation", seed)

    def evaluate(self, view: View) -> Evaluation:
        found = self.tasks()
        tasks = [task for task in self.chosen(found.items, view.split, view.seed) for _ in range(self.samples)]
        decoding = Decoding(temperature=self.temperature, top_p=self.top_p, seed=view.seed)
        prompts = self._prompts(view, tasks)
        runner = chosen(self.unsafe_execution)
        attempts = {
            client: self._attempts(
                tasks, prompts, view.generate(adapter, prompts, self.max_new_tokens, decoding), runner
            )
            for client, adapter in view.adapters.items()
        }
        return self.told(found, attempts, runner)

    def code(self, task: Task, output: str) -> str:
        """Return the code of an answer: a block between fences, else the text up to where the function ends."""
        language, problem = task.language, task.problem
        if self.ask == "chat":
            block = fenced(output, lambda text: language.defines(problem.entry, text))
            if block is not None:
                return block
            if language.defines(problem.entry, output):
                return output
        return language.body(problem.declaration, output)

    def _prompts(self, view: View, tasks: Sequence[Task]) -> list[str]:
        if self.ask == "completion":
            return view.texts([task.problem.prompt for task in tasks])
        return view.prompts([(Turn("user", task.question),) for task in tasks])

    def _attempts(
        self, tasks: Sequence[Task], prompts: Sequence[str], outputs: Sequence[str], runner: Sandbox | str
    ) -> list[Attempt]:
        programs = [
            (task.language, task.language.program(task.problem, self.code(task, output)))
            for task, output in zip(tasks, outputs, strict=True)
        ]
        if isinstance(runner, str):
            verdicts = [Verdict(None, f"not run: {runner}")] * len(programs)
        else:
            verdicts = judge(runner, programs)
        columns = zip(tasks, prompts, outputs, (program for _, program in programs), verdicts, strict=True)
        return [Attempt(*one) for one in columns]

    def told(self, found: Tasks, attempts: Mapping[str | None, Sequence[Attempt]], runner: Sandbox | str) -> Evaluation:
        """Return what attempts add up to.

        Args:
            found: what there was to do.  attempts: client (None: the adapter of all) -> its attempts.
            runner: the sandbox that they ran in, or why there is none.
        """
        judged = {c: ones for c, ones in attempts.items() if all(one.verdict.score is not None for one in ones)}
        clients = {client: self._metrics(ones) for client, ones in judged.items()}
        names = next(iter(clients.values()), {}).keys()
        skipped = [f"{name} is left out: {why}" for name, why in found.skipped.items()]
        return Evaluation(
            {name: float(np.mean([one[name] for one in clients.values()])) for name in names},
            {client: metrics for client, metrics in clients.items() if client is not None},
            [(client, sample) for client, ones in attempts.items() for sample in _samples(ones)],
            settings={"sandbox": runner if isinstance(runner, str) else runner.name, "skipped": dict(found.skipped)},
            not_run="; ".join([*_unjudged(attempts, runner), *(skipped if found.asked else [])]),
            notes=[*skipped, *(["programs run without a sandbox (unsafe_execution)"] if self.unsafe_execution else [])],
        )

    def _metrics(self, attempts: Sequence[Attempt]) -> dict[str, float]:
        """Return pass@k over all problems, a language's mean counting as much as another's, and by language."""
        right: dict[str, dict[str, int]] = {}
        for one in attempts:
            counts = right.setdefault(one.task.language.name, {})
            counts[one.task.id] = counts.get(one.task.id, 0) + int(one.verdict.score or 0)
        metrics: dict[str, float] = {}
        by_language: dict[str, float] = {}
        for k in sorted({1, *self.k}):
            means = {
                name: float(np.mean([pass_at_k(self.samples, count, k) for count in counts.values()]))
                for name, counts in right.items()
            }
            metrics[f"pass@{k}"] = float(np.mean(list(means.values())))
            by_language |= {f"pass@{k}_{name}": mean for name, mean in means.items()}
        return metrics if len(right) == 1 else {**metrics, **by_language}


def _unjudged(attempts: Mapping[str | None, Sequence[Attempt]], runner: Sandbox | str) -> list[str]:
    if isinstance(runner, str):
        return [runner]
    lost = [one.verdict.text for ones in attempts.values() for one in ones if one.verdict.score is None]
    total = sum(map(len, attempts.values()))
    return [f"{len(lost)} of {total} programs could not be run ({lost[0]})"] if lost else []


def _samples(attempts: Sequence[Attempt]) -> list[Sample]:
    return [
        Sample(
            one.task.id,
            one.prompt,
            one.output,
            one.program,
            one.task.problem.tests,
            one.verdict.score,
            one.verdict.text,
            one.task.language.name,
        )
        for one in attempts
    ]
