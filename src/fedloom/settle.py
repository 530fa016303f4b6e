"""The last `auto`s of a recipe: what depends on the rows and on the memory that is free, chosen once and kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedloom.assets import Assets
from fedloom.client.attention import can_pack
from fedloom.client.batches import collate
from fedloom.client.checkpointing import checkpointed
from fedloom.client.memory import activation_bytes, free_bytes
from fedloom.client.trainer import Rows
from fedloom.recipe import Recipe
from fedloom.tensors import numel
from fedloom.types import RecipeError
from fedloom.units import human_bytes

PROBE_TOKENS = 512
"""Tokens of the pass whose memory is measured, if no single row has more."""
LARGEST_COHORT = 32
COPIES = 6
"""Of a client's tensors while it trains: values, gradient, two moments, and what was sent and what comes back."""


def settle(recipe: Recipe, assets: Assets) -> Recipe:
    """Return the recipe with packing, checkpointing and the cohort's size chosen.

    Args:
        recipe: resolved.  assets: the resident model and the rows.

    Raises:
        RecipeError: packing is asked of a model or adapter that cannot, a batch cannot fit in memory, or rows and
            virtual tokens have more positions than the model.
    """
    _check_positions(recipe, assets)
    recipe = _with_trainer(recipe, packing=_packing(recipe, assets))
    device = assets.loaded.model.device
    # workers on the CPU share its memory; on GPUs each has its own
    free = free_bytes(device) // (recipe.runtime.lanes(recipe) if device.type == "cpu" else 1)
    wanted = recipe.trainer.checkpointing
    need = _pass_bytes(recipe, assets, wanted is True)
    if wanted == "auto" and need > free // 2:
        wanted, need = True, _pass_bytes(recipe, assets, True)
    recipe = _with_trainer(recipe, checkpointing=wanted is True)
    per_client = COPIES * 4 * numel(assets.initial)
    if need + per_client > free:
        raise RecipeError(_too_large(recipe, assets, need + per_client, free))
    if recipe.runtime.cohort != "auto":
        return recipe
    room = max(1, int((free // 2 - need) // per_client))
    cohort = 1 if list(recipe.runtime.alone(recipe)) else min(room, _filling(recipe, assets))
    return recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"cohort": cohort})})


def _with_trainer(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.model_copy(update={"trainer": recipe.trainer.model_copy(update=changes)})


def _check_positions(recipe: Recipe, assets: Assets) -> None:
    virtual, longest = assets.attached.virtual, int(np.diff(assets.federation.encoded.starts).max())
    room = getattr(assets.loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if virtual and room is not None and longest + virtual > room:
        raise RecipeError(
            f"data.max_tokens={recipe.data.max_tokens} lets in a row of {longest} tokens, which with "
            f"adapter.tokens={virtual} exceeds the {room} positions of {recipe.model.name}; lower one of them"
        )


def _packing(recipe: Recipe, assets: Assets) -> bool:
    asked, model = recipe.trainer.packing, assets.loaded.model
    if asked is False or recipe.runtime.reference:
        return False
    if not assets.attached.packs:
        if asked is True:
            raise RecipeError(
                f"trainer.packing=true: with adapter={recipe.adapter.part_name} rows cannot lie side by side (allowed: "
                "auto, false)"
            )
        return False
    # on a GPU one call over padded rows beats a call a row
    able = can_pack(model) if asked is True or model.device.type == "cpu" else False
    if asked is True and not able:
        raise RecipeError(
            f"trainer.packing=true: the attention of a {model.config.model_type} model cannot keep packed rows apart "
            "(allowed: auto, false)"
        )
    return able


def _pass_bytes(recipe: Recipe, assets: Assets, checkpointing: bool) -> int:
    """Return what the largest pass of training keeps, from a smaller one that is really built."""
    encoded, model = assets.federation.encoded, assets.loaded.model
    lengths = np.diff(encoded.starts)
    order = np.argsort(-lengths, kind="stable")
    chosen = order[: max(1, int(np.searchsorted(np.cumsum(lengths[order]), PROBE_TOKENS, side="right")))]
    rows = Rows(encoded, chosen)
    batch = collate([[rows[i] for i in range(len(rows))]], model.device, packed=recipe.trainer.packing is True)
    assets.attached.load([assets.initial])
    with checkpointed(model, checkpointing):
        kept = activation_bytes(model, lambda: recipe.objective.losses(model, batch, recipe.runtime.reference))
    tokens = batch.ids.numel()
    return int(kept * max(recipe.trainer.micro_tokens, int(lengths.max())) / tokens)


def _filling(recipe: Recipe, assets: Assets) -> int:
    """Return how many clients' steps fill a pass, so that none is cut, and leave every lane some: more gain nothing."""
    encoded = assets.federation.encoded
    owned = [len(data.train) for data in assets.federation.clients.values()]
    step = recipe.trainer.rows_per_step(int(np.median(owned))) * float(np.diff(encoded.starts).mean())
    cohort = len(recipe.sampler.cohort(0, _seen(assets), recipe.seed))
    lane = -(-cohort // recipe.runtime.lanes(recipe))
    return max(1, min(LARGEST_COHORT, lane, int(recipe.trainer.micro_tokens / step)))


def _seen(assets: Assets) -> Sequence[str]:
    unseen = set(assets.federation.unseen)
    return [name for name in assets.federation.clients if name not in unseen]


def _too_large(recipe: Recipe, assets: Assets, need: int, free: int) -> str:
    longest = int(np.diff(assets.federation.encoded.starts).max())
    micro = recipe.trainer.micro_tokens
    knobs = [f"trainer.micro_tokens below {micro}"] if micro > longest else []
    knobs += [f"data.max_tokens below {longest} (the longest row)"]
    knobs += [] if recipe.trainer.checkpointing else ["trainer.checkpointing=true"]
    knobs += ["a smaller adapter.r"] if "r" in type(recipe.adapter).model_fields else []
    plain = recipe.model.quantize == "none" and not assets.attached.whole
    knobs += (["model.quantize=int8 or nf4"] if plain else []) + (["adapter=lora"] if assets.attached.whole else [])
    return (
        f"trainer: one training pass of {max(longest, micro)} tokens needs about "
        f"{human_bytes(need)} beside the model, and {human_bytes(free)} are free on {recipe.model.device}; set "
        + ", or ".join(knobs)
    )
