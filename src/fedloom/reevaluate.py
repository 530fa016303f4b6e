"""Measure a run's result again without touching its folder, or an adapter or a model without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedloom import recipe as recipes
from fedloom.algorithms.fedavg import FedAvg
from fedloom.assets import prepare
from fedloom.checkpoint import FINISHED
from fedloom.client.identity import check_base
from fedloom.client.peft_files import saved_config
from fedloom.data.templates import Plain
from fedloom.home import BUNDLED
from fedloom.outcome import finite, write_summary
from fedloom.recipe import Recipe
from fedloom.reopen import adapter_of, find_round, read_recipe
from fedloom.results import intervals
from fedloom.tracking import Sink, Warned
from fedloom.types import ModelError, RecipeError
from fedloom.wire.codec import write_atomic
from fedloom.world import World

CONFIG = "adapter_config.json"
ALLOWED = (
    "data.template",
    "data.system",
    "model.dtype",
    "model.quantize",
    "model.attention",
    "model.device",
    "model.revision",
    "model.trust_remote_code",
    "runtime.threads",
)
"""What may be said beside `evaluate` of what has no recipe that says it."""
NO_ROWS = {"source": {"name": "tasks", "rows_per_category": 3, "categories": ["units"]}, "clients": 1}
"""The smallest federation, for what is measured without one."""


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


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured.

    Attributes:
        recipe: all settings, evaluators included.  regime: under which name; None: the base alone.
        checkpoint: of `run`; None: `recipe.init` or nothing.
        run: the run folder; None: there is none.
    """

    recipe: Recipe
    regime: str | None
    checkpoint: str | None = None
    run: Path | None = None


def target(what: str, settings: Sequence[str], checkpoint: str | None, adapter: Path | None) -> Target:
    """Find what a person wants measured.

    Args:
        what: a run folder, a PEFT folder, or the name of a model.
        settings: `evaluate=...` texts; without a run also those of `ALLOWED`. Others would measure something else.
        checkpoint: `latest`, `best` or a kept round of a run; None: the finished adapter.
        adapter: a PEFT folder to measure in place of the run's own, or on the model; None: there is none.

    Raises:
        ModelError: there is no such adapter or checkpoint.
        RecipeError: another key is set, or evaluators are needed and missing, or have no rows to measure.
    """
    run = Path(what)
    if not (run / "recipe.yaml").is_file():
        return _bare(what, settings, checkpoint, adapter)
    if odd := [text for text in settings if not _of_evaluators(text)]:
        raise RecipeError(
            f"fedloom eval sets evaluate=... only, since {run / 'recipe.yaml'} says the rest; got {odd[0]!r}"
        )
    recipe = recipes.load(read_recipe(run).dump(), settings)
    regime = recipe.algorithm.regime if adapter is None else "adapter"
    stateful = (run / "adapters").is_dir() or (run / "merged").is_dir() or recipe.algorithm.changes_base
    if adapter is None and checkpoint is None and stateful:
        # personal adapters are evaluated by their algorithm, from the clients' memories; a changed base by its log
        checkpoint = "latest"
    if checkpoint is None:
        recipe = recipe.model_copy(
            update={"init": _folder(run, adapter), "algorithm": FedAvg(), **({"adapt_steps": 0} if adapter else {})}
        )
    return Target(recipe, regime, checkpoint, run)


