"""AdaLoRA at the server: the budget, the importance of triplets, what is pruned and what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import run
from tests.tiny import tiny_model
from torch import Tensor

from fedloom.checkpoint import Checkpoints
from fedloom.client.ada_lora import AdaLora
from fedloom.types import RecipeError, ServerState

FP64 = {"model": {"dtype": "fp64"}}
LAYERS = 14


def _lambdas(params: Any) -> dict[str, Tensor]:
    return {name: t for name, t in params.items() if name.endswith("lora_E")}


def _states(folder: Path, rounds: int) -> list[ServerState]:
    return [Checkpoints(folder / "checkpoints", 99).load(round_)[0] for round_ in range(rounds + 1)]


def test_the_budget_falls_with_the_third_power() -> None:
    part = AdaLora(r=12, target=8, warmup=2, final=3)
    found = [part.budget(round_, 10, 100) for round_ in range(11)]
    falling = [800 + int(400 * (1 - (t - 2) / 5) ** 3) for t in range(3, 7)]
    assert found == [1200, 1200, 1200, *falling, 800, 800, 800, 800]
    assert AdaLora(r=4, target=4).budget(5, 6, 10) == 40


def test_triplets_of_a_run_are_those_of_the_budget(tiny_folder: Path, tmp_path: Path) -> None:
    part = {"name": "ada-lora", "r": 4, "target": 2, "warmup": 1, "final": 2}
    result = run(tiny_folder, tmp_path / "a", **FP64, adapter=part, rounds=6, checkpoint={"keep": 99}, evaluate=[])
    states, told = _states(result.folder, 6), AdaLora(r=4, target=2, warmup=1, final=2)
    left = [sum(int((t != 0).sum()) for t in _lambdas(state.params).values()) for state in states[1:]]
    assert left == [told.budget(round_, 6, LAYERS) for round_ in range(1, 7)]
    assert left[0] == 4 * LAYERS > left[1] > left[2] > left[3] == 2 * LAYERS
    ranks = {name: int((t != 0).sum()) for name, t in _lambdas(states[4].params).items()}
    assert len(set(ranks.values())) > 1  # some layers keep more than others
    for late in states[5:]:
        assert {name: int((t != 0).sum()) for name, t in _lambdas(late.params).items()} == ranks
    before, after = _lambdas(states[4].params), _lambdas(states[6].params)
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def _by_hand(seen: list[tuple[ServerState, ServerState]]) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Return the importance of every triplet after some rounds, and the score of every entry, one by one."""
    names, found = seen[0][0].params.keys(), {}
    scores = {}
    for name in names:
        flat = torch.zeros(seen[0][0].params[name].numel(), dtype=torch.float64)
        smooth, unsure = flat.clone(), flat.clone()
        for before, after in seen:
            old, new = before.params[name].flatten(), after.params[name].flatten()
            for i in range(len(flat)):
                now = abs(float(new[i]) * (float(new[i]) - float(old[i])))
                smooth[i] = 0.85 * smooth[i] + 0.15 * now
                unsure[i] = 0.85 * unsure[i] + 0.15 * abs(now - float(smooth[i]))
        scores[name] = (smooth * unsure).view(seen[0][0].params[name].shape)
    for name in _lambdas(dict.fromkeys(names)):
        module = name.removesuffix(".lora_E")
        e, p, q = (scores[f"{module}.{kind}"] for kind in ("lora_E", "lora_B", "lora_A"))
        found[name] = [float(e[i, 0] + p[:, i].sum() / len(p) + q[i].sum() / q.shape[1]) for i in range(len(e))]
    return found, scores


