"""FS-LLM: the YAML files of FederatedScope's branch `llm` (arXiv 2309.00363).

What a file leaves out has that project's own default here, not ours: SGD, lr 0.1, batches of 64, 128 tokens, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from fedloom.client.optimizers import Optimizer
from fedloom.importing.base import Format, Settings, Tree, flatten, is_number, lora_targets
from fedloom.importing.fs_llm_methods import adapt_steps, algorithm, virtual_tokens
from fedloom.server.aggregate import Aggregator
from fedloom.server.optim import ServerOptimizer
from fedloom.types import RecipeError
from fedloom.wire.transforms import Transform

_SECTIONS = {"llm", "data", "model", "train", "trainer", "dataloader", "eval"}

_SOURCES: Mapping[str, Any] = {
    "alpaca": "alpaca",
    "alpaca_cleaned": {"name": "hub", "id": "yahma/alpaca-cleaned"},
    "dolly-15k": "dolly-15k",
    "gsm8k": {"name": "gsm8k", "marker": "The answer is "},
    "rosetta_alpaca": "fed-codealpaca",
    "code_search_net": "code-search-net",
}
"""Their data set -> our source."""

_RULES: Mapping[str, str] = {
    "krum": "krum",
    "multikrum": "multi-krum",
    "median": "median",
    "trimmedmean": "trimmed-mean",
    "bulyan": "bulyan",
    "normbounding": "norm-bound",
}
"""Their robust rule -> our aggregator."""


def read(text: str) -> Mapping[str, Any] | None:
    """Return the settings of an FS-LLM file, or None where the text is something else.

    Raises:
        RecipeError: it is a file of FederatedScope, but not one that fine-tunes a language model.
    """
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    if not isinstance(tree, dict) or "federate" not in tree or not _SECTIONS & tree.keys():
        return None
    flat = flatten({str(key): value for key, value in tree.items()})
    kind, model = str(flat.get("data.type", "")), str(flat.get("model.type", ""))
    if not kind.endswith("@llm") and not model.endswith("_llm"):
        raise RecipeError(
            f"a FederatedScope file, but data.type={kind!r} and model.type={model!r} are no language model's; expected "
            "data.type: NAME@llm and model.type: NAME@huggingface_llm, as on its branch llm"
        )
    return flat


def translate(settings: Settings) -> Tree:
    """Return the recipe of an FS-LLM file; what has no counterpart is remarked on in `settings`."""
    model = _model(settings)
    method = algorithm(settings)
    tree: Tree = {
        "model": model,
        "adapter": _adapter(settings, str(model["name"])),
        "data": _data(settings),
        "trainer": _trainer(settings),
        "algorithm": method,
        "sampler": _sampler(settings),
        "server": _server(settings),
        "transforms": _transforms(settings),
        "rounds": settings.take("federate.total_round_num", 50),
        "checkpoint": _checkpoint(settings),
        **_evaluation(settings),
        "adapt_steps": adapt_steps(settings),
        "seed": settings.take("seed", 0),
    }
    if settings.take("wandb.use", False):
        tree["trackers"] = [{"name": "wandb", "project": settings.take("wandb.name_project") or "fedloom"}]
    _rest(settings)
    return {key: value for key, value in tree.items() if value not in ({}, [], None, 0) or key == "seed"}


def _model(settings: Settings) -> Tree:
    name, _, hub = str(settings.take("model.type", "")).partition("@")
    if hub not in ("huggingface_llm", "modelscope_llm"):
        settings.note("model.type", "expected NAME@huggingface_llm; the name is written as it stands")
    if hub == "modelscope_llm":
        settings.note("model.type", "a name of ModelScope's; check that the hub has the same model by this name")
    if name == "decapoda-research/llama-7b-hf":
        settings.note("model.type", "withdrawn from the hub; huggyllama/llama-7b holds the same weights")
        name = "huggyllama/llama-7b"
    settings.pass_over("train.is_enable_half", "model.dtype=auto: bf16 where the machine has it; the adapter is fp32")
    if settings.take("use_gpu", False):
        settings.pass_over("device", "model.device=auto takes the GPU")
        return {"name": name}
    settings.pass_over("device", "use_gpu is off")
    return {"name": name, "device": "cpu"}


def _adapter(settings: Settings, model: str) -> Tree:
    settings.pass_over("llm.adapter.mv_to_cpu", "only messages leave the device")
    given = settings.take("llm.adapter.args")
    options = dict(given[0]) if isinstance(given, list) and given and isinstance(given[0], dict) else {}
    key = "llm.adapter.args"
    if not settings.take("llm.adapter.use", False):
        return {"name": "full"}
    package = options.pop("adapter_package", "peft")
    if package != "peft":
        settings.drop(key, f"adapters of {package!r} are not here; adapter=lora stands in")
        return {"name": "lora", "targets": "all-linear"}
    kind = str(options.pop("adapter_method", "lora"))
    if kind != "lora":
        return virtual_tokens(settings, kind, options, key) or {"name": "lora"}
    made = {
        "name": "lora",
        "r": options.pop("r", 8),
        "alpha": options.pop("lora_alpha", 8),
        "dropout": options.pop("lora_dropout", 0.0),
        "targets": options.pop("target_modules", None) or lora_targets(settings, model, key),
    }
    if odd := {name: value for name, value in options.items() if name not in {"bias", "task_type", "inference_mode"}}:
        settings.drop(key, f"of these, adapter=lora has no {', '.join(odd)}")
    return made


def _data(settings: Settings) -> Tree:
    kind = str(settings.take("data.type", "")).removesuffix("@llm")
    root, source = settings.take("data.root", "data"), _SOURCES.get(kind, kind)
    if kind not in _SOURCES and kind.endswith((".json", ".jsonl")):
        source = f"{str(root).rstrip('/')}/{kind}"
    elif kind not in _SOURCES:
        settings.drop("data.type", "no source is known for it; data.source=tasks, the built-in suite, stands in")
        source = "tasks"
    settings.pass_over("data.root", "only a file of one's own is looked for there")
    if share := settings.take("data.subsample"):
        if source == "code-search-net":
            source = {"name": source, "share": share}
        elif share != 1:
            settings.drop("data.subsample", "only data.source=code-search-net can be subsampled (`share`)")
    shares = settings.take("data.splits", [0.8, 0.1, 0.1])
    clients = settings.take("federate.client_num", 0)
    made = {
        "source": source,
        "template": "alpaca",
        "partition": _partition(settings, "language" if kind in ("rosetta_alpaca", "code_search_net") else "category"),
        "splits": dict(zip(("train", "validation", "test"), shares, strict=False)),
        "max_tokens": settings.take("llm.tok_len", 128),
        "unseen": settings.take("federate.unseen_clients_rate", 0.0),
    }
    settings.note("llm.tok_len", "longer rows lost their end there; here they are left out and counted")
    if clients:
        return {**made, "clients": clients}
    settings.drop("federate.client_num", "0 means as many as the data have; set data.clients")
    return made


def _partition(settings: Settings, key: str) -> Any:
    kind = settings.take("data.splitter", "iid") or "iid"
    given = settings.take("data.splitter_args") or [{}]
    options = dict(given[0]) if isinstance(given, list) and isinstance(given[0], dict) else {}
    if kind == "meta":
        settings.note("data.splitter", "a client is here tested on the categories that it trains on; there it was not")
        return {"name": "by", "key": key}
    if kind == "lda":
        return {"name": "dirichlet", "alpha": options.get("alpha", 0.5), "key": key}
    if kind != "iid":
        settings.drop("data.splitter", "known: iid, lda, meta; data.partition=iid is written")
    return "iid"


def _sampler(settings: Settings) -> Tree:
    rate, count = settings.take("federate.sample_client_rate", -1), settings.take("federate.sample_client_num", -1)
    if settings.take("federate.sampler", "uniform") != "uniform":
        settings.drop("federate.sampler", "clients are drawn uniformly; see sampler")
    if is_number(rate) and 0 < rate <= 1:
        return {"fraction": rate}
    return {"count": count} if is_number(count) and count > 0 else {}


def _server(settings: Settings) -> Tree:
    made: Tree = {}
    rule = str(settings.take("aggregator.robust_rule", "fedavg")).lower()
    if rule != "fedavg":
        robust = _robust(settings, rule)
        made |= {"aggregator": robust} if robust else {}
    if settings.take("fedopt.use", False):
        made |= _fedopt(settings)
    return made


def _robust(settings: Settings, rule: str) -> Tree | None:
    """Return the aggregator of a robust rule."""
    rules, bad = "aggregator.BFT_args", "aggregator.byzantine_node_num"
    several = settings.take(f"{rules}.krum_agg_num", 1)
    options = {"f": (bad, settings.take(bad, 0))}
    if rule == "krum" and several > 1:
        rule, options["m"] = "multikrum", (f"{rules}.krum_agg_num", several)
    if rule == "trimmedmean":
        ratio = f"{rules}.trimmedmean_excluded_ratio"
        cohort = settings.take("federate.sample_client_num", -1)
        cohort = cohort if is_number(cohort) and cohort > 0 else settings.take("federate.client_num", 0)
        options = {"f": (ratio, int(cohort * settings.take(ratio, 0.1)))}
        settings.pass_over(bad, "the trimmed mean is told how many to cut by trimmedmean_excluded_ratio")
    if rule == "normbounding":
        options = {
            "norm": (f"{rules}.normbounding_norm_bound", settings.take(f"{rules}.normbounding_norm_bound", 10.0))
        }
        settings.pass_over(bad, "clipping does not need the number")
    if rule == "median":
        options = {}
        settings.pass_over(bad, "the median does not need the number")
    return settings.part(Aggregator, _RULES.get(rule, rule), options, "aggregator.robust_rule")


def _fedopt(settings: Settings) -> Tree:
    """Return the server optimiser; torch's own, which there steps along the negative mean change."""
    kind = str(settings.take("fedopt.optimizer.type", "SGD")).lower()
    lr = settings.take("fedopt.optimizer.lr", 0.01)
    momentum = settings.take("fedopt.optimizer.momentum", 0.0)
    first, second = settings.take("fedopt.optimizer.betas", (None, None))
    if kind == "sgd" and not momentum:
        return {"optimizer": "sgd", "lr": lr}
    options = {"momentum": ("fedopt.optimizer.momentum", momentum or None)}
    if kind != "sgd":
        both = "fedopt.optimizer.betas"
        options = {"beta1": (both, first), "beta2": (both, second)}
        options["tau"] = ("fedopt.optimizer.eps", settings.take("fedopt.optimizer.eps"))
    if kind != "sgd":
        settings.note("fedopt.optimizer.type", "torch's own there; here as in the paper, without bias correction")
    name = "fedavgm" if kind == "sgd" else f"fed{kind}"
    found = settings.part(ServerOptimizer, name, options, "fedopt.optimizer.type")
    return {"optimizer": found, "lr": lr} if found else {"lr": lr}


