"""Measurement: evaluators, statistics and answer extraction. Importing this package registers the evaluators."""

from fedloom.evaluate import gsm8k, loss, tasks
from fedloom.evaluate.base import Evaluation, Evaluator, Sample, View

__all__ = ["Evaluation", "Evaluator", "Sample", "View", "gsm8k", "loss", "tasks"]
