"""Server optimisers: values known in closed form, torch's own, neutral settings, and what resumes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.client.test_trainer import _bench, _rows
from tests.helpers import MODEL, adapter, lines, run, same

import fedloom
from fedloom import recipe as recipes
from fedloom.checkpoint import Checkpoints
from fedloom.client.fit import Job, fit
from fedloom.client.optimizers import AdamW, Sgd
from fedloom.client.trainer import Trainer
from fedloom.server.optim import (
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedAvgMEma,
    FedSwa,
    FedYogi,
    Nesterov,
    ServerOptimizer,
    ServerSgd,
)
from fedloom.types import Bundle, Correction, Fit, RecipeError

NEUTRAL = {
    "fedavgm": FedAvgM(momentum=0),
    "fedavgm-ema": FedAvgMEma(momentum=0),
    "nesterov": Nesterov(momentum=0),
    "fedswa": FedSwa(alpha=1),
}
STATEFUL = ["fedavgm", "fedavgm-ema", "nesterov", "fedadagrad", "fedyogi", "fedadam"]


def walk(optimizer: ServerOptimizer, changes: list[float], lr: float = 1.0) -> list[float]:
    """Return the weight after each of some changes, from 0."""
    w: Any = {"w": torch.zeros(1, dtype=torch.float64)}
    kept, found = Bundle(), []
    for change in changes:
        w, kept = optimizer.step(w, {"w": torch.full((1,), change, dtype=torch.float64)}, kept, lr)
        found.append(float(w["w"]))
    return found


@pytest.mark.parametrize(
    ("optimizer", "step"),
    [(FedAdam(), 0.0099005049), (FedYogi(), 0.0099005000), (FedAdagrad(), 0.0099900050)],
    ids=lambda value: getattr(value, "part_name", ""),
)
def test_first_step_of_the_adaptive_ones(optimizer: ServerOptimizer, step: float) -> None:
    assert walk(optimizer, [1.0], lr=0.01) == pytest.approx([step], abs=5e-11)


@pytest.mark.parametrize("kind", [FedAdam, FedYogi, FedAdagrad])
def test_adaptive_steps_are_the_equations(kind: type[Any]) -> None:
    """Element by element in plain numbers, over changes of both signs and many sizes."""
    changes = [1.0, -0.3, 1e-4, 0.0, 2.0, -2.0, 0.01]
    optimizer = kind(beta1=0.8, tau=0.01)
    w, m, v, expected = 0.0, 0.0, 0.01**2, []
    for d in changes:
        m = 0.8 * m + 0.2 * d
        if kind is FedAdagrad:
            v = v + d * d
        elif kind is FedYogi:
            v = v - (1 - 0.99) * d * d * math.copysign(1, v - d * d)
        else:
            v = 0.99 * v + (1 - 0.99) * d * d
        w += 0.05 * m / (math.sqrt(v) + 0.01)
        expected.append(w)
    assert walk(optimizer, changes, 0.05) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", [FedAdam, FedYogi, FedAdagrad])
def test_with_little_adaptivity_they_are_averaging_at_half_the_rate(kind: type[Any]) -> None:
    """With tau far above the changes, sqrt v + tau is 2 tau."""
    changes = [0.5, -1.0, 2.0]
    found = walk(kind(beta1=0, tau=1e5, **({} if kind is FedAdagrad else {"beta2": 0.9999999999})), changes, 2e5)
    assert found == pytest.approx(walk(ServerSgd(), changes), rel=1e-8)


def test_yogi_and_adam_forget_apart() -> None:
    """After a large change and then none, Adam's v falls by its own share, Yogi's by nothing."""
    change = {"w": torch.ones(1, dtype=torch.float64)}
    none = {"w": torch.zeros(1, dtype=torch.float64)}
    falls = {}
    for optimizer in (FedAdam(), FedYogi()):
        _, kept = optimizer.step(change, change, Bundle(), 0.1)
        before = float(kept.tensors["second.w"])
        _, kept = optimizer.step(change, none, kept, 0.1)
        falls[optimizer.part_name] = before - float(kept.tensors["second.w"])
        assert before == pytest.approx(0.01, rel=1e-3)
    assert falls == {"fedadam": pytest.approx(1e-4, rel=1e-3), "fedyogi": 0.0}


def test_nesterov_of_a_constant_change() -> None:
    assert walk(Nesterov(), [1.0] * 3, lr=0.7) == pytest.approx([1.33, 3.227, 5.6343], abs=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_torchs(nesterov: bool) -> None:
    """torch.optim.SGD on the gradient w - w_avg, over random changes."""
    stream = torch.Generator().manual_seed(0)
    ours: Any = {"w": torch.randn(20, generator=stream, dtype=torch.float64)}
    theirs = torch.nn.Parameter(ours["w"].clone())
    torch_optimizer = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=nesterov)
    part, kept = Nesterov() if nesterov else FedAvgM(), Bundle()
    for _ in range(6):
        change = torch.randn(20, generator=stream, dtype=torch.float64)
        theirs.grad = theirs.detach() - (theirs.detach() + change)
        torch_optimizer.step()
        ours, kept = part.step(ours, {"w": change}, kept, 0.7)
        torch.testing.assert_close(ours["w"], theirs.detach(), rtol=0, atol=1e-14)


def test_heavy_ball_gathers_and_the_average_does_not() -> None:
    for part, speed in ((FedAvgM(momentum=0.5), 2.0), (FedAvgMEma(momentum=0.5), 1.0)):
        places = walk(part, [1.0] * 60)
        assert places[-1] - places[-2] == pytest.approx(speed, abs=1e-12)
        assert places[0] == 1.0
    assert walk(FedAvgMEma(momentum=0.75), [4.0, 8.0, 0.0]) == [4.0, 9.0, 12.75]
    assert walk(FedAvgM(momentum=0.75), [4.0, 8.0, 0.0]) == [4.0, 15.0, 23.25]


def test_fedswa_goes_beyond_the_mean() -> None:
    assert walk(FedSwa(), [2.0, -1.0]) == [3.0, 1.5]
    assert walk(FedSwa(alpha=0.5), [2.0], lr=0.5) == [0.5]


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_neutral_settings_are_averaging_bit_for_bit(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    changes = [0.1, -0.7, 1e-9, 3.3]
    assert walk(NEUTRAL[name], changes, 0.3) == walk(ServerSgd(), changes, 0.3)
    plain = run(tiny_folder, tmp_path / "a", rounds=3)
    neutral = run(tiny_folder, tmp_path / "b", rounds=3, server={"optimizer": NEUTRAL[name].dump()})
    assert same(adapter(plain), adapter(neutral))


@pytest.mark.parametrize("name", STATEFUL)
def test_a_resumed_run_goes_on_with_the_state(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    server = {"optimizer": name, "lr": 0.05}
    whole = run(tiny_folder, tmp_path / "a", rounds=3, server=server)
    run(tiny_folder, tmp_path / "b", rounds=1, server=server)
    longer = fedloom.resume(tmp_path / "b", ["rounds=3"])
    assert longer.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert longer.summary["metrics"] == whole.summary["metrics"]
    state, _ = Checkpoints(whole.folder / "checkpoints", 2).load(3)
    kinds = 2 if name in ("fedadagrad", "fedyogi", "fedadam") else 1
    assert len(state.slots["server_optimizer"].tensors) == kinds * len(state.params)


@pytest.mark.parametrize("name", [*STATEFUL, "fedswa"])
def test_nothing_of_it_is_sent(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    plain = run(tiny_folder, tmp_path / "a", rounds=2)
    moved = run(tiny_folder, tmp_path / "b", rounds=2, server={"optimizer": name, "lr": 0.05})
    for key in ("bytes_up", "bytes_down"):
        assert moved.summary[key] == plain.summary[key]
    assert not same(adapter(plain), adapter(moved))


def test_bad_settings_are_named() -> None:
    for kind, key in ((FedAvgM, "momentum"), (Nesterov, "momentum"), (FedAdam, "beta2"), (FedAdagrad, "beta1")):
        with pytest.raises(ValidationError, match="less than 1"):
            kind(**{key: 1.0})
    for kind, key in ((FedAdam, "tau"), (FedSwa, "alpha")):
        with pytest.raises(ValidationError, match="greater than 0"):
            kind(**{key: 0})
    with pytest.raises(RecipeError, match=r"fedadam.*applies what was combined itself"):
        recipes.load({"algorithm": "flora", "server": {"optimizer": "fedadam"}})


@pytest.mark.parametrize("optimizer", [Sgd(), Sgd(momentum=0.5), AdamW()])
def test_the_rate_falls_within_a_round(optimizer: Any) -> None:
    """Step k of K takes eta (1 - k/K) + k/K rho eta: a round is K rounds of one step at those rates, state kept."""
    rows, start, bench = _setting(Trainer(optimizer=optimizer, steps=4, batch=2, lr=0.05, decay=0.1))
    whole = fit(bench, [Job("a", 0, rows, Fit(start))])[0]
    assert whole.lr == 0.05
    params, kept = start, Bundle()
    for k in range(4):
        rate = 0.05 * (1 - k / 4) + k / 4 * 0.1 * 0.05
        rows, _, one = _setting(Trainer(optimizer=optimizer, steps=1, batch=2, lr=rate))
        fitted = fit(one, [Job("a", k, rows, Fit(params, optimizer_state=kept))])[0]
        params, kept = fitted.params, fitted.optimizer_state
    for name in start:
        torch.testing.assert_close(whole.params[name], params[name], rtol=0, atol=1e-13)


def test_a_rate_that_does_not_fall_changes_no_bit() -> None:
    """Seven steps: k/7 has no exact form, and yet a factor of 1 is 1."""
    rows, start, bench = _setting(Trainer(steps=7, batch=2, lr=0.1))
    seen: list[float] = []
    real = torch.optim.AdamW.step
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: (seen.append(self.param_groups[0]["lr"]), real(self))[1])
        fit(bench, [Job("a", 0, rows, Fit(start))])
    assert seen == [0.1] * 7


def test_a_correction_of_the_weights_takes_the_steps_rate() -> None:
    rows, start, bench = _setting(Trainer(optimizer=Sgd(), steps=2, batch=2, lr=0.1, decay=0.5, clip_norm=1e-30))
    push = Correction({name: torch.ones_like(t) for name, t in start.items()}, "weights")
    pushed = fit(bench, [Job("a", 0, rows, Fit(start, correct=push))])[0]
    for name in start:
        torch.testing.assert_close(pushed.params[name], start[name] - (0.1 + 0.075), rtol=0, atol=1e-15)


def test_every_client_of_a_cohort_has_its_own_rate() -> None:
    """One of two clients has fewer steps: its rate falls within these."""
    rows, start, bench = _setting(Trainer(optimizer=Sgd(), epochs=1, batch=2, lr=0.1, decay=0.0))
    few = type(rows)(rows.encoded, rows.indices[:4])
    together = fit(bench, [Job("a", 0, rows, Fit(start)), Job("b", 0, few, Fit(start))])
    alone = [fit(bench, [Job("a", 0, rows, Fit(start))])[0], fit(bench, [Job("b", 0, few, Fit(start))])[0]]
    assert [f.steps for f in together] == [5, 2]
    for one, other in zip(together, alone, strict=True):
        for name in start:
            torch.testing.assert_close(one.params[name], other.params[name], rtol=0, atol=1e-13)


def test_scaffold_needs_one_rate() -> None:
    trainer = {"optimizer": "sgd", "clip_norm": None, "decay": 0.1}
    with pytest.raises(RecipeError, match=r"algorithm=scaffold divides by one learning rate.*set trainer\.decay=1"):
        recipes.load({"algorithm": "scaffold", "trainer": trainer})


def test_fedswa_with_its_falling_rate_end_to_end(tiny_folder: Path, tmp_path: Path) -> None:
    sgd = {"optimizer": "sgd", "lr": 0.1}
    swa = {"server": {"optimizer": "fedswa"}, "algorithm": {"name": "fedavg", "weighting": "uniform"}}
    found = run(tiny_folder, tmp_path / "a", trainer={**sgd, "decay": 0.1}, **swa)
    flat = run(tiny_folder, tmp_path / "b", trainer=sgd, **swa)
    assert not same(adapter(found), adapter(flat))
    assert found.summary["train_loss_last"] < found.summary["train_loss_first"]


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedswa"])
def test_each_has_a_recipe_of_its_name(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    small = ["rounds=1", "data.source.rows_per_category=2", "trainer.steps=1", "runtime.threads=1"]
    tiny = {"model": {"name": str(tiny_folder), **MODEL}, "data": {"max_tokens": 2000}, "evaluate": []}
    assert fedloom.run(name, *small, out=tmp_path / "a", **tiny).recipe.server.optimizer.part_name == name


def test_rounds_tell_how_the_worst_client_fares(tiny_folder: Path, tmp_path: Path) -> None:
    found = lines(run(tiny_folder, tmp_path / "a").folder / "metrics.jsonl")
    for round_ in (1, 2):
        of = {x["name"]: x["value"] for x in found if x["round"] == round_ and x["client"] is None}
        losses = [x["value"] for x in found if x["round"] == round_ and x["client"] and x["name"] == "loss"]
        assert len(losses) == 3
        mean = sum(losses) / 3
        assert of["train_loss_worst"] == of["train_loss_worst10"] == max(losses)
        assert of["train_loss_variance"] == pytest.approx(sum((x - mean) ** 2 for x in losses) / 3, rel=1e-12)


def _setting(trainer: Trainer) -> Any:
    """Return ten rows, an adapter and a bench in float64."""
    bench = _bench(trainer)
    return _rows(), bench.attached.init(0, torch.float64), bench