def _transforms(settings: Settings) -> list[Tree]:
    if settings.take("quantization.method", "none") == "none":
        return []
    bits = settings.take("quantization.nbits", 8)
    found = settings.part(Transform, {8: "int8", 16: "fp16"}.get(bits, f"int{bits}"), {}, "quantization.method")
    return [found] if found else []


def _trainer(settings: Settings) -> Tree:
    kind = str(settings.take("train.optimizer.type", "SGD")).lower()
    length = "epochs" if settings.take("train.batch_or_epoch", "batch") == "epoch" else "steps"
    if settings.take("train.batch_or_epoch", "batch") not in ("batch", "epoch"):
        settings.drop("train.batch_or_epoch", "known: batch, epoch; trainer.steps is written")
    betas = settings.take("train.optimizer.betas", (None, None))
    options = {
        "momentum": ("train.optimizer.momentum", settings.take("train.optimizer.momentum")),
        "beta1": ("train.optimizer.betas", betas[0]),
        "beta2": ("train.optimizer.betas", betas[1]),
        "eps": ("train.optimizer.eps", settings.take("train.optimizer.eps")),
        "weight_decay": ("train.optimizer.weight_decay", settings.take("train.optimizer.weight_decay", 0.0)),
    }
    given = {field: option for field, option in options.items() if option[1] is not None}
    if kind == "adam":
        settings.note("train.optimizer.type", "adamw decays weights apart from the gradient; equal at weight_decay 0")
        kind = "adamw"
    clip = settings.take("grad.grad_clip", -1.0)
    return {
        "optimizer": settings.part(Optimizer, kind, given, "train.optimizer.type") or {"name": "sgd"},
        "lr": settings.take("train.optimizer.lr", 0.1),
        length: settings.take("train.local_update_steps", 1),
        "batch": settings.take("dataloader.batch_size", 64),
        "schedule": "constant",
        "clip_norm": clip if is_number(clip) and clip > 0 else None,
    }


