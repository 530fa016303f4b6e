"""FS-LLM's algorithms, personalisation and virtual tokens, as parts of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedloom.algorithms import Algorithm
from fedloom.client.adapters import Adapter
from fedloom.importing.base import Settings, Tree

_METHODS: Mapping[str, str] = {"fedopt": "fedavg", "global": "centralized"}
"""Their method -> our algorithm, where the names differ."""
_TOKENS: Mapping[str, str] = {"prefix": "prefix-tuning", "prompt": "prompt-tuning", "p-tuning": "p-tuning"}
"""Their adapter method -> our adapter."""
_FIXED = ("task_type", "inference_mode", "num_transformer_submodules", "num_layers", "token_dim", "num_attention_heads")
"""What peft finds out about the model by itself."""


def algorithm(settings: Settings) -> Tree:
    """Return the algorithm of a file."""
    method = str(settings.take("federate.method", "FedAvg")).lower()
    # there a client weighs as many rows as it trained on in the round: with a number of batches, all the same
    by_rows = settings.take("train.batch_or_epoch", "batch") == "epoch"
    weighting = "uniform" if settings.take("federate.ignore_weight", False) or not by_rows else "examples"
    if not by_rows:
        settings.note(
            "train.local_update_steps", "so many batches weigh all clients alike: algorithm.weighting=uniform"
        )
        settings.pass_over("federate.ignore_weight", "so many batches weigh all clients alike anyway")
    name = _METHODS.get(method, method)
    options: dict[str, tuple[str, Any]] = {}
    kept = settings.take("personalization.local_param", [])
    if kept and name != "fedavg":
        settings.drop("personalization.local_param", f"{name} keeps no tensors by name; algorithm=fedper does")
    if name == "fedavg" and settings.take("fedprox.use", False):
        name, options = "fedprox", {"mu": ("fedprox.mu", settings.take("fedprox.mu", 0.0))}
        if kept:
            settings.drop("personalization.local_param", "fedprox keeps no tensors by name; algorithm=fedper does")
    elif name == "fedavg" and kept:
        # there a keyword is looked for anywhere in a name
        patterns = [f"*{word}*" for word in kept]
        name, options = "fedper", {"private": ("personalization.local_param", patterns)}
        settings.note("personalization.local_param", "names here are like model.layers.0.self_attn.q_proj.lora_B")
    elif name in _OWN:
        options = {field: (key, settings.take(key, default)) for field, (key, default) in _OWN[name].items()}
    made = settings.part(Algorithm, name, options, "federate.method") or {"name": "fedavg"}
    weighs = "weighting" in Algorithm.known[made["name"]].model_fields and made["name"] != "centralized"
    return {**made, "weighting": weighting} if weighs else made


_OWN: Mapping[str, Mapping[str, tuple[str, Any]]] = {
    "ditto": {
        "lam": ("personalization.regular_weight", 0.1),
        "personal_steps": ("personalization.local_update_steps", None),
    },
    "pfedme": {
        "lam": ("personalization.regular_weight", 0.1),
        "inner_steps": ("personalization.K", 5),
        "beta": ("personalization.beta", 1.0),
        "outer_lr": ("personalization.lr", None),
    },
    "fedem": {"components": ("model.model_num_per_trainer", 1)},
}
"""Algorithm -> our field -> (their setting, its default there)."""


def virtual_tokens(settings: Settings, kind: str, options: Mapping[str, Any], key: str) -> Tree | None:
    """Return the adapter of a method other than LoRA.

    Args:
        kind: their `adapter_method`.  options: the rest of their arguments.  key: where they stand.
    """
    names = {"num_virtual_tokens": "tokens", "encoder_hidden_size": "hidden"}
    given = {names.get(name, name): (key, value) for name, value in options.items() if name not in _FIXED}
    if str(given.pop("prompt_tuning_init", (key, "RANDOM"))[1]).upper() == "TEXT":
        given["text"] = given.pop("prompt_tuning_init_text", (key, None))
    given.pop("tokenizer_name_or_path", None)
    return settings.part(Adapter, _TOKENS.get(kind, kind), given, key)


def adapt_steps(settings: Settings) -> int:
    """Return the steps that clients take before they are measured."""
    if not settings.take("finetune.before_eval", False):
        return 0
    settings.note("finetune.before_eval", "measured as a regime of its own, beside the one without: adapt_steps")
    return int(settings.take("finetune.local_update_steps", 1))
