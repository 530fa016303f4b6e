"""Answers rated by a language model behind an OpenAI-compatible endpoint, as MT-Bench does (arXiv 2306.05685).

Questions and the model's answers leave this machine for the endpoint, so nothing is sent unless a recipe names this
evaluator and its `url`. Every turn of a question is answered with the training template, and the dialogue is rated
from 1 to 10. A rating that cannot be had is retried, then left out and told as not run; the others are kept.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fedloom.data.files import Record
from fedloom.data.rows import Turn
from fedloom.evaluate.base import Evaluation, Evaluator, Sample, View
from fedloom.evaluate.items import drawn, found, records
from fedloom.types import DataError, Split

_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_ASK = """Rate how well the assistant answers the user in the dialogue below: is it correct, helpful and clear?
Judge the content, not its length. Give your reasons in a few sentences, then end with a rating from 1 (useless) to
10 (excellent) in double brackets, such as [[5]].

{dialogue}{reference}"""


class Judge(Evaluator, name="judge"):
    """Mean rating from 1 to 10 (`rating`), by category (`rating/<category>`), and how many were had (`rated`)."""

    primary: ClassVar[str] = "rating"
    higher_is_better: ClassVar[bool] = True

    url: str = Field(pattern=r"^https?://")
    """The endpoint up to and including its version, such as http://localhost:8000/v1."""
    model: str = Field(min_length=1)
    """Name of the judging model there."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; unset: none is sent."""
    limit: PositiveInt | None = 20
    """Questions, drawn with the recipe's seed; null: all."""
    max_new_tokens: PositiveInt = 512
    """Longest answer to a question."""
    retries: NonNegativeInt = 3
    """How often a request that failed is sent again."""
    wait: NonNegativeFloat = 2.0
    """Seconds before the first retry; each further one waits twice as long."""
    timeout: PositiveFloat = 60.0
    """Seconds after which a request without an answer has failed."""
    path: Path | None = None
    """A file with the columns question_id, category, turns, and perhaps reference; by default
    $FEDLOOM_DATA/instruct/vicuna_question.jsonl."""

    def questions(self, split: Split, seed: int) -> list[Record]:
        """Return what is asked.

        Raises:
            DataError: the data cannot be found or read.
        """
        file = found("judge", self.path, "instruct/vicuna_question.jsonl", "instruct/mt_bench_question.jsonl")
        rows = records(file, "question_id", "turns")
        asked = [rows[i] for i in drawn("judge", len(rows), self.limit, split, seed)]
        if odd := [row["question_id"] for row in asked if not isinstance(row["turns"], list) or not row["turns"]]:
            raise DataError(f"{file}: question {odd[0]}: turns is no list of texts")
        return asked

    def check(self, seed: int) -> None:
        self.questions("validation", seed)

    def evaluate(self, view: View) -> Evaluation:
        asked = self.questions(view.split, view.seed)
        clients: dict[str | None, dict[str, float]] = {}
        samples: list[tuple[str | None, Sample]] = []
        failures: list[str] = []
        for client, adapter in view.adapters.items():
            dialogues = self._answered(view, adapter, asked)
            ratings: list[float | None] = []
            for row, turns in zip(asked, dialogues, strict=True):
                text = _ASK.format(dialogue=_told(turns), reference=_reference(row))
                rating, said = self._rate(text) if len(failures) < 3 else (None, "not asked after three failures")
                if rating is None:
                    failures.append(f"question {row['question_id']}: {said}")
                ratings.append(rating)
                shown = None if rating is None else f"{rating:g}"
                one = Sample(f"judge-{row['question_id']}", text, turns[-1].text, shown, _reference(row), rating, said)
                samples.append((client, one))
            clients[client] = _metrics(asked, ratings)
        names = set.intersection(*(set(one) for one in clients.values()))
        mean = {name: float(np.mean([one[name] for one in clients.values()])) for name in sorted(names)}
        why = f"{len(failures)} of {len(samples)} ratings could not be had; {failures[0]}" if failures else ""
        return Evaluation(mean, {c: m for c, m in clients.items() if c is not None}, samples, not_run=why)

    def _answered(self, view: View, adapter: Any, asked: Sequence[Any]) -> list[list[Turn]]:
        """Return each question's dialogue, all first turns answered before any second one."""
        dialogues: list[list[Turn]] = [[] for _ in asked]
        for depth in range(max(len(row["turns"]) for row in asked)):
            live = [i for i, row in enumerate(asked) if depth < len(row["turns"])]
            for i in live:
                dialogues[i].append(Turn("user", str(asked[i]["turns"][depth])))
            outputs = view.generate(adapter, view.prompts([dialogues[i] for i in live]), self.max_new_tokens)
            for i, output in zip(live, outputs, strict=True):
                dialogues[i].append(Turn("assistant", output))
        return dialogues

    def _rate(self, text: str) -> tuple[float | None, str]:
        """Return a rating and the judge's words, or None and what went wrong."""
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                said = self._post(text)
            except urllib.error.HTTPError as error:
                problem = f"{self.url} answers {error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 429):
                    return None, f"{problem}; look at url, model and ${self.key_variable}"
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"{self.url} gives no answer ({type(error).__name__}: {error})"
            else:
                ratings = [float(one) for one in _RATING.findall(said)]
                if ratings and 1 <= ratings[-1] <= 10:
                    return ratings[-1], said
                problem = f"the judge gave no rating from 1 to 10: {said[-80:]!r}"
        return None, f"{problem}, {self.retries + 1} times"

    def _post(self, text: str) -> str:
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": text}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])


def _told(turns: Sequence[Turn]) -> str:
    return "\n\n".join(f"[{turn.role}]\n{turn.text}" for turn in turns)


def _reference(row: Any) -> str:
    given = row.get("reference")
    listed = "\n\n".join(map(str, given)) if isinstance(given, list) else str(given or "")
    return f"\n\n[answers of reference]\n{listed}" if listed else ""


def _metrics(asked: Sequence[Any], ratings: Sequence[float | None]) -> dict[str, float]:
    had = [
        (str(row.get("category", "")), rating) for row, rating in zip(asked, ratings, strict=True) if rating is not None
    ]
    if not had:
        return {}
    groups: dict[str, list[float]] = {}
    for category, rating in had:
        groups.setdefault(category, []).append(rating)
    split = {f"rating/{name}": float(np.mean(values)) for name, values in groups.items()} if len(groups) > 1 else {}
    return {"rating": float(np.mean([rating for _, rating in had])), "rated": float(len(had)), **split}