def _checkpoint(settings: Settings) -> Tree:
    every = settings.take("federate.save_freq", -1)
    return {"every": every} if is_number(every) and every > 0 else {}


def _evaluation(settings: Settings) -> Tree:
    every, patience = settings.take("eval.freq", 1), settings.take("early_stop.patience", 5)
    settings.pass_over("eval.metrics", "only the loss was measured there")
    settings.pass_over("eval.best_res_update_round_wise_key", "the best round is the one of least validation loss")
    settings.pass_over("eval.count_flops", "operations are always counted")
    settings.pass_over("early_stop.improve_indicator_mode", "an evaluation is held against the best one so far")
    delta = settings.take("early_stop.delta", 0.0)
    made: Tree = {"evaluate": [{"name": "loss", "every": max(0, every)}]}
    if is_number(patience) and patience > 0 and every > 0:
        made["early_stop"] = {"evaluator": "loss", "patience": patience, "delta": delta}
    return made


_MOOT = {
    "federate.share_local_model": "all simulated clients share one resident base",
    "federate.online_aggr": "updates are always folded in one at a time",
    "federate.save_to": "a run writes into its folder: fedloom run ... --out DIR",
    "federate.save_client_model": "personal adapters are kept where a method makes them",
    "federate.make_global_eval": "evaluators always measure the global adapter",
    "llm.retry_on_nan_loss": "an update that is not finite is rejected and recorded",
    "criterion.type": "objective=sft is the cross-entropy of the answers",
    "trainer.type": "objective=sft is what its llmtrainer trains",
    "backend": "it is always torch",
    "verbose": "it is about that project's log",
    "outdir": "a run writes into its folder: fedloom run ... --out DIR",
    "expname": "a run is named by its folder: fedloom run ... --out DIR",
    "expname_tag": "a run is named by its folder: fedloom run ... --out DIR",
    "dataloader.num_workers": "rows are encoded once, and read without workers",
    "dataloader.shuffle": "every client's rows come in a fresh order in every epoch",
}
_SWITCHES = {
    "llm.offsite_tuning": "offsite tuning is not here: the recipe fine-tunes the whole model with its adapter",
    "llm.deepspeed": "nothing is sharded by DeepSpeed; model.quantize=nf4 and trainer.checkpointing save memory",
    "asyn": "rounds are synchronous; sampler.count is the number of clients that a round waits for",
    "nbafl": "its noise also hits the frozen base, and no budget is accounted; see transforms",
    "distribute": "sites are no part of a recipe; it simulates all clients on this machine",
    "fedprox": "no such option here, or not with this federate.method",
    "fedopt": "no such option here, or not with this federate.method",
    "fedswa": "it averages the server's models of several rounds; server.optimizer=fedswa is another method",
    "wandb": "trackers=[wandb] has no such option",
}
_LOST = {
    "federate.use_ss": "secret sharing is not part of a recipe",
    "federate.restore_from": "set init to a PEFT folder; its own checkpoints cannot be read",
    "federate.process_num": "set runtime={name: processes}",
    "federate.client_idx_for_local_train": "set compare=[local] for all clients alone in one run",
    "grad.grad_accum_count": "there it multiplied the local steps; set trainer.steps or trainer.accumulate",
    "train.data_para_dids": "set runtime={name: processes} for several GPUs",
    "train.scheduler.type": "the learning rate follows trainer.schedule over the rounds",
    "eval.split": "validation rows are measured in the course of a run, test rows at its end",
}
_GROUPS = {
    "llm.chat": "belongs to its chat program; see fedloom chat",
    "llm.cache": "models are cached by the hub's own library (HF_HOME)",
    "personalization": "belongs to methods that are not in use",
    "attack": "its attacks are on images; see attacks",
    "hpo": "a recipe is one run",
}


def _rest(settings: Settings) -> None:
    """Say of everything else why it is not in the recipe."""
    if str(settings.take("trainer.type", "llmtrainer")) != "llmtrainer":
        settings.drop("trainer.type", "objective=sft is what its llmtrainer trains; others are not here")
    if settings.take("federate.mode", "standalone") != "standalone":
        settings.drop("federate.mode", "a recipe simulates all clients on this machine")
    for key, why in _MOOT.items():
        if settings.under(key):
            settings.pass_over(key, why)
    for key, why in _LOST.items():
        if not settings.under(key):
            continue
        off = _off(settings.take(key))
        (settings.pass_over if off else settings.drop)(key, "it is off" if off else why)
    for section, why in _SWITCHES.items():
        if settings.under(section):
            settings.switch(section, why)
    for section, why in _GROUPS.items():
        for key in settings.under(section):
            (settings.pass_over if section.startswith("llm.") else settings.drop)(key, why)


def _off(value: Any) -> bool:
    """Return whether a value is how that project says "not at all" (one process or one step included)."""
    return value is not True and value in (False, "", 0, 1, -1, None, [])


FS_LLM = Format("FS-LLM", "a YAML mapping with `federate` and others of its sections (llm, data, ...)", read, translate)