def test_the_most_important_triplets_stay() -> None:
    part = AdaLora(r=6, target=3, final=1, targets=("q_proj", "v_proj"))
    attached = part.attach(tiny_model(torch.float64))
    stream = torch.Generator().manual_seed(0)

    def draw() -> dict[str, Tensor]:
        # lambda is small, so that all three kinds decide
        shapes = attached.shapes().items()
        drawn = {name: torch.randn(shape, generator=stream, dtype=torch.float64) for name, shape in shapes}
        return {name: t * 0.5 if name.endswith("lora_E") else t for name, t in drawn.items()}

    state, seen = ServerState(0, draw()), []
    for round_ in (1, 2):
        raw = ServerState(round_, draw(), state.slots)
        seen.append((state, raw))
        state = attached.governed(state, raw, 4)
        importance, scores = _by_hand(seen)
        order = sorted((-value, name, i) for name, values in importance.items() for i, value in enumerate(values))
        kept = {(name, i) for _, name, i in order[: part.budget(round_, 4, 4)]}
        for name, t in _lambdas(state.params).items():
            for i in range(6):
                expected = raw.params[name][i, 0] if (name, i) in kept else 0.0
                assert float(t[i, 0]) == float(expected)
        others = [name for name in raw.params if not name.endswith("lora_E")]
        assert all(torch.equal(raw.params[name], state.params[name]) for name in others)
        smooth, unsure = (state.slots[f"ada_lora_{group}"].tensors for group in ("sensitivity", "uncertainty"))
        for name, score in scores.items():
            torch.testing.assert_close(smooth[name] * unsure[name], score, rtol=0, atol=1e-12)
        assert set(state.slots) == {"ada_lora_sensitivity", "ada_lora_uncertainty"}


def test_nothing_is_pruned_where_target_is_the_rank(tiny_folder: Path, tmp_path: Path) -> None:
    part = {"name": "ada-lora", "r": 2, "target": 2}
    result = run(tiny_folder, tmp_path / "a", adapter=part, checkpoint={"keep": 9}, evaluate=[])
    last = _states(result.folder, 2)[-1]
    assert all((t != 0).all() for t in _lambdas(last.params).values())
    assert not any(group.startswith("ada_lora") for group in last.slots)


def test_the_regulariser(tiny_folder: Path, tmp_path: Path) -> None:
    attached = AdaLora(r=3, target=2, gamma=0.7).attach(tiny_model(torch.float64))
    stream = torch.Generator().manual_seed(1)
    params = {n: torch.randn(s, generator=stream, dtype=torch.float64) for n, s in attached.shapes().items()}
    total, count = 0.0, 0
    for name, t in params.items():
        if name.endswith("lora_E"):
            continue
        rows = t if name.endswith("lora_A") else t.T
        square = 0.0
        for i in range(3):
            for j in range(3):
                square += (float(rows[i] @ rows[j]) - (i == j)) ** 2
        total, count = total + square**0.5, count + 1
    assert attached.penalty is not None
    assert float(attached.penalty(params)) == pytest.approx(0.7 * total / count, abs=1e-10)
    assert AdaLora(gamma=0).attach(tiny_model()).penalty is None

    def distance(gamma: float) -> float:
        part = {"name": "ada-lora", "r": 2, "target": 2, "gamma": gamma, "targets": ["q_proj"]}
        trainer = {"steps": 10, "lr": 0.05}
        result = run(tiny_folder, tmp_path / str(gamma), adapter=part, trainer=trainer, rounds=1, evaluate=[])
        (after,) = _states(result.folder, 1)[1:]
        return float(AdaLora(r=2, target=2, gamma=1, targets=("q_proj",)).attach(tiny_model()).penalty(after.params))  # type: ignore[misc]

    assert distance(10.0) < 0.5 * distance(0.0)


def test_zeroth_order_sees_the_regulariser() -> None:
    """The slope along a direction is that of the loss with the regulariser in it."""
    from tests.client.test_cohort import NAMES, _rows

    from fedloom.client.fit import Job, fit
    from fedloom.client.objectives import Sft
    from fedloom.client.trainer import Bench, Trainer
    from fedloom.types import Fit

    slopes = []
    for gamma in (0.0, 5.0):
        model = tiny_model(torch.float64).requires_grad_(False)
        attached = AdaLora(r=2, target=2, gamma=gamma).attach(model)
        bench = Bench(model, attached, Sft(), Trainer(steps=1, batch=2, packing=False), 0, 10)
        start = attached.init(0, torch.float64)
        (fitted,) = fit(bench, [Job(NAMES[0], 0, _rows()[NAMES[0]], Fit(start, order="zeroth"))])
        slopes.append(fitted.slopes[0])
    assert slopes[0] != slopes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"name": "ada-lora", "r": 4, "target": 8}}, "adapter.target=8 is above adapter.r=4"),
        ({"adapter": "ada-lora", "rounds": 1}, "warmup=0 and adapter.final=1 leave none of rounds=1"),
        (
            {"adapter": "ada-lora", "algorithm": "local"},
            "clients of local keep adapters of their own.*adapter.target=12",
        ),
        ({"adapter": "ada-lora", "compare": ["local"]}, "clients of local keep adapters of their own"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(tiny_folder, tmp_path / "a", **changes)
