"""Federated algorithms: one paper, one file; `base.py` is the contract.

Importing this package registers every shipped algorithm.
"""

from fedloom.algorithms import centralized, fedavg, fedprox, local, scaffold
from fedloom.algorithms.base import Algorithm, Client, Server

__all__ = ["Algorithm", "Client", "Server", "centralized", "fedavg", "fedprox", "local", "scaffold"]
