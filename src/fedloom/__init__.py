"""fedloom fine-tunes large language models on data that never leaves its owners."""

from fedloom.algorithms import Algorithm, Client, Server
from fedloom.evaluate import Evaluation, Evaluator, Sample
from fedloom.parts import Part
from fedloom.recipe import Recipe
from fedloom.run import Result, resume, run
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
