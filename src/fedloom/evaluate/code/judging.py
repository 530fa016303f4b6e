"""From programs to verdicts, as many at a time as there are cores, and from verdicts to pass@k."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fedloom.evaluate.code.languages import Language
from fedloom.evaluate.sandbox import Sandbox, verdict_token
from fedloom.home import cores

_TOLD = 160  # characters of a program's telling line that a verdict keeps
_TELLING = re.compile(r"error|exception|assert|panic", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a program: 1.0 or 0.0, or None where it could not be run, and why."""

    score: float | None
    text: str


def judge(sandbox: Sandbox, programs: Sequence[tuple[Language, str]]) -> list[Verdict]:
    """Run programs in parallel; the verdicts come in their order, and do not depend on how many run at a time."""
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(lambda one: verdict(sandbox, *one), programs))


def verdict(sandbox: Sandbox, language: Language, program: str) -> Verdict:
    """Run one program with its checks; it passes if it ends by itself and its harness printed the token."""
    token = verdict_token()
    outcome = sandbox.run(language.job(program, token))
    lines = outcome.output.splitlines()
    spoken = [line.strip() for line in lines if line.strip()] or [""]
    last = next((line for line in reversed(spoken) if _TELLING.search(line)), spoken[-1])[:_TOLD]
    if outcome.ended == "error":
        return Verdict(None, f"sandbox error: {last}")
    if outcome.ended != "done":
        return Verdict(0.0, f"stopped: limit of {outcome.ended}")
    if outcome.status == 0 and token in lines:
        return Verdict(1.0, "passed")
    return Verdict(0.0, f"failed (status {outcome.status}): {last}")


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is right (arXiv 2107.03374, section 2.1).

    With n samples of which c are right:   1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: not 0 <= right <= samples, or not 1 <= k <= samples.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: {right} right of {samples} samples, k = {k}; needed: k between 1 and the samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
