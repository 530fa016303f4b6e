"""FlowerTune: the pyproject.toml of a Flower app made for its LLM leaderboard ([tool.flwr.app.config])."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from fedloom.importing.base import Format, Settings, Tree, flatten, is_number, lora_targets
from fedloom.types import RecipeError

_QUESTION_IN_INPUT = ("medical-meadow-medical-flashcards", "medical_meadow_medical_flashcards")
"""Sets whose instruction is the same sentence everywhere; the question is in `input`."""

_NODES = "options.num-supernodes"


def read(text: str) -> Mapping[str, Any] | None:
    """Return the app's settings, and the size of its simulated federation, or None where the text is something else.

    Raises:
        RecipeError: it is the file of a Flower app, but not one that fine-tunes a language model.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None
    flwr = tree.get("tool", {}).get("flwr", {})
    config = flwr.get("app", {}).get("config")
    if config is None:
        return None
    flat = flatten(config)
    if "model.name" not in flat:
        raise RecipeError(
            f"a Flower app, but none of FlowerTune: [tool.flwr.app.config] has no model.name, but {', '.join(flat)}"
        )
    federations = flwr.get("federations", {})
    default = federations.get("default")
    nodes = flatten(federations.get(default, {})) if isinstance(default, str) else {}
    return {key.removeprefix("static."): value for key, value in flat.items()} | nodes


def translate(settings: Settings) -> Tree:
    """Return the recipe of a FlowerTune app; what has no counterpart is remarked on in `settings`."""
    model = str(settings.take("model.name"))
    tree: Tree = {
        "model": {"name": model, **_quantize(settings)},
        "adapter": _adapter(settings, model),
        "data": _data(settings),
        "trainer": _trainer(settings),
        "algorithm": {"name": "fedavg", "weighting": "examples"},
        "sampler": _sampler(settings),
        "checkpoint": {"every": settings.take("train.save-every-round", 5)},
        "evaluate": [],
        "rounds": settings.take("num-server-rounds", 200),
    }
    _rest(settings)
    return {key: value for key, value in tree.items() if value != {}}


def _quantize(settings: Settings) -> Tree:
    bits = settings.take("model.quantization")
    if bits == 4:
        settings.note("model.quantization", "bitsandbytes' fp4 there; nf4 with double quantisation here")
        return {"quantize": "nf4"}
    if bits == 8:
        return {"quantize": "int8"}
    if bits:
        settings.drop("model.quantization", "model.quantize is nf4 (4 bits), int8 (8) or none")
    return {}


def _adapter(settings: Settings, model: str) -> Tree:
    named = settings.take("model.lora.peft-lora-target-modules") or settings.take("model.lora.target-modules")
    named = [one.strip() for one in named.split(",")] if isinstance(named, str) else named
    return {
        "name": "dora" if settings.take("model.lora.peft-use-dora", False) else "lora",
        "r": settings.take("model.lora.peft-lora-r", 32),
        "alpha": settings.take("model.lora.peft-lora-alpha", 64),
        "dropout": settings.take("model.lora.peft-lora-dropout", 0.075),
        "targets": named or lora_targets(settings, model, "model.name"),
    }


def _data(settings: Settings) -> Tree:
    name = str(settings.take("dataset.name", ""))
    source: Tree = {"name": "hub", "id": name}
    if name.rpartition("/")[2] in _QUESTION_IN_INPUT:
        source["keys"] = {"prompt": "input", "completion": "output"}
    if not name:
        settings.drop("dataset.name", "is empty; set data.source")
        source = {"name": "tasks"}
    settings.note("train.seq-length", "longer rows lost their end there; here they are left out and counted")
    clients = settings.take(_NODES)
    if clients is None:
        settings.note("dataset.name", "no federation with a number of nodes is given: data.clients has its default")
    return {
        "source": source,
        "template": "alpaca",
        **({} if clients is None else {"clients": clients}),
        "partition": "iid",
        "splits": {"train": 1.0, "validation": 0.0, "test": 0.0},
        "max_tokens": settings.take("train.seq-length", 512),
    }


def _trainer(settings: Settings) -> Tree:
    arguments = "train.training-arguments"
    steps, epochs = settings.take(f"{arguments}.max-steps", -1), settings.take(f"{arguments}.num-train-epochs", 3)
    counted = is_number(steps) and steps > 0
    if counted:
        settings.pass_over(f"{arguments}.num-train-epochs", "max-steps is set, which goes before")
    high, low = settings.take("train.learning-rate-max", 5e-5), settings.take("train.learning-rate-min", 1e-6)
    settings.note("train.learning-rate-min", "its cosine is one round ahead: there the first round is round 1")
    shape = settings.take(f"{arguments}.lr-scheduler-type", "constant")
    if shape != "constant":
        settings.drop(f"{arguments}.lr-scheduler-type", "within a round the learning rate is constant")
    floor = round(low / high, 9) if is_number(low) and is_number(high) and high > 0 else 0.0
    saving = "gradient-checkpointing"
    clip = settings.take(f"{arguments}.max-grad-norm", 1.0)
    return {
        "optimizer": {"name": "adamw", "weight_decay": settings.take(f"{arguments}.weight-decay", 0.0)},
        "lr": high,
        **({"steps": steps} if counted else {"epochs": epochs}),
        "batch": settings.take(f"{arguments}.per-device-train-batch-size", 16),
        "accumulate": settings.take(f"{arguments}.gradient-accumulation-steps", 1),
        "schedule": {"name": "cosine", "floor": floor},
        "clip_norm": clip if is_number(clip) and clip > 0 else None,
        "checkpointing": True in [settings.take(key) for key in (f"{arguments}.{saving}", f"model.{saving}")],
    }


def _sampler(settings: Settings) -> Tree:
    fraction = settings.take("strategy.fraction-train", settings.take("strategy.fraction-fit", 1.0))
    settings.take("strategy.fraction-fit")
    return {"fraction": fraction}


def _rest(settings: Settings) -> None:
    arguments = "train.training-arguments"
    if settings.take("strategy.fraction-evaluate", 0.0):
        settings.drop("strategy.fraction-evaluate", "every client with held-out rows is measured; set data.splits")
    for key in ("output-dir", "logging-steps", "save-steps", "save-total-limit", "report-to"):
        settings.pass_over(f"{arguments}.{key}", "a run writes into its folder: fedloom run ... --out DIR")
    settings.pass_over(f"{arguments}.learning-rate", "train.learning-rate-max is used in its place")
    for key in settings.under("options"):
        settings.pass_over(key, "clients share one resident base; see runtime")
    for key in settings.under("strategy"):
        settings.drop(key, "FedAvg, as in its template, is written; another strategy: set algorithm or server")


FLOWERTUNE = Format(
    "FlowerTune", "a pyproject.toml whose [tool.flwr.app.config] names a model (model.name)", read, translate
)
