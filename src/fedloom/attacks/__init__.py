"""Attacks: clients that misbehave on purpose, for research on defences.

Importing this package registers every shipped attack: each file in it holds one, or a few close ones.
"""

from importlib import import_module
from pkgutil import iter_modules

from fedloom.attacks.base import Attack, Scene

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Attack", "Scene"]
