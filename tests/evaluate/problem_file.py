"""A file of made-up programming problems."""

from __future__ import annotations

import json
from pathlib import Path


def problem_file(folder: Path) -> Path:
    """Write six problems in HumanEval's format."""
    path = folder / "problems.jsonl"
    records = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f"def plus{i}(x: int) -> int:\n",
            "entry_point": f"plus{i}",
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {1 + i}\n",
        }
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
