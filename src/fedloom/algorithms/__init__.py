"""Federated algorithms: one paper, one file; `base.py` is the contract.

Importing this package registers every shipped algorithm: each file in it is one.
"""

from importlib import import_module
from pkgutil import iter_modules

from fedloom.algorithms.base import Algorithm, Client, Server

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Algorithm", "Client", "Server"]
