"""Robust aggregators: rules that some misbehaving clients of a cohort cannot lead astray.

Importing this package registers every shipped rule: each file in it holds one, or a few close ones.
"""

from importlib import import_module
from pkgutil import iter_modules

from fedloom.server.robust.base import Chooser, Coordinatewise, Robust

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Chooser", "Coordinatewise", "Robust"]
