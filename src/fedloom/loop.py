"""The whole story of a run: build the world once, go round after round, measure and write the result."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedloom import allocator
from fedloom import recipe as recipes
from fedloom.algorithms.centralized import Centralized
from fedloom.algorithms.local import Local
from fedloom.assets import Assets, prepare
from fedloom.checkpoint import Checkpoints
from fedloom.client.adapters import Lora
from fedloom.data.federation import split_table
from fedloom.outcome import read_summary, reset_peaks, summarize, write_summary
from fedloom.plan import make_plan
from fedloom.recipe import RESUMABLE, Recipe
from fedloom.report import write_report
from fedloom.report.composition import composition
from fedloom.server.aggregate import Mean
from fedloom.server.optim import ServerSgd
from fedloom.server.sampling import Uniform
from fedloom.settle import settle
from fedloom.trackers import open_all
from fedloom.tracking import Finished, Phase, Sink, Sinks, Warned
from fedloom.types import RecipeError, ServerState, Stopped
from fedloom.wire.codec import write_atomic
from fedloom.world import World


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: its folder, its resolved recipe, and the content of its summary.json."""

    folder: Path
    recipe: Recipe
    summary: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Mapping[str, float]]]:
        """Regime -> evaluator -> metric -> value, on test data."""
        return self.summary["metrics"]  # type: ignore[no-any-return]

    @property
    def adapter(self) -> Path:
        """PEFT folder of the global adapter (absent for methods that have none)."""
        return self.folder / "adapter"


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *overrides: str,
    out: str | Path | None = None,
    overwrite: bool = False,
    set_files: Sequence[str] = (),
    sink: Sink | None = None,
    **settings: Any,
) -> Result:
    """Run a recipe to its end.

        fedloom.run("demo", rounds=3)
        fedloom.run("demo", "trainer.lr=1e-3", algorithm="fedprox", out="runs/prox")

    Args:
        recipe: a shipped name, a YAML file, a mapping, or a Recipe.
        overrides: `dotted.path=value` texts, as on the command line.
        out: the run folder; by default runs/<name>.
        overwrite: replace a run folder that is already there.
        set_files: shipped names or YAML files of keys to lay over the recipe.
        sink: receives the run's events.
        settings: further keys of the recipe and their values.

    Raises:
        FedloomError: something in the recipe, data or model is wrong, or the run had to stop.
    """
    allocator.tune()
    tree: Any = recipe.dump() if isinstance(recipe, Recipe) else recipe
    name = Path(tree).stem if isinstance(tree, str | Path) else "run"
    loaded = recipes.load(tree, overrides, set_files, settings)
    folder = Path(out) if out is not None else Path("runs") / name
    resolved = loaded.resolved()
    _claim(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        write_atomic(folder / "recipe.yaml", resolved.to_yaml().encode())
        return _story(resolved, folder, sink)


def resume(folder: str | Path, overrides: Sequence[str] = (), sink: Sink | None = None) -> Result:
    """Go on with an interrupted run, or go on longer with a finished one.

    Args:
        folder: the run folder.
        overrides: `key=value` texts for the keys that a resume may change; `rounds=+10` adds to the rounds.
        sink: receives the run's events.

    Raises:
        RecipeError: the folder is no run folder, or a key may not be changed.
    """
    allocator.tune()
    folder = Path(folder)
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(f"--resume {folder}: there is no recipe.yaml in it, so it is no run folder")
    before = recipes.load(path)
    texts = [_longer(text, before.rounds) for text in overrides]
    after = recipes.load(path, texts)
    if odd := _unlike(before, after):
        raise RecipeError(
            f"--resume {folder}: {', '.join(odd)} cannot change in the middle of a run (allowed: "
            f"{', '.join(RESUMABLE)}, and a runtime of the same reference, threads and cohort); "
            f"start a new run with init={folder / 'adapter'} instead"
        )
    finished = Checkpoints(folder / "checkpoints", after.checkpoint.keep).find("latest") or 0
    if after.rounds < finished:
        raise RecipeError(
            f"--resume {folder}: rounds={after.rounds}, but {finished} rounds are done; allowed: {finished} or more"
        )
    with _locked(folder):
        done = folder / "summary.json"
        if done.exists() and before == after:
            return Result(folder, after, read_summary(folder))
        done.unlink(missing_ok=True)  # it tells of the run before this one
        write_atomic(path, after.to_yaml().encode())
        return _story(after, folder, sink)


def _unlike(before: Recipe, after: Recipe) -> list[str]:
    """Return the keys because of which a run of `before` cannot go on as one of `after`."""
    old, new = before.dump(), after.dump()
    odd = [key for key in old if old[key] != new[key] and key not in RESUMABLE]
    return [key for key in odd if key != "runtime" or not before.runtime.same_results(after.runtime)]


def _longer(text: str, rounds: int) -> str:
    key, _, value = text.partition("=")
    if key == "rounds" and value.startswith("+") and value[1:].isdigit():
        return f"rounds={rounds + int(value[1:])}"
    return text


def _story(recipe: Recipe, folder: Path, sink: Sink | None) -> Result:
    """Run the recipe's own regime, then those it is compared with, on one resident model."""
    for one in recipe.evaluate:
        if one.every:
            one.check(recipe.seed)
    for torn in sorted(folder.rglob(".*.tmp"), reverse=True):  # what a kill in mid-write left, deepest first
        if torn.is_dir() and not torn.is_symlink():
            shutil.rmtree(torn)
        else:
            torn.unlink()
    trackers = open_all(recipe.trackers, folder, recipe.dump(), sink)
    with Sinks([*([sink] if sink else []), *trackers]) as sinks:
        assets = prepare(recipe, sinks)
        recipe = settle(recipe, assets)
        write_atomic(folder / "recipe.yaml", recipe.to_yaml().encode())
        table = json.dumps(split_table(assets.federation), indent=1, ensure_ascii=False)
        write_atomic(folder / "split.json", table.encode())
        kinds = composition(assets.federation, recipe.data.partition.field())
        write_atomic(folder / "composition.json", json.dumps(kinds, ensure_ascii=False).encode())
        world, state = _regime(recipe, folder, assets, sinks, None)
        others: dict[str, Mapping[str, Any]] = {}
        for name in recipe.compare:
            place = folder / "regimes" / name
            place.mkdir(parents=True, exist_ok=True)
            other = REGIMES[name](recipe, world, state)
            _discard_another(place, other)
            write_atomic(place / "recipe.yaml", other.to_yaml().encode())
            write_atomic(place / "split.json", table.encode())
            anew = replace(assets, fresh=reset_peaks())
            its_world, its_state = _regime(other, place, anew, sinks, world.totals.results["base"])
            others[name] = summarize(its_world, its_state, {})
            write_summary(place, others[name])
        summary = summarize(world, state, others)
        write_summary(folder, summary)
        _draw(folder, sinks)
        sinks.on(Finished(summary))
    return Result(folder, recipe, summary)


def _draw(folder: Path, sink: Sink) -> None:
    """Draw the finished run; what cannot be drawn is told, and stops nothing."""
    try:
        write_report(folder)
    except Exception as error:  # everything that the run was for is on disk by now
        sink.on(
            Warned(f"report.html could not be drawn ({type(error).__name__}: {error}); try: fedloom report {folder}")
        )


def _regime(
    recipe: Recipe, folder: Path, assets: Assets, sink: Sink, base: Mapping[str, Mapping[str, float]] | None
) -> tuple[World, ServerState]:
    """Run one regime from its last checkpoint, or from the start, to its end."""
    world = World(recipe, folder, assets, sink)
    state = world.resume()
    sink.on(make_plan(world, state.round if state else 0))
    try:
        if state is None or (state.round < recipe.rounds and not world.stopped(state)):
            world.crew.open()
        if state is None:
            state = world.start(base)
        while state.round < recipe.rounds and not world.stopped(state):
            cohort = recipe.sampler.cohort(state.round, world.clients, recipe.seed)
            after, report = world.engine.round(world.crew, state, cohort)
            world.after(after, report)
            state = after
        world.finish_clients(state)
    except (KeyboardInterrupt, Stopped):
        if state is not None:
            sink.on(Phase("saving the state"))
            world.rescue(state)
        raise
    finally:
        world.crew.close()
    world.finish(state)
    return world, state


def _discard_another(place: Path, recipe: Recipe) -> None:
    """Remove what an earlier budget left in a regime's folder: its rounds were trained in another way."""
    if not (place / "recipe.yaml").is_file():
        return
    if _unlike(recipes.load(place / "recipe.yaml"), recipe):
        shutil.rmtree(place)
        place.mkdir()


def _local(recipe: Recipe, world: World, state: ServerState) -> Recipe:
    """Every client alone, sampled as in the federation: the same steps on the same rows."""
    return _beside(recipe, state, algorithm=Local(weighting=recipe.algorithm.weighting))


def _centralized(recipe: Recipe, world: World, state: ServerState) -> Recipe:
    """All rows in one place, trained on as many tokens as the federation was, or for as many rounds and steps."""
    # one participant's change is applied as it is: a server step would only distort plain training
    plain = recipe.server.model_copy(update={"lr": 1.0, "optimizer": ServerSgd()})
    changes: dict[str, Any] = {"algorithm": Centralized(), "sampler": Uniform(), "server": plain}
    if isinstance(recipe.adapter, Lora):
        changes["adapter"] = recipe.adapter.model_copy(update={"ranks": ()})  # the one participant has the global rank
    if recipe.budget == "equal_tokens":
        tokens = max(1, math.ceil(world.totals.tokens / state.round))
        length = {"steps": None, "epochs": None, "tokens": tokens}
        changes["trainer"] = recipe.trainer.model_copy(update=length)
    return _beside(recipe, state, **changes)


def _beside(recipe: Recipe, state: ServerState, **changes: Any) -> Recipe:
    """Return the recipe of a compared regime: the same in all but `changes`, for as many rounds as were really run."""
    alone = {"compare": (), "early_stop": None, "rounds": state.round, "transforms": (), "attacks": ()}
    server = changes.get("server", recipe.server).model_copy(update={"aggregator": Mean()})
    return recipe.model_copy(update={**alone, **changes, "server": server})


UNBEGUN = frozenset({"recipe.yaml", "split.json", "composition.json"})
"""What a run folder holds, beside hidden files, before anything was trained or measured."""
REGIMES: Mapping[str, Callable[[Recipe, World, ServerState], Recipe]] = {"local": _local, "centralized": _centralized}


def _claim(folder: Path, overwrite: bool) -> None:
    """Make room for a new run folder, or refuse."""
    if odd := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise RecipeError(f"--out {folder}: {odd} is a file; choose a folder")
    if not folder.exists() or all(path.name.startswith(".") or path.name in UNBEGUN for path in folder.iterdir()):
        return  # at most what a run leaves that was refused or killed before it began
    if not overwrite:
        raise RecipeError(
            f"the run folder {folder} exists; go on with --resume {folder}, replace it with --overwrite, "
            "or choose another with --out DIR"
        )
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(
            f"--overwrite: {folder} is not empty and holds no recipe.yaml, so it is no run folder; remove it yourself"
        )
    with _locked(folder):
        shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder (a killed one frees it), and say what a full disk means."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(
            f"another process is running in {folder}; wait for it, or choose another folder with --out"
        ) from None
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise Stopped(
            f"{folder}: {error.strerror}; the last checkpoint is intact. Make room, then go on with: "
            f"fedloom run --resume {folder}"
        ) from error
    finally:
        lock.release()