def _bare(what: str, settings: Sequence[str], checkpoint: str | None, adapter: Path | None) -> Target:
    """Return a target without a run: an adapter on its base model, or a model."""
    if checkpoint is not None:
        raise RecipeError(f"--checkpoint chooses among a run's own adapters, and {what} is no run folder")
    folder = Path(what) if (Path(what) / CONFIG).is_file() else None
    model = what
    if folder is not None:
        if adapter is not None:
            raise RecipeError(f"{what} is an adapter already; leave out --adapter, or name the model in its place")
        adapter, model = folder, base_of(folder)
    if odd := [text for text in settings if not _of_evaluators(text) and text.partition("=")[0] not in ALLOWED]:
        raise RecipeError(
            f"fedloom eval of an adapter or a model sets evaluate=... and {', '.join(ALLOWED)}; got {odd[0]!r}"
        )
    if not any(map(_of_evaluators, settings)):
        raise RecipeError(
            f"{what} is no run folder, so nothing says what to measure; name evaluators, such as 'evaluate=[mmlu]' or "
            "'evaluate=[{name: gsm8k, limit: 50}]' (all of them: fedloom list evaluators)"
        )
    tree: dict[str, Any] = {"model": {"name": model}, "data": NO_ROWS}
    if adapter is not None:
        part = adapter_of(adapter)
        tree |= {"adapter": {"name": part.part_name, **part.dump()}, "init": str(adapter)}
    recipe = recipes.load(tree, settings).resolved()
    if owning := [one.part_name for one in recipe.evaluate if one.own_rows]:
        raise RecipeError(
            f"evaluator {owning[0]} measures clients on their own rows, and {what} has none; leave it out, or "
            "measure a run"
        )
    return Target(recipe, None if adapter is None else "adapter")


def reevaluate(target: Target, sink: Sink, out: Path | None = None) -> Measured:
    """Measure the base and what was found on test data.

    Args:
        sink: receives the events.
        out: a new folder for samples, recipe and results, which `fedloom score` reads; None: nothing is kept.

    Raises:
        RecipeError: `out` is there already.
    """
    if out is not None and out.exists():
        raise RecipeError(f"--out: {out} exists; name a folder that does not")
    recipe, run = target.recipe, target.run
    with TemporaryDirectory() as temporary:
        place = out or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        # samples are written beside links to the run's state, so that the run folder stays as it is
        links = [place / name for name in ("checkpoints", "memories") if run is not None and (run / name).is_dir()]
        for link in links:
            link.symlink_to((run / link.name).resolve())  # type: ignore[operator]
        try:
            world = World(recipe, place, prepare(recipe if run is not None else _encodable(recipe), sink), sink)
            state = recipe.algorithm.init(world.assets.initial)
            if target.checkpoint is not None and run is not None:
                if note := check_base(run, world.assets.loaded.base):
                    sink.on(Warned(note))
                state, _ = world.checkpoints.load(find_round(run, world.checkpoints, target.checkpoint))
                world.memories.look_at(state.round + FINISHED)
            names = ["base"]
            if target.regime is not None:
                names += [target.regime, *(world.beside(target.regime) if run is not None else ())]
            metrics = {name: world.measure(state, name) for name in names}
            missed = {regime: why for regime, why in world.totals.not_run.items() if why}
            found = Measured(metrics, intervals(place), missed)
        finally:
            for link in links:
                link.unlink()
        if out is not None:
            write_atomic(out / "recipe.yaml", recipe.model_copy(update={"compare": ()}).to_yaml().encode())
            books = {"metrics": finite(metrics), "not_run": missed, "evaluation": world.totals.evaluation}
            write_summary(out, books)
        return found


def _of_evaluators(text: str) -> bool:
    return text.partition("=")[0].partition(".")[0] == "evaluate"


def _encodable(recipe: Recipe) -> Recipe:
    """Return the recipe with `NO_ROWS` as text that any tokenizer can express: nobody looks at them."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"template": Plain(), "system": None})})


def base_of(folder: Path) -> str:
    """Return the model that a PEFT folder's adapter belongs on: the bundled name where it is one."""
    told = str(saved_config(folder).base_model_name_or_path or "")
    if not told:
        raise ModelError(f"{folder}/{CONFIG} names no base model; name it: fedloom eval MODEL --adapter {folder}")
    return next((name for name, one in BUNDLED.items() if one.hub_id == told), told)


def _folder(run: Path, adapter: Path | None) -> Path:
    folder = run / "adapter" if adapter is None else adapter
    if adapter is None and not folder.is_dir():
        raise ModelError(
            f"{run} holds no adapter; finish it with: fedloom run --resume {run}, "
            "or measure a checkpoint with --checkpoint latest"
        )
    return folder
