"""Evaluators that run model-written programs. Importing this package registers them."""

from fedloom.evaluate.code import humaneval, humaneval_x, mbpp

__all__ = ["humaneval", "humaneval_x", "mbpp"]
