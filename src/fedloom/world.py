"""World: everything that a run needs, built once from its recipe, and what happens between rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fedloom import seeds, tensors
from fedloom.algorithms.base import Server
from fedloom.assets import Assets, adapter_dtype
from fedloom.attacks import Attack
from fedloom.checkpoint import FINISHED, Checkpoints, MemoryStore
from fedloom.client.identity import check_base, stamp
from fedloom.client.trainer import Bench, Rows
from fedloom.data.encode import Encoded
from fedloom.data.poisoned import extended
from fedloom.data.rows import Row
from fedloom.data.splits import ClientData
from fedloom.data.texts import TextDesk
from fedloom.energy import Meter
from fedloom.evaluate import Evaluator
from fedloom.evaluate.base import Evaluation
from fedloom.evaluate.view import ADAPTED, RegimeView, interval, spread
from fedloom.outcome import Totals, export, of_round, write_samples
from fedloom.recipe import Recipe
from fedloom.runtime.engine import NOBODY, Engine, Stage
from fedloom.tracking import Evaluated, MetricsFile, Phase, RoundReport, Sink, Step, Warned
from fedloom.types import RecipeError, ServerState, Split


def set_stage(recipe: Recipe, assets: Assets, memories: MemoryStore, sink: Sink) -> tuple[Stage, list[str]]:
    """Return what the rounds of one regime need, and who may be sampled, in client order.

    Args:
        recipe: settled.  memories: of the regime.  sink: is told of every optimiser step.

    Raises:
        DataError, RecipeError: the algorithm, an attack or the aggregator does not go with the clients that there are.
    """
    split, algorithm = assets.federation, recipe.algorithm
    unseen = set(split.unseen)
    seen = {name: data for name, data in split.clients.items() if name not in unseen}
    population = dict(algorithm.population(seen, _join))
    clients = list(population)
    where = f"data.partition={recipe.data.partition.part_name}: clients that train: {len(clients)}"
    problems = [f"{where}: {problem}" for problem in algorithm.check_clients(len(clients))]
    cohort = recipe.sampler.cohort(0, clients, recipe.seed)
    problems += recipe.server.aggregator.conflicts(len(cohort))
    if problems:
        raise RecipeError("; ".join(problems))
    attacks = tuple(attack.on(clients, recipe.seed) for attack in recipe.attacks)
    encoded, added, population = _poisoned(recipe, assets, attacks, population)
    bench = Bench(
        assets.loaded.model,
        assets.attached,
        recipe.objective,
        recipe.trainer,
        recipe.seed,
        recipe.rounds,
        recipe.runtime.reference,
        lambda client, tokens, loss: sink.on(Step(client, tokens, loss)),
    )
    stage = Stage(
        algorithm,
        _server(recipe, assets, clients),
        recipe.transforms,
        bench,
        TextDesk([*split.rows, *added] if added else split.rows, recipe.data, assets.loaded.tokenizer),
        encoded,
        {**split.clients, **population},
        split.public,
        assets.initial,
        attacks,
        memories,
        recipe.rounds,
        sink,
    )
    return stage, clients


def _server(recipe: Recipe, assets: Assets, clients: Sequence[str]) -> Server:
    dtype, part = adapter_dtype(assets.loaded), recipe.server
    # every participant draws an adapter of a round alike; the newest one is kept, as a cohort asks for it in turn
    draw = lru_cache(1)(lambda round_: assets.attached.init(recipe.seed, dtype, round_))
    return Server(
        tuple(clients),
        part.aggregator,
        part.optimizer,
        part.lr,
        draw,
        lambda round_, purpose: seeds.generator(recipe.seed, round_, None, purpose),
        recipe.adapter.lora_ranks(assets.attached, list(assets.federation.clients)),
    )


def _poisoned(
    recipe: Recipe, assets: Assets, attacks: Iterable[Attack], population: dict[str, ClientData]
) -> tuple[Encoded, list[Row], dict[str, ClientData]]:
    """Return the examples, the added rows, and who trains on what, with the attackers' rows as their attacks want them.

    What everybody else has, and the attackers' validation and test rows, stay as they are.
    """
    split, rows = assets.federation, dict[str, list[Row]]()
    for i, attack in enumerate(attacks):
        for client in attack.clients if attack.poisons else ():
            own = rows.get(client) or [split.rows[k] for k in population[client].train]
            rows[client] = attack.poison(own, seeds.generator(recipe.seed, None, client, f"poison:{i}"))
    if not rows:
        return split.encoded, [], population
    encoded, added, where = extended(split.encoded, rows, recipe.data, assets.loaded.tokenizer)
    return (
        encoded,
        added,
        {**population, **{client: replace(population[client], train=new) for client, new in where.items()}},
    )


class World:
    """One regime of one run: its folder, engine, evaluators and books.

    Attributes:
        clients: who may be sampled, in client order.  totals: the books, part of every checkpoint.
    """

    def __init__(self, recipe: Recipe, folder: Path, assets: Assets, sink: Sink) -> None:
        self.recipe, self.folder, self.assets, self.sink = recipe, folder, assets, sink
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.memories = MemoryStore(folder / "memories")
        self.checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoint.keep)
        self.totals = Totals(setup_seconds=assets.seconds, wall_seconds=assets.seconds)
        stage, self.clients = set_stage(recipe, assets, self.memories, sink)
        self.engine = Engine(stage)
        self.crew = recipe.runtime.crew(self.engine, recipe)
        self._clock, self._meter = time.perf_counter(), Meter()
        self._changed: set[str] = set()
        self._whole = True

    def start(self, base: Mapping[str, Mapping[str, float]] | None = None) -> ServerState:
        """Return the state before round 0, saved as checkpoint 0, after the untouched base has been measured.

        Args:
            base: what another regime of the run already measured on the base.
        """
        self.metrics.path.unlink(missing_ok=True)
        stamp(self.folder, self.assets.loaded.base)
        state = self.recipe.algorithm.init(self.assets.initial)
        self.totals.results["base"] = self.measure(state, "base") if base is None else dict(base)
        state, told = self.engine.admit(state, self.clients)
        for client, metrics in told.items():
            self.metrics.add(0, client, metrics)
        self.totals.enrol(told.get(None, {}))
        self._save(state)
        return state

    def resume(self) -> ServerState | None:
        """Return the state of the last checkpoint, with the books and files as they were then; None: there is none."""
        last = self.checkpoints.find("latest")
        if last is None:
            return None
        state, record = self.checkpoints.load(last)
        if record["split"] != self.assets.federation.split_hash:
            raise RecipeError(
                f"{self.folder}: the rows or their split are not those of the run (hash {record['split'][:12]} then, "
                f"{self.assets.federation.split_hash[:12]} now); put the same data in place, or start a new run"
            )
        if note := check_base(self.folder, self.assets.loaded.base):
            self.sink.on(Warned(note))
        self.totals = Totals.load(record["totals"])
        self.totals.setup_seconds += self.assets.seconds
        self.totals.wall_seconds += self.assets.seconds
        # what clients did after the last round counts only where it still is the last
        self.totals.finished &= last >= self.recipe.rounds or self.stopped(state)
        self.memories.restore(last + FINISHED if self.totals.finished else last)
        self.metrics.restore(last, self.totals.finished)
        if self.totals.best_round == last:  # a kill may have come between the checkpoint and its mark
            self.checkpoints.mark_best(last)
        return state

    def after(self, state: ServerState, report: RoundReport) -> None:
        """Book a finished round; evaluate and save where due. Cannot touch the state."""
        self._whole = False
        self.totals.add(report)
        self._changed.update(self.memories.commit(state.round))
        for client, metrics in report.clients.items():
            self.metrics.add(state.round, client, {**metrics, "rejected": float(client in report.rejected)})
        self.metrics.add(state.round, None, of_round(report))
        self.sink.on(report)
        if report.rejected:
            self.sink.on(Warned(f"round {state.round}: rejected, not finite: {', '.join(report.rejected)}"))
        due = [one for one in self.recipe.evaluate if one.every and state.round % one.every == 0]
        improved = False
        for evaluator in due:
            evaluation = self._evaluate(state, evaluator, self.recipe.algorithm.regime, "validation")
            improved |= self._judge(state, evaluator, evaluation)
        if improved or state.round % self.recipe.checkpoint.every == 0 or state.round == self.recipe.rounds:
            self._save(state)
        if improved:
            self.checkpoints.mark_best(state.round)
        self._whole = True

    def stopped(self, state: ServerState) -> bool:
        """Return whether early stop has run out of patience."""
        return self.recipe.early_stop is not None and self.totals.stale >= self.recipe.early_stop.patience

    def rescue(self, state: ServerState) -> None:
        """Save the state of the last finished round if that was not done, since the run is about to end early.

        A round that was interrupted while it was booked is not: the run then goes on from the checkpoint before it.
        """
        if self._whole and self.checkpoints.find("latest") != state.round:
            self._save(state)

    def finish_clients(self, state: ServerState) -> None:
        """Let every client work on by itself after the last round, if the algorithm wants that and it is not done."""
        if not self.recipe.algorithm.finishes or self.totals.finished:
            return
        self.rescue(state)
        self.sink.on(Phase(f"after the last round: {len(self.clients)} clients"))
        report = self.engine.finish(self.crew, state, self.clients)
        self.sink.on(Phase(""))
        if report.rejected:
            self.sink.on(Warned(f"after the last round: not kept, not finite: {', '.join(report.rejected)}"))
        self.memories.commit(state.round + FINISHED)
        self.totals.spend(report)
        self.totals.finished = True
        for client, metrics in report.clients.items():
            self.metrics.add(state.round, client, {f"finish/{name}": value for name, value in metrics.items()})
        self._tick()
        self.metrics.flush()
        self.checkpoints.amend(state.round, self._record())

    def finish(self, state: ServerState) -> None:
        """Write the adapters, then measure the result on test data."""
        self.rescue(state)
        self.totals.adapter_sha256 = export(self.folder, self.recipe, self.assets, self.memories, self.clients, state)
        regime = self.recipe.algorithm.regime
        self.totals.results[regime] = self.measure(state, regime)
        for name in self.beside(regime):
            self.totals.results[name] = self.measure(state, name)
        self.metrics.flush()
        self._tick()

    def beside(self, regime: str) -> list[str]:
        """Return the regimes that are measured on the same state: unseen clients, and some steps of adaptation."""
        found = ["unseen"] if self.assets.federation.unseen else []
        return found + [f"{name}{ADAPTED}" for name in (regime, *found) if self.recipe.adapt_steps]

    def measure(self, state: ServerState, regime: str) -> dict[str, Mapping[str, float]]:
        """Return evaluator -> metrics of one regime on test data, and book which evaluators could not be run."""
        evaluators = [one for one in self.recipe.evaluate if not regime.startswith("unseen") or one.own_rows]
        found = {one.part_name: self._evaluate(state, one, regime, "test") for one in evaluators}
        self.totals.not_run[regime] = {name: one.not_run for name, one in found.items() if one.not_run}
        return {name: one.metrics for name, one in found.items() if one.metrics}

    def _evaluate(self, state: ServerState, evaluator: Evaluator, regime: str, split: Split) -> Evaluation:
        """Run one evaluator, log its metrics with their spread over clients, and keep its samples at the end."""
        began, name = time.perf_counter(), evaluator.part_name
        self.sink.on(Phase(f"evaluating {regime}: {name}"))
        view = RegimeView(self.engine, self.assets.federation, self.recipe, state, regime, split)
        found = evaluator.evaluate(view)
        found = replace(found, metrics={**found.metrics, **spread(evaluator, found.clients)})
        if found.invalid:
            self.sink.on(Warned(f"{regime}: {name}: {found.invalid} clients have a loss that is not finite"))
        for note in (*found.notes, *([f"not run: {found.not_run}"] if found.not_run else [])):
            self.sink.on(Warned(f"{regime}: {name}: {note}"))
        ends = interval(evaluator, found) if split == "validation" else {}  # test data have their samples
        for client, metrics in ((None, {**found.metrics, **ends}), *found.clients.items()):
            named = {f"{split}/{regime}/{name}/{key}": value for key, value in metrics.items()}
            self.metrics.add(state.round, client, named)
        if split == "test":
            write_samples(self.folder, name, regime, state.round, found.samples)
            knobs = {key: value for key, value in evaluator.dump().items() if key != "every"}
            self.totals.evaluation[name] = {**knobs, **view.settings(), **found.settings}
        self.sink.on(Phase(""))
        if found.metrics:
            self.sink.on(Evaluated(regime, state.round, name, found.metrics, split == "test"))
        self.totals.evaluate_seconds += time.perf_counter() - began
        # between rounds nobody but the evaluator has asked for anything
        self.totals.evaluate_flops += sum(sum(one.flops.values()) for one in self.engine.hands.all_taken().values())
        return found

    def _judge(self, state: ServerState, evaluator: Evaluator, found: Evaluation) -> bool:
        """Return whether the judging evaluator found the best state so far; a value that is not finite never is."""
        stop = self.recipe.early_stop
        if evaluator != self.recipe.judge() or evaluator.primary not in found.metrics:
            return False  # what could not be run says nothing about the state
        value = found.metrics[evaluator.primary]
        value = value if evaluator.higher_is_better else -value
        better = math.isfinite(value) and not found.invalid and value > self.totals.best + (stop.delta if stop else 0.0)
        if better:
            self.totals.best, self.totals.best_round, self.totals.stale = value, state.round, 0
        else:
            self.totals.stale += 1
        return better

    def _save(self, state: ServerState) -> None:
        self._tick()
        self.metrics.flush()
        self.checkpoints.save(state, self._record())
        self.memories.prune(self.checkpoints.rounds(), self._changed)
        self._changed.clear()

    def _record(self) -> dict[str, Any]:
        return {"split": self.assets.federation.split_hash, "totals": self.totals.dump()}

    def _tick(self) -> None:
        now = time.perf_counter()
        self.totals.wall_seconds += now - self._clock
        self._clock = now
        self.totals.look(self.assets.fresh)
        if (joules := self._meter.joules()) is not None:
            self.totals.energy_joules = (self.totals.energy_joules or 0.0) + joules

    def parameters(self) -> int:
        """Return the number of trainable parameters."""
        moves = self.assets.attached.moves
        return tensors.numel({name: t for name, t in self.assets.initial.items() if moves(name)})

    def rows(self, client: str) -> Rows:
        """Return a participant's training rows."""
        return self.engine.hands.rows(client, "train")


def _join(parts: Iterable[ClientData]) -> ClientData:
    every = list(parts)
    return ClientData(
        *(
            np.concatenate([NOBODY, *column])
            for column in zip(*((d.train, d.validation, d.test) for d in every), strict=True)
        )
    )
