"""Assets: the resident model with its adapter layers, the rows and the first adapter, made once for all regimes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.client.attached import Attached, check_fit
from fedloom.client.compiling import compile_layers
from fedloom.client.identity import check_base
from fedloom.client.lean import lean
from fedloom.client.models import Loaded, load_model
from fedloom.data import federation
from fedloom.data.federation import Federation
from fedloom.home import home
from fedloom.outcome import reset_peaks
from fedloom.recipe import Recipe
from fedloom.tracking import Phase, Sink, Warned
from fedloom.types import RecipeError


@dataclass(frozen=True, slots=True)
class Assets:
    """What all regimes of a run share: the resident model with its adapter layers, and the split.

    Attributes:
        initial: the adapter that everybody starts from.  seconds: it took to build all this.
        fresh: the peaks of memory began anew with it, or later: see `outcome.reset_peaks`.
    """

    loaded: Loaded
    attached: Attached
    federation: Federation
    initial: Mapping[str, Tensor]
    seconds: float
    fresh: bool = False


def prepare(recipe: Recipe, sink: Sink) -> Assets:
    """Load the model, read and encode the rows, and attach the adapter.

    Args:
        recipe: a resolved recipe.
        sink: is told what takes time.

    Raises:
        DataError, ModelError, RecipeError: something cannot be found, read or fitted together.
    """
    began, fresh = time.perf_counter(), reset_peaks()
    torch.set_num_threads(recipe.runtime.threads)
    sink.on(Phase("loading the model"))
    loaded = load_model(recipe.model, lambda text: sink.on(Phase(text)))
    sink.on(Phase("reading and encoding the rows"))
    cache = home() / "encoded"
    split = federation.build(
        recipe.data, loaded.tokenizer, recipe.seed, cache, lambda done: sink.on(Phase("encoding rows", done))
    )
    if not recipe.runtime.reference:
        lean(loaded.model)
    attached = recipe.adapter.attach(loaded.model, recipe.runtime.reference)
    if problems := list(recipe.algorithm.check([name for name in attached.shapes() if attached.moves(name)])):
        raise RecipeError("; ".join(problems))
    if recipe.model.compile:
        sink.on(Phase("compiling: the first steps take longer"))
        compile_layers(loaded.model)
    initial: Mapping[str, Tensor] = attached.init(recipe.seed, adapter_dtype(loaded))
    if recipe.init is not None:
        if not attached.whole and (note := check_base(recipe.init, loaded.base)):
            sink.on(Warned(note))
        initial = attached.read(recipe.init)
        check_fit(initial, attached.shapes())
        initial = {name: initial[name].to(adapter_dtype(loaded)) for name in attached.shapes()}
    sink.on(Phase(""))
    return Assets(loaded, attached, split, initial, time.perf_counter() - began, fresh)


def adapter_dtype(loaded: Loaded) -> torch.dtype:
    """Return the dtype of the tensors of an adapter on a model: float32 at least."""
    return torch.promote_types(loaded.model.dtype, torch.float32)
