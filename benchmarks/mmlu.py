"""MMLU, five worked examples: ours against lm-evaluation-harness on the same prompts, SmolLM2-135M in bf16.

Both score the four letters of the same questions in one process: the harness through its own model class, in batches
of 16, with its cache of logits, so that it too reads a question once for its four letters; ours subject by subject,
behind each subject's examples in a cache. Answers are compared; beside the wall clock stands the process's CPU time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import harness


def ours(model: Any, tokenizer: Any, questions: list[Any]) -> list[float]:
    """Return the log-probabilities of all letters, group by group."""
    from fedloom.client.likelihood import likelihoods

    found: list[float] = []
    for group in dict.fromkeys(q.group for q in questions):
        pairs = [(q.context, choice) for q in questions if q.group == group for choice in q.choices]
        found += [one.logprob for one in likelihoods(model, tokenizer, pairs)]
    return found


def theirs(wrapped: Any, questions: list[Any]) -> list[float]:
    """Return the same by the harness."""
    from lm_eval.api.instance import Instance

    pairs = [(q.context, choice) for q in questions for choice in q.choices]
    asked = [Instance(request_type="loglikelihood", doc={}, arguments=one, idx=i) for i, one in enumerate(pairs)]
    return [logprob for logprob, _ in wrapped.loglikelihood(asked, disable_tqdm=True)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--subjects", type=int, default=57, help="of the first so many subjects, for a shorter run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bf16")
    asked = parser.parse_args()
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from fedloom.client.bundled import locate
    from fedloom.evaluate.mmlu import Mmlu

    recipe = harness.recipe(model={"dtype": asked.dtype})
    world, assets, _ = harness.build(recipe, Path(mkdtemp()), harness.Sink())
    torch.set_num_threads(asked.threads)
    names = sorted({q.group for q in Mmlu(limit=None, shots=0).questions("test", 0)})[: asked.subjects]
    questions = Mmlu(limit=asked.questions, shots=asked.shots, subjects=tuple(names)).questions("test", 0)
    place = locate(harness.MODEL, None, weights=True, code=False, notify=lambda text: None)
    dtype = torch.bfloat16 if asked.dtype == "bf16" else torch.float32
    other = AutoModelForCausalLM.from_pretrained(place.folder, dtype=dtype)
    wrapped = HFLM(pretrained=other, tokenizer=assets.loaded.tokenizer, batch_size=16, device="cpu")
    results: dict[str, Any] = {}
    found: dict[str, list[float]] = {}

    def our() -> list[float]:
        with assets.attached.off():
            return ours(assets.loaded.model, assets.loaded.tokenizer, questions)

    kinds: dict[str, Callable[[], list[float]]] = {"fedloom": our, "lm-eval": lambda: theirs(wrapped, questions)}
    for name, work in kinds.items():
        wall, cpu = time.perf_counter(), time.process_time()
        found[name] = work()
        results[name] = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        letters = np.array(found[name]).reshape(-1, 4).argmax(1)
        results[name]["accuracy"] = float(np.mean([int(a) in q.right for a, q in zip(letters, questions, strict=True)]))
        print(name, results[name], file=sys.stderr, flush=True)
    a, b = (np.array(found[name]) for name in kinds)
    same = float((a.reshape(-1, 4).argmax(1) == b.reshape(-1, 4).argmax(1)).mean())
    shares = {key: results["fedloom"][key] / results["lm-eval"][key] for key in ("seconds", "cpu_seconds")}
    told = {"same_letter": same, "largest_difference": float(np.abs(a - b).max()), "of_the_harness": shares}
    harness.save("mmlu", {"machine": harness.machine(), "asked": vars(asked), "results": results, **told})
    world.crew.close()


if __name__ == "__main__":
    main()
