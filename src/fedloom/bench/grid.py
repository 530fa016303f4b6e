"""The cells of a bench and their runs: every one an ordinary run folder, which is finished, gone on with, or begun."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from fedloom import loop
from fedloom import recipe as recipes
from fedloom.tracking import Sink
from fedloom.types import FedloomError, RecipeError

Variation = tuple[tuple[str, str], ...]
"""Keys and values, as texts, by which a cell differs from its recipe."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a bench.

    Attributes:
        recipe: a shipped name or a file.  variation: how it differs.  seed: of the run.
        overrides: all its `key=value` texts, the seed included.  folder: its run folder.
    """

    recipe: str
    variation: Variation
    seed: int
    overrides: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        """What the recipe is called: its shipped name, or its file without folder and ending."""
        return Path(self.recipe).stem

    @property
    def label(self) -> str:
        """What the variation is called: its values, with keys where there are several."""
        if len(self.variation) == 1:
            return _short(self.variation[0][1])
        return ", ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in self.variation) or "as it is"


def _short(value: str) -> str:
    """Return a value for people: a part with its options without the signs of YAML."""
    part = yaml.safe_load(value)
    if not isinstance(part, dict) or "name" not in part:
        return value
    options = " ".join(f"{key}={one}" for key, one in part.items() if key != "name")
    return f"{part['name']} {options}".strip()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a cell.

    Attributes:
        summary: of summary.json; empty where the cell has no result.  reason: why it has none.
    """

    cell: Cell
    summary: Mapping[str, Any]
    reason: str = ""


def grid(
    names: Sequence[str], settings: Sequence[str], vary: Sequence[str], seeds: Sequence[int], out: Path
) -> list[Cell]:
    """Return the cells of recipes x variations x seeds.

    Args:
        names: recipes.  settings: `key=value` texts for all cells.
        vary: `key=value,value,...` texts; several multiply. Values are YAML, as in `adapter={name: lora, r: 4},ia3`. A
            text `[{key: value, key: value}, ...]` gives keys that change together.
        out: the folder of the bench.

    Raises:
        RecipeError: a text is not of that form, or two cells would share a folder.
    """
    axes = [_axis(text) for text in vary]
    cells = []
    for name, choice, seed in product(names, product(*axes), seeds):
        variation = tuple(pair for pairs in choice for pair in pairs)
        overrides = (*settings, *(f"{key}={value}" for key, value in variation), f"seed={seed}")
        place = "-".join([_plain(f"{key.rpartition('.')[2]}={value}") for key, value in variation]) or "as-it-is"
        cells.append(Cell(name, variation, seed, overrides, out / _plain(Path(name).stem) / place / f"seed-{seed}"))
    if len({cell.folder for cell in cells}) < len(cells):
        raise RecipeError("two cells of the bench would be the same run; name every recipe, value and seed once")
    return cells


def run_all(
    cells: Iterable[Cell], set_files: Sequence[str], sink: Callable[[Cell], Sink], told: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run every cell that has no result yet, and return what became of all.

    A cell that cannot be run, or not to its end, leaves its reason, and the bench goes on with the next one: a recipe
    is refused, rows or a model are not here, a run had to stop.

    Args:
        set_files: keys to lay over every recipe; `_tiny` stands for each recipe's own file of that ending.
        sink: receives the events of a cell's run.
        told: is told of every cell once it is over.
    """
    outcomes = []
    for cell in cells:
        outcomes.append(_outcome(cell, set_files, sink))
        told(outcomes[-1])
    return outcomes


def _outcome(cell: Cell, set_files: Sequence[str], sink: Callable[[Cell], Sink]) -> Outcome:
    try:
        files = [f"{cell.recipe}{name}" if name.startswith("_") else name for name in set_files]
        wanted = recipes.load(cell.recipe, cell.overrides, files).resolved()
        if not (cell.folder / "recipe.yaml").is_file():
            return Outcome(cell, loop.run(wanted, out=cell.folder, sink=sink(cell)).summary)
        if odd := _unlike(cell.folder, wanted):
            raise RecipeError(
                f"{cell.folder} is a run of another recipe ({', '.join(odd)} differ); choose another --out"
            )
        return Outcome(cell, loop.resume(cell.folder, sink=sink(cell)).summary)
    except FedloomError as error:
        return Outcome(cell, {}, str(error))


def _unlike(folder: Path, wanted: recipes.Recipe) -> list[str]:
    """Return the keys in which a run folder's recipe differs from the one that is wanted, chosen `auto`s aside."""
    kept, now = recipes.load(folder / "recipe.yaml").dump(), wanted.dump()
    return [key for key in now if not _agree(kept[key], now[key])]


def _agree(kept: Any, now: Any) -> bool:
    if isinstance(kept, dict) and isinstance(now, dict):
        return kept.keys() == now.keys() and all(_agree(kept[key], now[key]) for key in kept)
    return bool(kept == now) or now == "auto"


def _axis(text: str) -> list[Variation]:
    """Return what a `--vary` text has in turn; commas within brackets or quotes part nothing."""
    key, equals, raw = text.partition("=")
    together = text.startswith("[")
    try:
        values = yaml.safe_load(text if together else f"[{raw}]" if equals else "")
    except yaml.YAMLError:
        values = None
    if together and values and all(isinstance(one, dict) and one for one in values):
        return [tuple((str(name), _text(value)) for name, value in one.items()) for one in values]
    if not key or not values or together:
        raise RecipeError(
            f"--vary {text!r} is not of the form key=value,value, such as algorithm=fedavg,fedprox, or "
            "'[{adapter: lora, trainer.lr: 1.0e-3}, {adapter: prompt-tuning, trainer.lr: 3.0e-2}]'"
        )
    return [((key, _text(value)),) for value in values]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plain(text: str) -> str:
    """Return a text that can be a file's name."""
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-.") or "x"
