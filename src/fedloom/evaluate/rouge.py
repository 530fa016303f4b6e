"""ROUGE-L (`data.similar`): how much of a reference's words an answer holds, in their order.

Of several references the best counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import PositiveInt

from fedloom.data.rows import Turn
from fedloom.data.similar import rouge_l
from fedloom.evaluate.base import Evaluation, Evaluator, Sample, Using, View
from fedloom.evaluate.items import Scored, drawn, found, over_adapters, records
from fedloom.types import DataError, Split


class Rouge(Evaluator, name="rouge"):
    """Mean ROUGE-L of greedy answers to instructions, with the training template."""

    primary: ClassVar[str] = "rouge_l"
    higher_is_better: ClassVar[bool] = True

    limit: PositiveInt | None = 50
    """Instructions, drawn with the recipe's seed; null: all."""
    max_new_tokens: PositiveInt = 256
    """Longest answer."""
    path: Path | None = None
    """A file with the columns instruction, input (may be absent) and output (a text or a list of them); by default
    $FEDLOOM_DATA/instruct/user_oriented_instructions.jsonl."""

    def asked(self, split: Split, seed: int) -> list[tuple[int, str, Sequence[str]]]:
        """Return (place in the file, instruction, references) of what is asked.

        Raises:
            DataError: the data cannot be found or read.
        """
        file = found("rouge", self.path, "instruct/user_oriented_instructions.jsonl")
        rows = records(file, "instruction")
        return [(i, *_read(rows[i], file)) for i in drawn("rouge", len(rows), self.limit, split, seed)]

    def check(self, seed: int) -> None:
        self.asked("validation", seed)

    def evaluate(self, view: View) -> Evaluation:
        asked = self.asked(view.split, view.seed)
        prompts = view.prompts([(Turn("user", text),) for _, text, _ in asked])

        def score(adapter: Using) -> Scored:
            outputs = view.generate(adapter, prompts, self.max_new_tokens)
            samples = []
            for (i, _, references), prompt, output in zip(asked, prompts, outputs, strict=True):
                best = max(rouge_l(output, one) for one in references)
                samples.append(Sample(f"rouge-{i}", prompt, output, None, " | ".join(references), best))
            return {"rouge_l": float(np.mean([one.score for one in samples]))}, samples

        return over_adapters(view, score, {"items": len(asked)})


def _read(record: Any, file: Path) -> tuple[str, Sequence[str]]:
    """Return the instruction with its input, and the references; an instance of self-instruct holds both."""
    source = record["instances"][0] if record.get("instances") else record
    given, output = str(source.get("input") or ""), source.get("output")
    references = [output] if isinstance(output, str) else output
    if not references:
        raise DataError(f"{file}: the record {str(record['instruction'])[:60]!r} has no output to compare with")
    return f"{record['instruction']}\n\n{given}".strip(), references
