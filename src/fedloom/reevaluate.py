"""Measure a run's result again, without touching its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from fedloom import recipe as recipes
from fedloom.reopen import read_recipe
from fedloom.tracking import Sink
from fedloom.types import ModelError, RecipeError
from fedloom.world import World, prepare


def reevaluate(
    run: Path, settings: Sequence[str], checkpoint: str | None, sink: Sink
) -> dict[str, dict[str, Mapping[str, float]]]:
    """Return regime -> evaluator -> metrics of the base and of a checkpoint, on test data.

    Args:
        run: the run folder.
        settings: `evaluate=...` texts; other keys are refused, since they would measure something else.
        checkpoint: `latest` (the default), `best` or a kept round.
        sink: receives the events.

    Raises:
        ModelError: there is no such checkpoint.
        RecipeError: the folder is no run folder, or another key is set.
    """
    if odd := [text for text in settings if text.partition("=")[0].partition(".")[0] != "evaluate"]:
        raise RecipeError(f"fedloom eval sets evaluate=... only; got {odd[0]!r}")
    recipe = recipes.load(read_recipe(run).dump(), settings)
    with TemporaryDirectory() as place:
        # samples are written beside links to the run's state, so that the run folder stays as it is
        for name in ("checkpoints", "memories"):
            if (run / name).is_dir():
                (Path(place) / name).symlink_to((run / name).resolve())
        world = World(recipe, Path(place), prepare(recipe, sink), sink)
        name = checkpoint or "latest"
        found = int(name) if name.isdigit() else world.checkpoints.find(name)
        if found not in world.checkpoints.rounds():
            known = ", ".join(map(str, world.checkpoints.rounds())) or "none"
            raise ModelError(f"{run} has no checkpoint {name!r}; allowed: latest, best, or a kept round ({known})")
        state, _ = world.checkpoints.load(found)
        world.memories.look_at(found)
        return {regime: world.measure(state, regime) for regime in ("base", recipe.algorithm.regime)}
