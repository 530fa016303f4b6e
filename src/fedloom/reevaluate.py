"""Measure a run's result again, without touching its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedloom import recipe as recipes
from fedloom.algorithms.fedavg import FedAvg
from fedloom.checkpoint import FINISHED
from fedloom.reopen import find_round, read_recipe
from fedloom.results import intervals
from fedloom.tracking import Sink
from fedloom.types import ModelError, RecipeError
from fedloom.world import World, prepare


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found.

    Attributes:
        metrics: regime -> evaluator -> metrics.  intervals: see `results.intervals`.
        not_run: regime -> evaluator -> why it could not measure all that was asked for.
    """

    metrics: Mapping[str, Mapping[str, Mapping[str, float]]]
    intervals: Sequence[str]
    not_run: Mapping[str, Mapping[str, str]]


def reevaluate(
    run: Path, settings: Sequence[str], checkpoint: str | None, adapter: Path | None, sink: Sink
) -> Measured:
    """Measure the base and an adapter on test data.

    Args:
        run: the run folder.
        settings: `evaluate=...` texts; other keys are refused, since they would measure something else.
        checkpoint: `latest`, `best` or a kept round; None: the finished adapter.
        adapter: a PEFT folder to measure in its place; None: the run's own.
        sink: receives the events.

    Raises:
        ModelError: there is no such adapter or checkpoint.
        RecipeError: the folder is no run folder, or another key is set.
    """
    if odd := [text for text in settings if text.partition("=")[0].partition(".")[0] != "evaluate"]:
        raise RecipeError(f"fedloom eval sets evaluate=... only; got {odd[0]!r}")
    recipe = recipes.load(read_recipe(run).dump(), settings)
    regime = recipe.algorithm.regime if adapter is None else "adapter"
    stateful = (run / "adapters").is_dir() or (run / "merged").is_dir() or recipe.algorithm.changes_base
    if adapter is None and checkpoint is None and stateful:
        # personal adapters are evaluated by their algorithm, from the clients' memories; a changed base by its log
        checkpoint = "latest"
    if checkpoint is None:
        recipe = recipe.model_copy(update={"init": _folder(run, adapter), "algorithm": FedAvg()})
    with TemporaryDirectory() as place:
        # samples are written beside links to the run's state, so that the run folder stays as it is
        for name in ("checkpoints", "memories"):
            if (run / name).is_dir():
                (Path(place) / name).symlink_to((run / name).resolve())
        world = World(recipe, Path(place), prepare(recipe, sink), sink)
        state = recipe.algorithm.init(world.assets.initial)
        if checkpoint is not None:
            state, _ = world.checkpoints.load(find_round(run, world.checkpoints, checkpoint))
            world.memories.look_at(state.round + FINISHED)
        metrics = {
            name: world.measure(state, name)
            for name in ("base", regime, *(world.beside(regime) if adapter is None else ()))
        }
        return Measured(metrics, intervals(Path(place)), {r: why for r, why in world.totals.not_run.items() if why})


def _folder(run: Path, adapter: Path | None) -> Path:
    folder = run / "adapter" if adapter is None else adapter
    if adapter is None and not folder.is_dir():
        raise ModelError(
            f"{run} holds no adapter; finish it with: fedloom run --resume {run}, "
            "or measure a checkpoint with --checkpoint latest"
        )
    return folder
