"""Take up what a run left behind: its recipe, its model and one of its adapters; a missing adapter is an error."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedloom import recipe as recipes
from fedloom.checkpoint import FINISHED, Checkpoints, MemoryStore
from fedloom.client.adapters import Adapter
from fedloom.client.attached import Attached
from fedloom.client.bundled import Notify, ignore
from fedloom.client.identity import check_base
from fedloom.client.models import Loaded, Model, load_model
from fedloom.client.peft_files import load_peft, saved_config
from fedloom.recipe import Recipe
from fedloom.types import Merge, ModelError, RecipeError, Tensors, suggest

NAMES_TOLD = 8


@dataclass(frozen=True, slots=True)
class Reopened:
    """A run's model with one adapter.

    Attributes:
        params: the adapter's tensors by live name; already in the layers of `attached`.
        label: which adapter it is, in a few words.
        base: what the run merged into the base weights, where `params` does not hold it; the model has it in them.
    """

    recipe: Recipe
    loaded: Loaded
    attached: Attached
    params: Tensors
    label: str
    base: tuple[Merge, ...] = ()


def read_recipe(run: Path) -> Recipe:
    """Return the resolved recipe of a run folder.

    Raises:
        RecipeError: the folder is none.
    """
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(
            f"{run} is no run folder: it holds no recipe.yaml; `fedloom run RECIPE` makes one under runs/"
        )
    return recipes.load(run / "recipe.yaml")


def read_adapter(
    run: Path, recipe: Recipe, checkpoint: str | None, client: str | None
) -> tuple[Tensors, str, tuple[Merge, ...]]:
    """Return an adapter of a run, what to call it, and the changes of the base weights that it needs.

    Args:
        run: the run folder.  recipe: its recipe.
        checkpoint: `latest`, `best` or a round; None: the finished adapter.
        client: whose personal adapter; None: the global one.

    Raises:
        ModelError: there is no such adapter.
    """
    if client is not None:
        _check_client(run, recipe, client)
    if checkpoint is None and client is None and (run / "merged").is_dir():
        checkpoint = "latest"  # the base changed densely: the state has that change and the adapter apart
    if checkpoint is not None:
        params, base = _from_checkpoint(run, recipe, checkpoint, client)
        return params, f"checkpoint {checkpoint}", base
    folder = run / "adapter" if client is None else run / "adapters" / client
    if client is not None and folder.is_dir():
        folder = next(iter(sorted(folder.iterdir())))
    if not folder.is_dir():
        clients = sorted(p.name for p in (run / "adapters").glob("*"))
        hint = (
            f"it has personal adapters; name one with --client: {', '.join(clients[:5])}"
            if clients
            else (f"finish it with: fedloom run --resume {run}, or name a checkpoint with --checkpoint latest")
        )
        raise ModelError(f"{run} holds no {folder.relative_to(run)}; {hint}")
    return recipe.adapter.read(folder), str(folder.relative_to(run)), ()


def _check_client(run: Path, recipe: Recipe, client: str) -> None:
    """Raise ModelError unless the run has a client of that name with an adapter of its own."""
    if not recipe.algorithm.personal:
        raise ModelError(
            f"algorithm {recipe.algorithm.part_name} has one adapter for all clients; leave out --client {client}"
        )
    split = run / "split.json"
    table = json.loads(split.read_text(encoding="utf-8")) if split.is_file() else {}
    names = [name for name, rows in table.items() if isinstance(rows, dict)]  # beside them stand public rows, a hash
    if client not in names:
        told = f"{', '.join(names[:NAMES_TOLD])}{', ...' if len(names) > NAMES_TOLD else ''}"
        raise ModelError(f"{run} has no client {client!r}{suggest(client, names)}; its clients: {told or 'none yet'}")


def find_round(run: Path, checkpoints: Checkpoints, name: str) -> int:
    """Return the round of the checkpoint that a person names `latest`, `best` or by its round.

    Raises:
        ModelError: the run has none of that name.
    """
    found = int(name) if name.isdigit() else checkpoints.find(name)
    if found is None or found not in checkpoints.rounds():
        known = ", ".join(map(str, checkpoints.rounds())) or "none"
        raise ModelError(f"{run} has no checkpoint {name!r}; allowed: latest, best, or a kept round ({known})")
    return found


def _from_checkpoint(
    run: Path, recipe: Recipe, checkpoint: str, client: str | None
) -> tuple[Tensors, tuple[Merge, ...]]:
    checkpoints = Checkpoints(run / "checkpoints", recipe.checkpoint.keep)
    found = find_round(run, checkpoints, checkpoint)
    state, _ = checkpoints.load(found)
    memory = None
    if client is not None:
        store = MemoryStore(run / "memories")
        store.look_at(found + FINISHED)
        memory = store.load(client)
    slots = recipe.algorithm.export(state, memory)
    if not slots:
        raise ModelError(f"algorithm {recipe.algorithm.part_name} has no global adapter; name a client with --client")
    return next(iter(slots.values())), state.base


def reopen(run: Path, checkpoint: str | None = None, client: str | None = None, notify: Notify = ignore) -> Reopened:
    """Load a run's model with one of its adapters.

    Args:
        run, checkpoint, client: as for `read_adapter`.
        notify: is told of what takes long, and of what could not be checked.

    Raises:
        ModelError: there is no such adapter, or the model is not the one that the run trained it on.
    """
    recipe = read_recipe(run)
    params, label, base = read_adapter(run, recipe, checkpoint, client)
    loaded = load_model(recipe.model, notify)
    if note := check_base(run, loaded.base):
        notify(note)
    attached = recipe.adapter.attach(loaded.model)
    attached.rebase(base)
    attached.load([params])
    return Reopened(recipe, loaded, attached, params, label, base)


def load(model: Model, adapter: Path | None, notify: Notify = ignore) -> Loaded:
    """Load a model, without adapter or with that of a PEFT folder in its layers.

    Args:
        notify: is told of what takes long, and of what could not be checked.

    Raises:
        ModelError: a folder cannot be read, or the adapter does not fit the model or was trained on another one.
    """
    if adapter is None:
        return load_model(model, notify)
    part = adapter_of(adapter)
    params, loaded = part.read(adapter), load_model(model, notify)
    if note := check_base(adapter, loaded.base):
        notify(note)
    part.attach(loaded.model).load([params])
    return loaded


def adapter_of(folder: Path) -> Adapter:
    """Return the part that a PEFT folder's configuration describes.

    Raises:
        ModelError: the folder holds no adapter, or one of a kind that there is no part for.
    """
    load_peft(folder)  # what holds no adapter at all is told by its own sentence
    saved = saved_config(folder)
    kinds = [kind for kind in Adapter.known.values() if issubclass(kind, Adapter)]
    found = next((part for kind in kinds if (part := kind.from_peft(saved)) is not None), None)
    if found is None:
        raise ModelError(f"{folder} holds an adapter of kind {saved.peft_type}, which has no part here")
    return found
