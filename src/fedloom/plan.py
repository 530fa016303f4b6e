"""What a run will do and roughly what it will cost, told before the first round."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from fedloom import tensors
from fedloom.attacks import Attack
from fedloom.client.batches import collate, passes
from fedloom.client.models import Model
from fedloom.client.trainer import step_rows
from fedloom.outcome import peak_rss
from fedloom.settle import COPIES
from fedloom.tracking import Plan
from fedloom.units import human_bytes, human_seconds
from fedloom.wire import codec
from fedloom.world import World

ROUNDS_LOOKED_AT = 3
PROBE_TOKENS = 512
NAMES_TOLD = 8
LAST = "every client works on by itself after the last round, which is not in the figures below"
ENOUGH = 50
"""Validation rows of all clients that the choice of the best round should rest on at least."""
PROBED = 3
"""Copies of a client's tensors that the timed pass has made: what is sent, values, gradients; moments were not."""


def make_plan(world: World, start: int) -> Plan:
    """Return the plan of one regime, with a short timed pass to estimate the time.

    Args:
        world: the regime.  start: finished rounds.
    """
    recipe, split, model = world.recipe, world.assets.federation, world.recipe.model
    tokens, steps = _tokens_a_round(world)
    cohort = recipe.sampler.cohort(0, world.clients, recipe.seed)
    state = recipe.algorithm.init(world.assets.initial)
    message = recipe.algorithm.broadcast(world.engine.stage.server, state, cohort[0])
    down = len(codec.encode(message.groups)) * len(cohort) if message.groups else 0
    speed = _speed(world)
    rounds = recipe.rounds - start
    seconds = rounds * tokens / (speed * recipe.runtime.lanes(recipe))
    memory = human_bytes(_memory(world))
    owned = _span([len(world.rows(name)) for name in world.clients])
    left = f", {split.left.total} left out ({split.left.too_long} too long)" if split.left.total else ""
    lines = [
        (
            "model",
            f"{model.name}: {world.assets.loaded.parameters:,} parameters, {_stored(model)} on {model.device}",
        ),
        (
            "trainable",
            f"{world.parameters():,} parameters ({_share(world):.2%}), {len(world.assets.attached.layers)} layers",
        ),
        ("rows", f"{len(split.rows):,} from {split.source}{left}"),
        (
            "clients",
            f"{len(world.clients):,} ({len(cohort):,} a round), {owned} training rows each",
        ),
        ("algorithm", f"{recipe.algorithm.part_name}, {recipe.rounds} rounds, {_span(steps)} steps a client a round"),
        *([("best", few)] if (few := _too_few(world)) else []),
        *([("afterwards", LAST)] if recipe.algorithm.finishes else []),
        *[("attackers", _attackers(attack)) for attack in world.engine.stage.attacks],
        (
            "tokens",
            f"about {tokens * rounds:,} to train on ({tokens:,} a round)" if rounds else "none is left",
        ),
        ("messages", f"{human_bytes(down)} down and about as much up a round" if down else "none"),
        (
            "expected",
            f"{human_seconds(seconds)} of training at {speed:,.0f} tokens/s; from {memory} of memory",
        ),
    ]
    return Plan(
        world.folder.name,
        recipe.algorithm.regime,
        world.folder,
        lines,
        recipe.rounds,
        start,
        len(world.clients),
        tokens * rounds,
    )


def _memory(world: World) -> int:
    """Return what a round takes at least: what this process has used so far, and what training adds for each client."""
    clients = world.recipe.runtime.cohort
    lanes = clients if isinstance(clients, int) else 1
    return peak_rss() + lanes * (COPIES - PROBED) * tensors.nbytes(world.assets.initial)


def _stored(model: Model) -> str:
    return model.dtype if model.quantize == "none" else f"{model.dtype} and {model.quantize}"


def _attackers(attack: Attack) -> str:
    more = f" and {len(attack.clients) - NAMES_TOLD} more" if len(attack.clients) > NAMES_TOLD else ""
    since = f", from round {attack.start + 1} on" if attack.start else ""
    return f"{attack.part_name} by {', '.join(attack.clients[:NAMES_TOLD])}{more}{since}"


def _share(world: World) -> float:
    return world.parameters() / world.assets.loaded.parameters


def _span(counts: Sequence[int]) -> str:
    """Return the least and the largest count, for people."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _too_few(world: World) -> str:
    """Return what to know where the best round is chosen by few rows of the clients, or ""."""
    judge = world.recipe.judge()
    if judge is None or not judge.own_rows:
        return ""
    rows = sum(len(data.validation) for data in world.assets.federation.clients.values())
    if rows >= ENOUGH:
        return ""
    return f"chosen by {judge.part_name} on {rows} validation rows, too few to tell rounds apart; raise data.splits"


def _tokens_a_round(world: World) -> tuple[int, list[int]]:
    """Return the mean trained tokens of the first rounds, and the steps of clients, from the real row streams."""
    recipe, totals, steps = world.recipe, [], list[int]()
    for round_ in range(min(ROUNDS_LOOKED_AT, recipe.rounds)):
        tokens = 0
        for name in recipe.sampler.cohort(round_, world.clients, recipe.seed):
            lengths = world.rows(name).lengths()
            chosen = step_rows(recipe.trainer, lengths, recipe.seed, round_, name)
            steps.append(len(chosen))
            tokens += sum(lengths[row] for step in chosen for row in step)
        totals.append(tokens)
    return int(np.mean(totals)), steps


def _speed(world: World) -> float:
    """Time one forward and backward pass of a few rows; return tokens a second. Draws nothing and changes nothing."""
    bench, rows = world.engine.stage.bench, world.rows(world.clients[0])
    lengths = rows.lengths()
    stack = bench.attached.load([world.assets.initial])
    cut = passes([list(enumerate(lengths))], PROBE_TOKENS, packed=bench.packed)
    (one,) = cut[len(cut) // 2]
    batch = collate([[rows[row] for row in one]], bench.model.device, packed=bench.packed)
    for _ in range(2):  # the first pass pays for first-time allocations
        began = time.perf_counter()
        stack.backward(bench.objective.losses(bench.model, batch, bench.reference).sum())
        seconds = time.perf_counter() - began
    return sum(lengths[row] for row in one) / seconds
