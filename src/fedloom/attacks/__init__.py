"""Attacks: clients that misbehave on purpose, for research on defences.

Importing this package registers every shipped attack.
"""

from fedloom.attacks.base import Attack

__all__ = ["Attack"]
