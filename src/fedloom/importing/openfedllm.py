"""OpenFedLLM: the flags of its main_sft.py and main_dpo.py (arXiv 2402.06954), alone or in a shell script."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from fedloom.algorithms import Algorithm
from fedloom.client.objectives import Objective
from fedloom.importing.base import Format, Settings, Tree, is_number, lora_targets
from fedloom.server.optim import ServerOptimizer
from fedloom.types import RecipeError

_MARKS = ("fed_alg", "num_clients", "num_rounds", "model_name_or_path")
_ADAPTIVE = ("fedadagrad", "fedyogi", "fedadam")

_SOURCES: Mapping[str, Any] = {
    "gsm8k": "gsm8k",
    "tatsu-lab/alpaca": "alpaca",
    "TIGER-Lab/MathInstruct": {"name": "hub", "id": "TIGER-Lab/MathInstruct"},
    "lighteval/MATH": {
        "name": "hub",
        "id": "lighteval/MATH",
        "subset": "all",
        "keys": {"prompt": "problem", "completion": "solution"},
    },
    "medalpaca/medical_meadow_medical_flashcards": {
        "name": "hub",
        "id": "medalpaca/medical_meadow_medical_flashcards",
        "keys": {"prompt": "input", "completion": "output"},
    },
}
"""Their data set -> our source, where the columns are not those of a form that is recognised."""


def read(text: str) -> Mapping[str, Any] | None:
    """Return the flags of one call, or None where the text is something else.

    Raises:
        RecipeError: the script has several calls, or cannot be read.
    """
    if not re.search(r"--(fed_alg|model_name_or_path)\b", text):
        return None
    try:
        words = [shlex.split(line, comments=True) for line in re.sub(r"\\[ \t]*(\n|$)", " ", text).splitlines()]
    except ValueError as error:
        raise RecipeError(f"flags of OpenFedLLM, but a quotation mark has no partner ({error})") from error
    variables: dict[str, str] = {}
    calls: list[dict[str, Any]] = []
    for line in words:
        for word in line:
            if found := re.fullmatch(r"(?:export )?(\w+)=(.*)", word):
                variables[found[1]] = _expand(found[2], variables)
        flags = _flags([_expand(word, variables) for word in line])
        if flags.keys() & set(_MARKS):
            calls.append(flags | ({"main_dpo.py": True} if any("main_dpo" in word for word in line) else {}))
    if len(calls) > 1:
        raise RecipeError(f"the script starts {len(calls)} runs; import one of them at a time")
    return calls[0] if calls else None


def _expand(word: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda found: variables.get(found[1], found[0]), word)


def _flags(words: list[str]) -> dict[str, Any]:
    """Return flag -> value; a flag that no value follows is True."""
    flags: dict[str, Any] = {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            follows = i + 1 < len(words) and not words[i + 1].startswith("--")
            flags[name] = _value(value) if equals else _value(words[i + 1]) if follows else True
    return flags


def _value(text: str) -> Any:
    if re.fullmatch(r"-?\d+(\.\d*)?[eE]-?\d+", text):
        return float(text)  # YAML wants a point in 5e-5
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, int | float | bool) else text


def translate(settings: Settings) -> Tree:
    """Return the recipe of a call; what has no counterpart is remarked on in `settings`."""
    model = str(settings.take("model_name_or_path", "meta-llama/Llama-2-7b-hf"))
    how, server = _method(settings)
    tree: Tree = {
        "model": {"name": model, **_quantize(settings)},
        "adapter": _adapter(settings, model),
        "objective": _objective(settings),
        "data": _data(settings),
        "trainer": _trainer(settings),
        "algorithm": how,
        "sampler": {"count": settings.take("sample_clients", 2)},
        "server": server,
        "checkpoint": {"every": settings.take("save_model_freq", settings.take("checkpoint_step", 50))},
        "evaluate": [],
        "trackers": ["wandb"] if settings.take("log_with", "none") == "wandb" else [],
        "rounds": settings.take("num_rounds", 500),
        "seed": settings.take("seed", 2023),
    }
    settings.take("checkpoint_step")
    _rest(settings)
    return {key: value for key, value in tree.items() if key == "evaluate" or value not in ({}, [], None)}


def _quantize(settings: Settings) -> Tree:
    remote = {"trust_remote_code": True} if settings.take("trust_remote_code", False) else {}
    eight, four = settings.take("load_in_8bit", False), settings.take("load_in_4bit", False)
    if four:
        settings.note("load_in_4bit", "bitsandbytes' fp4 there; nf4 with double quantisation here")
    return {**({"quantize": "int8"} if eight else {"quantize": "nf4"} if four else {}), **remote}


def _adapter(settings: Settings, model: str) -> Tree:
    if not settings.take("use_peft", False):
        settings.drop("use_peft", "all weights were trained; here LoRA is")
        settings.note("model_name_or_path", "without --use_peft all weights were trained; here LoRA is")
    return {
        "name": "lora",
        "r": settings.take("peft_lora_r", 8),
        "alpha": settings.take("peft_lora_alpha", 16),
        "dropout": 0.05,
        "targets": lora_targets(settings, model, "model_name_or_path"),
    }


def _objective(settings: Settings) -> Tree | None:
    beta = settings.take("dpo_beta", 0.1)
    if not settings.take("main_dpo.py", False):
        settings.pass_over("dpo_beta", "belongs to main_dpo.py")
        return None
    return settings.part(Objective, "dpo", {"beta": ("dpo_beta", beta)}, "main_dpo.py")


def _data(settings: Settings) -> Tree:
    name = str(settings.take("dataset_name", "lucasmccabe-lmi/CodeAlpaca-20k"))
    source = _SOURCES.get(name, {"name": "hub", "id": name})
    settings.drop("local_data_dir", "set data.source to the file")
    sample = settings.take("dataset_sample", 20000)
    if isinstance(source, dict) and "id" in source and sample:
        source = {**source, "split": f"train[:{sample}]"}
        settings.note("dataset_sample", "the first rows are taken here, there a random sample of seed 2023")
    elif sample:
        settings.drop("dataset_sample", f"data.source={source} is always read as a whole")
    if settings.take("split_strategy", "iid") != "iid":
        settings.drop("split_strategy", "its program knows iid alone, which is written; see data.partition")
    kind = str(settings.take("template", "alpaca"))
    if kind != "alpaca":
        settings.drop("template", "data.template=chat, which is written, uses the tokenizer's own")
    settings.note("seq_length", "longer rows lost their end there; here they are left out and counted")
    return {
        "source": source,
        "template": "alpaca" if kind == "alpaca" else "chat",
        "clients": settings.take("num_clients", 2),
        "partition": "iid",
        "splits": {"train": 1.0, "validation": 0.0, "test": 0.0},
        "max_tokens": settings.take("seq_length", 512),
    }


def _trainer(settings: Settings) -> Tree:
    lr = settings.take("learning_rate", 2e-5)
    steps, epochs = settings.take("max_steps", 10), settings.take("num_train_epochs", 3)
    counted = is_number(steps) and steps > 0
    if counted:
        settings.pass_over("num_train_epochs", "max_steps is set, which goes before")
    return {
        "optimizer": "adamw",
        "lr": lr,
        **({"steps": steps} if counted else {"epochs": epochs}),
        "batch": settings.take("batch_size", 16),
        "accumulate": settings.take("gradient_accumulation_steps", 1),
        "schedule": {"name": "cosine", "floor": round(min(1.0, 1e-6 / lr), 9) if is_number(lr) and lr > 0 else 0.0},
        "clip_norm": 1.0,
        "checkpointing": bool(settings.take("gradient_checkpointing", True)),
    }


def _method(settings: Settings) -> tuple[Tree, Tree]:
    """Return the algorithm and the server section."""
    name = str(settings.take("fed_alg", "fedavg")).lower()
    mu, tau, eta = settings.take("prox_mu", 0.01), settings.take("fedopt_tau", 1e-3), settings.take("fedopt_eta", 1e-3)
    first, second = settings.take("fedopt_beta1", 0.9), settings.take("fedopt_beta2", 0.99)
    _unused(settings, name)
    plain: Tree = {"name": "fedavg", "weighting": "examples"}
    if re.fullmatch(r"local\d*", name):
        settings.note("fed_alg", "there one client alone was trained; here every client is, each alone")
        return {"name": "local"}, {}
    if name == "fedavgm":
        # it keeps a moving average of the changes, not the heavy ball of the paper
        found = settings.part(ServerOptimizer, "fedavgm-ema", {"momentum": ("fedopt_beta1", first)}, "fed_alg")
        return plain, {"optimizer": found} if found else {}
    if name in _ADAPTIVE:
        options = {"beta1": ("fedopt_beta1", first), "beta2": ("fedopt_beta2", second), "tau": ("fedopt_tau", tau)}
        if name == "fedadagrad":
            options.pop("beta2")
            settings.pass_over("fedopt_beta2", "fedadagrad has no beta2")
        settings.note("fed_alg", "its second moment is that of the momentum; here, as in the paper, of the change")
        found = settings.part(ServerOptimizer, name, options, "fed_alg")
        return plain, {"optimizer": found, "lr": eta} if found else {}
    options = {"mu": ("prox_mu", mu)} if name == "fedprox" else {}
    how = settings.part(Algorithm, name, options, "fed_alg")
    if name == "scaffold" and how:
        # its trainer corrects the weights after each step of AdamW
        settings.note("fed_alg", "algorithm.variant=post_step_adamw, since the local optimiser is AdamW")
        return {**how, "variant": "post_step_adamw"}, {}
    return ({**how, "weighting": "examples"} if how and name == "fedprox" else how or plain), {}


def _unused(settings: Settings, name: str) -> None:
    uses = {"prox_mu": ("fedprox",), "fedopt_tau": _ADAPTIVE, "fedopt_eta": _ADAPTIVE, "fedopt_beta2": _ADAPTIVE}
    for key, users in {**uses, "fedopt_beta1": (*_ADAPTIVE, "fedavgm")}.items():
        if name not in users:
            settings.pass_over(key, f"fed_alg={name} does not use it")


def _rest(settings: Settings) -> None:
    for key in ("use_auth_token", "token"):
        settings.drop(key, "set HF_TOKEN in the environment")
    for key in ("push_to_hub", "hub_model_id"):
        settings.drop(key, "afterwards: fedloom export RUN --to hub --repo USER/NAME")
    for key in ("output_dir", "logging_steps", "save_steps", "save_total_limit"):
        settings.pass_over(key, "a run writes into its folder: fedloom run ... --out DIR")


OPENFEDLLM = Format(
    "OpenFedLLM",
    "flags such as --fed_alg or --model_name_or_path, in a line or a shell script",
    read,
    translate,
)
