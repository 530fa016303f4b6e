"""Measurement: evaluators, statistics and answer extraction. Importing this package registers the evaluators."""

from fedloom.evaluate import bbh, code_match, gsm8k, loss, mini, mmlu, pubmedqa, rouge, tasks, truthfulqa
from fedloom.evaluate.base import Evaluation, Evaluator, Sample, View

__all__ = [
    "Evaluation",
    "Evaluator",
    "Sample",
    "View",
    "bbh",
    "code_match",
    "gsm8k",
    "loss",
    "mini",
    "mmlu",
    "pubmedqa",
    "rouge",
    "tasks",
    "truthfulqa",
]
