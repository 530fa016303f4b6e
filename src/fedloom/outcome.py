"""What a run leaves behind: its books, its samples, its adapters and its summary."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from fedloom import allocator, baselog, factors
from fedloom.checkpoint import MemoryStore
from fedloom.client.identity import stamp
from fedloom.cost import METRICS
from fedloom.evaluate.base import Sample
from fedloom.evaluate.stats import worst_share
from fedloom.factors import Scale
from fedloom.tracking import RoundReport, keep_lines
from fedloom.types import Merge, RecipeError, ServerState, Tensors
from fedloom.wire.codec import write_atomic

if TYPE_CHECKING:
    from fedloom.assets import Assets
    from fedloom.recipe import Recipe
    from fedloom.world import World

LIBRARIES = ("fedloom", "torch", "transformers", "peft", "datasets", "safetensors")


@dataclass(slots=True)
class Totals:
    """The books of one regime, saved with every checkpoint.

    Attributes:
        beside: `<phase>_flops` and `<phase>_seconds` of what clients did beside training, see `cost`.
        peak_rss_bytes, peak_device_bytes: largest memory of the main process, earlier parts of a resumed run included.
        peak_of_process: these may be from before the regime, as they could not be begun anew with it.
        best: the judging evaluator's best value so far, turned so that higher is better; best_round: its round.
        stale: evaluations since then.
        finished: clients have done what they do after the last round.
        results: regime -> evaluator -> metric -> value, on test data.
        not_run: regime -> evaluator -> why it could not measure all that was asked for, on test data.
        evaluation: evaluator -> all that these depend on beside the adapters.
    """

    participations: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    tokens: int = 0
    examples: int = 0
    rejected: int = 0
    fit_seconds: float = 0.0
    round_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    setup_seconds: float = 0.0
    wall_seconds: float = 0.0
    flops: float = 0.0
    beside: dict[str, float] = field(default_factory=dict)
    evaluate_flops: float = 0.0
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0
    peak_of_process: bool = False
    energy_joules: float | None = None
    loss_first: float = math.nan
    loss_last: float = math.nan
    best: float = -math.inf
    best_round: int = 0
    stale: int = 0
    finished: bool = False
    adapter_sha256: str = ""
    results: dict[str, dict[str, Mapping[str, float]]] = field(default_factory=dict)
    not_run: dict[str, dict[str, str]] = field(default_factory=dict)
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, report: RoundReport) -> None:
        """Book one round."""
        self.participations += len(report.clients) - len(report.rejected)
        self.spend(report)
        self.loss_first = report.loss if report.round == 1 else self.loss_first
        self.loss_last = report.loss

    def spend(self, report: RoundReport) -> None:
        """Book what a round cost, or what clients did after the last one."""
        self.rejected += len(report.rejected)
        self.bytes_down += report.bytes_down
        self.bytes_up += report.bytes_up
        self.tokens += report.tokens
        self.examples += report.examples
        self.fit_seconds += report.fit_seconds
        self.round_seconds += report.seconds
        self.flops += report.flops
        self._add(report.beside)

    def enrol(self, metrics: Mapping[str, float]) -> None:
        """Book what it cost that clients told the server something before round 0: see `Engine.admit`."""
        beside = dict(metrics)
        self.bytes_up += int(beside.pop("bytes_up", 0))
        self.flops += beside.pop("flops", 0.0)
        self.fit_seconds += beside.pop("fit_seconds", 0.0)
        self._add(beside)

    def _add(self, beside: Mapping[str, float]) -> None:
        self.beside = {name: self.beside.get(name, 0.0) + beside.get(name, 0.0) for name in {**self.beside, **beside}}

    def look(self, fresh: bool) -> None:
        """Note how much memory was used.

        Args:
            fresh: the peaks that the system tells began with the regime.
        """
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss())
        if torch.cuda.is_initialized():
            self.peak_device_bytes = max(self.peak_device_bytes, torch.cuda.max_memory_allocated())
        self.peak_of_process |= not fresh

    def dump(self) -> dict[str, Any]:
        """Return the books as JSON values."""
        return asdict(self)

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> Totals:
        """Return the books of `dump`."""
        return cls(**values)


def of_round(report: RoundReport) -> dict[str, float]:
    """Return the metrics of a round over all its clients."""
    losses = np.array([m["loss"] for client, m in report.clients.items() if client not in report.rejected])
    return {
        "train_loss": report.loss,
        "train_loss_worst": float(losses.max()),
        "train_loss_worst10": worst_share(losses, higher_is_better=False),
        "train_loss_variance": float(losses.var()),
        "tokens": report.tokens,
        "examples": report.examples,
        "bytes_down": report.bytes_down,
        "bytes_up": report.bytes_up,
        "seconds": report.seconds,
        "fit_seconds": report.fit_seconds,
        "tokens_per_second": report.tokens / report.fit_seconds if report.fit_seconds else 0.0,
        "clients": len(report.clients),
        "flops": report.flops,
        **report.beside,
        **({} if report.aggregation_error is None else {"aggregation_error": report.aggregation_error}),
    }


def write_samples(
    folder: Path, evaluator: str, regime: str, round_: int, samples: Sequence[tuple[str | None, Sample]]
) -> None:
    """Write one regime's samples to `samples/<evaluator>.jsonl`, in place of those it had there."""
    if not samples:
        return
    path = folder / "samples" / f"{evaluator}.jsonl"
    path.parent.mkdir(exist_ok=True)
    keep_lines(path, lambda line: line["regime"] != regime)
    with path.open("a", encoding="utf-8") as file:
        for client, one in samples:
            line = {
                "regime": regime,
                "round": round_,
                "client": client,
                "id": one.id,
                "prompt_sha256": hashlib.sha256(one.prompt.encode()).hexdigest(),
                "prompt": one.prompt,
                "output": one.output,
                "extracted": one.extracted,
                "reference": one.reference,
                "score": one.score,
                "stratum": one.stratum,
                **({"verdict": one.verdict} if one.verdict else {}),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def export(
    folder: Path, recipe: Recipe, assets: Assets, memories: MemoryStore, clients: Sequence[str], state: ServerState
) -> str:
    """Write the adapters as PEFT folders and return their hash.

    `adapter/` is the global adapter; `adapters/<client>/<slot>/` are personal ones. Where the method changed the base,
    the adapter holds that too, at the summed rank; once the change is dense, `merged/` is written instead: the whole
    model with everything added. So it is, for personal ones in their own folders, where all weights were trained. The
    hash is the SHA-256 of the global adapter's tensors file, or of all personal ones in client order, or of the merged
    weights.
    """
    base = assets.loaded.base
    digest = hashlib.sha256()
    for old in ("adapter", "adapters", "merged"):
        shutil.rmtree(folder / old, ignore_errors=True)
    slots = recipe.algorithm.export(state)
    if baselog.is_dense(state.base):
        return _write_merged(folder / "merged", assets, state, next(iter(slots.values())))
    if state.base:
        slots = {slot: summed(state.base, params, recipe.adapter.scale) for slot, params in slots.items()}
    shared = folder / ("merged" if assets.attached.whole else "adapter")
    places: list[tuple[Path, Any]] = [(shared, p) for p in slots.values()]
    if recipe.algorithm.personal:
        for client in clients:
            slots = recipe.algorithm.export(state, memories.load(client))
            places += [(folder / "adapters" / client / slot, params) for slot, params in slots.items()]
    for place, params in places:
        if assets.attached.whole:
            digest.update(_write_merged(place, assets, state, params).encode())
            continue
        assets.attached.save(place, params, base.name)
        stamp(place, base)
        for path in sorted(place.rglob("*.safetensors")):  # several where a router weighs them
            digest.update(path.read_bytes())
    return digest.hexdigest()


def summed(log: Sequence[Merge], params: Tensors, scale: Scale) -> Tensors:
    """Return one adapter for the untouched base that holds a low-rank base log and an adapter on top."""
    return factors.unpaired(baselog.with_adapter(log, factors.pairs(params, scale)), scale)


def _write_merged(folder: Path, assets: Assets, state: ServerState, params: Tensors) -> str:
    """Write the model with every change of the base and the adapter in its weights; return the hash of the weights."""
    assets.attached.rebase(state.base)
    model = assets.loaded.model
    plain = type(model)(model.config).to(model.dtype)
    plain.load_state_dict(assets.attached.merged(model, params))
    plain.save_pretrained(folder)
    assets.loaded.tokenizer.save_pretrained(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def summarize(world: World, state: ServerState, others: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of summary.json.

    Args:
        world: the finished regime.  state: its final state.
        others: regime -> summary of the compared regimes.
    """
    totals = world.totals
    metrics: dict[str, Mapping[str, Mapping[str, float]]] = {**totals.results}
    not_run = {**totals.not_run}
    for name, summary in others.items():
        metrics[name] = summary["metrics"][name]
        not_run[name] = summary["not_run"].get(name, {})
    return {
        "rounds": state.round,
        "clients": len(world.clients),
        "participations": totals.participations,
        "rejected": totals.rejected,
        "train_loss_first": _finite(totals.loss_first),
        "train_loss_last": _finite(totals.loss_last),
        "metrics": finite(metrics),
        "not_run": {regime: why for regime, why in not_run.items() if why},
        "evaluation": totals.evaluation,
        "best_round": totals.best_round or None,
        "bytes_down": totals.bytes_down,
        "bytes_up": totals.bytes_up,
        "trained_tokens": totals.tokens,
        "tokens_per_second": totals.tokens / totals.fit_seconds if totals.fit_seconds else 0.0,
        "samples": totals.examples,
        "wall_seconds": totals.wall_seconds,
        "setup_seconds": totals.setup_seconds,
        "round_seconds": totals.round_seconds,
        "fit_seconds": totals.fit_seconds,
        "evaluate_seconds": totals.evaluate_seconds,
        "flops": totals.flops,
        **{name: totals.beside.get(name, 0.0) for name in METRICS[2:]},
        "evaluate_flops": totals.evaluate_flops,
        "energy_joules": totals.energy_joules,
        "peak_rss_bytes": totals.peak_rss_bytes,
        "peak_device_bytes": totals.peak_device_bytes,
        "peak_of": "process" if totals.peak_of_process else "regime",
        "trainable_parameters": world.parameters(),
        "base_parameters": world.assets.loaded.parameters,
        "source": world.assets.federation.source,
        "rows_left_out": asdict(world.assets.federation.left),
        "adapter_sha256": totals.adapter_sha256,
        "machine": machine(str(world.assets.loaded.model.device)),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the content of a run folder's summary.json; see `read_object`."""
    return read_object(folder / "summary.json")


def read_object(path: Path) -> dict[str, Any]:
    """Return the content of one of a run folder's JSON files; {} where there is none yet.

    Raises:
        RecipeError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path} is damaged ({error}); remove it and go on with --resume, or run again") from error
    if not isinstance(found, dict):
        raise RecipeError(f"{path} is damaged (no object); remove it and go on with --resume, or run again")
    return found


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json at once or not at all."""
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False).encode())


def machine(device: str) -> dict[str, Any]:
    """Return what the figures of time and memory were measured on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else []
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": names[0] if names else platform.processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
    }


def peak_rss() -> int:
    """Return the largest resident memory of this process since `reset_peaks`, else since it began, in bytes."""
    status = Path("/proc/self/status")  # Linux lets ru_maxrss begin at the size of the program that started this one
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def finite(
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return regime -> evaluator -> metrics as JSON values: it has no NaN, so a metric that does not exist is null."""
    return {r: {e: {k: _finite(v) for k, v in m.items()} for e, m in found.items()} for r, found in metrics.items()}


def reset_peaks() -> bool:
    """Let the peaks of this process's memory begin anew at what it holds now; return whether the system lets them.

    Memory that was freed goes back to the system first, so that what earlier work left in the allocator is not in them.
    """
    allocator.release()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # another system than Linux, or one that forbids it
        return False
    return True


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
