"""Importing: recipes from the files of other projects, with what could not be translated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from fedloom import recipe as recipes
from fedloom.importing.base import Format, Remark, Settings
from fedloom.importing.flowertune import FLOWERTUNE
from fedloom.importing.fs_llm import FS_LLM
from fedloom.importing.openfedllm import OPENFEDLLM
from fedloom.types import RecipeError

FORMATS: tuple[Format, ...] = (FLOWERTUNE, FS_LLM, OPENFEDLLM)
"""The known formats, in the order in which they are tried."""


@dataclass(frozen=True, slots=True)
class Imported:
    """A recipe that another project's file became.

    Attributes:
        format: which project's.  tree: the recipe as plain values, validated.
        lost: settings that were not translated.  notes: what means something slightly different here.
        moot: settings that need no counterpart.
    """

    format: str
    tree: Mapping[str, Any]
    lost: tuple[Remark, ...]
    notes: tuple[Remark, ...]
    moot: tuple[Remark, ...]

    def to_yaml(self, origin: str) -> str:
        """Return the recipe as YAML that begins with what there is to know about it.

        Args:
            origin: the file that it came from, for the first line.
        """
        lines = [f"Imported from {origin} ({self.format})."]
        for head, remarks in (
            ("Not translated:", self.lost),
            ("Translated, but not quite the same:", self.notes),
            ("No counterpart needed:", self.moot),
        ):
            lines += [head, *(f"  {remark}" for remark in remarks)] if remarks else []
        comment = "".join(f"# {part}\n" for line in lines for part in line.splitlines())
        return comment + yaml.safe_dump(dict(self.tree), sort_keys=False, allow_unicode=True, width=120)


def convert(text: str, name: str) -> Imported:
    """Recognise a text and translate it.

    Args:
        text: the whole file.  name: what to call it in messages.

    Raises:
        RecipeError: no format is recognised, or what the file says is no valid recipe.
    """
    for one in FORMATS:
        try:
            values = one.read(text)
        except RecipeError as error:
            raise RecipeError(f"{name}: {error}") from error
        if values is not None:
            settings = Settings(values)
            tree = one.translate(settings)
            settings.close()
            recipes.validate(tree, f"{name} ({one.name}), translated")
            return Imported(one.name, tree, tuple(settings.lost), tuple(settings.notes), tuple(settings.moot))
    looked = "".join(f"\n  {one.name}: {one.marks}" for one in FORMATS)
    raise RecipeError(f"{name}: not a file that can be imported{_ours(text)}; looked for:{looked}")


def _ours(text: str) -> str:
    """Return a hint where the text is a recipe already."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return ""
    known = recipes.Recipe.model_fields.keys()
    ours = isinstance(tree, dict) and tree and tree.keys() <= known
    return " (it looks like a recipe of fedloom's own: fedloom run takes it as it is)" if ours else ""
