"""Programming languages that programs can be run in, one file each."""

from collections.abc import Mapping
from types import MappingProxyType

from fedloom.evaluate.code.languages.base import Language, Problem
from fedloom.evaluate.code.languages.cpp import Cpp
from fedloom.evaluate.code.languages.go import Go
from fedloom.evaluate.code.languages.java import Java
from fedloom.evaluate.code.languages.js import JavaScript
from fedloom.evaluate.code.languages.python import Python
from fedloom.evaluate.code.languages.rust import Rust

LANGUAGES: Mapping[str, Language] = MappingProxyType(
    {one.name: one for one in (Python(), Cpp(), Java(), JavaScript(), Go(), Rust())}
)

__all__ = ["LANGUAGES", "Language", "Problem"]
