"""fedloom fine-tunes large language models on data that never leaves its owners."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.algorithms import Algorithm, Client, Server
    from fedloom.evaluate import Evaluation, Evaluator, Sample
    from fedloom.loop import Result, resume, run
    from fedloom.parts import Part
    from fedloom.recipe import Recipe
    from fedloom.types import (
        Bundle,
        ClientUpdate,
        DataError,
        FedloomError,
        Memory,
        Message,
        ModelError,
        RecipeError,
        ServerState,
        SiteError,
        Steps,
        Stopped,
        Tensors,
        WireError,
    )

# peft imports bitsandbytes wherever it is installed, which then warns of a kernel that nothing here asks for
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"

__all__ = [
    "Algorithm",
    "Bundle",
    "Client",
    "ClientUpdate",
    "DataError",
    "Evaluation",
    "Evaluator",
    "FedloomError",
    "Memory",
    "Message",
    "ModelError",
    "Part",
    "Recipe",
    "RecipeError",
    "Result",
    "Sample",
    "Server",
    "ServerState",
    "SiteError",
    "Steps",
    "Stopped",
    "Tensors",
    "WireError",
    "__version__",
    "resume",
    "run",
]

_HOMES = {
    "fedloom.algorithms": ("Algorithm", "Client", "Server"),
    "fedloom.evaluate": ("Evaluation", "Evaluator", "Sample"),
    "fedloom.loop": ("Result", "resume", "run"),
    "fedloom.parts": ("Part",),
    "fedloom.recipe": ("Recipe",),
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, so a name is looked up when it is first used
    if name not in __all__:
        raise AttributeError(f"module 'fedloom' has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "fedloom.types")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
