"""Measurement: evaluators, statistics and answer extraction. Importing this package registers the evaluators."""

from fedloom.evaluate import (
    bbh,
    code,
    code_match,
    gsm8k,
    judge,
    lm_eval_bridge,
    loss,
    mini,
    mmlu,
    own_answers,
    pubmedqa,
    rouge,
    tasks,
    truthfulqa,
)
from fedloom.evaluate.base import Evaluation, Evaluator, Sample, View

__all__ = [
    "Evaluation",
    "Evaluator",
    "Sample",
    "View",
    "bbh",
    "code",
    "code_match",
    "gsm8k",
    "judge",
    "lm_eval_bridge",
    "loss",
    "mini",
    "mmlu",
    "own_answers",
    "pubmedqa",
    "rouge",
    "tasks",
    "truthfulqa",
]
