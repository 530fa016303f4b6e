"""The built-in task suite: twelve categories of short instructions, each with one verifiable short answer.

The data set is code: items are generated from a seed without limit, and train, validation and test are disjoint by
construction. The category is the natural key for clients. Nothing is downloaded.
"""

from __future__ import annotations

from fedloom.data.tasks.scoring import contained, exact_match
from fedloom.data.tasks.suite import CATEGORIES, SPLITS, Item, items, split_of

__all__ = ["CATEGORIES", "SPLITS", "Item", "contained", "exact_match", "items", "split_of"]
