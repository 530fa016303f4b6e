"""DiLoCo: the inner optimiser goes on, the outer one is Nesterov's, and the moments stay at home."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.quadratics import Curve, federate
from tests.bare import bare_server
from tests.client.test_trainer import _bench, _rows
from tests.helpers import adapter, lines, run, same

import fedloom
from fedloom import recipe as recipes
from fedloom import tensors
from fedloom.algorithms.diloco import DiLoCo
from fedloom.algorithms.fedavg import FedAvg
from fedloom.checkpoint import MemoryStore
from fedloom.client.fit import Job, fit, gradient
from fedloom.client.optimizers import AdamW, Sgd
from fedloom.client.trainer import Rows, Trainer, step_rows
from fedloom.server.optim import Nesterov
from fedloom.types import Bundle, Fit, RecipeError

OUTER = {"algorithm": "diloco", "server": {"optimizer": "nesterov", "lr": 0.7}}
PLAIN = {"algorithm": "diloco", "server": {"optimizer": {"name": "nesterov", "momentum": 0}}}
ALONE = {"data": {"clients": 1, "partition": "iid"}, "model": {"dtype": "fp64"}}


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_two_rounds_with_kept_state_are_one_run_of_torchs_adamw(clip_norm: float | None) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    trainer = Trainer(optimizer=AdamW(weight_decay=0.1), lr=1e-2, steps=3, batch=4, clip_norm=clip_norm)
    bench, rows = _bench(trainer), _rows()
    start = bench.attached.init(0, torch.float64)
    first = fit(bench, [Job("a", 0, rows, Fit(start, optimizer_state=Bundle()))])[0]
    second = fit(bench, [Job("a", 1, rows, Fit(first.params, optimizer_state=first.optimizer_state))])[0]

    plain = {name: torch.nn.Parameter(t.clone()) for name, t in start.items()}
    theirs = torch.optim.AdamW(plain.values(), **options)
    for round_ in (0, 1):
        for step in step_rows(trainer, rows.lengths(), 0, round_, "a"):
            values = {name: p.detach().clone() for name, p in plain.items()}
            found = gradient(bench, Rows(rows.encoded, rows.indices[step]), values)
            for name, p in plain.items():
                p.grad = found[name]
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(plain.values(), clip_norm)
            theirs.step()
    for name, p in plain.items():
        torch.testing.assert_close(second.params[name], p.detach(), rtol=0, atol=1e-12)
    assert {name: float(t) for name, t in second.optimizer_state.tensors.items() if name == "step"} == {"step": 6.0}
    assert tensors.nbytes(first.optimizer_state.tensors) == 2 * tensors.nbytes(start) + 4


def test_without_kept_state_the_second_round_differs() -> None:
    bench, rows = _bench(Trainer(steps=2, batch=4, lr=1e-2)), _rows()
    start = bench.attached.init(0, torch.float64)
    first = fit(bench, [Job("a", 0, rows, Fit(start, optimizer_state=Bundle()))])[0]
    kept = fit(bench, [Job("a", 1, rows, Fit(first.params, optimizer_state=first.optimizer_state))])[0]
    fresh = fit(bench, [Job("a", 1, rows, Fit(first.params))])[0]
    assert max(float((kept.params[n] - fresh.params[n]).abs().max()) for n in start) > 1e-4
    assert fresh.optimizer_state == Bundle()


def test_what_is_kept_is_not_what_the_next_round_changes() -> None:
    """The bundle that goes in is the checkpoint's: training must not write into it."""
    bench, rows = _bench(Trainer(steps=2, batch=4, lr=1e-2)), _rows()
    start = bench.attached.init(0, torch.float64)
    first = fit(bench, [Job("a", 0, rows, Fit(start, optimizer_state=Bundle()))])[0]
    before = tensors.clone(first.optimizer_state.tensors)
    fit(bench, [Job("a", 1, rows, Fit(first.params, optimizer_state=first.optimizer_state))])
    assert same(before, dict(first.optimizer_state.tensors))


def test_clients_in_one_pass_keep_their_own_state() -> None:
    """One client has fewer steps, so that its lane ends before the others'."""
    bench, rows = _bench(Trainer(epochs=1, batch=4, lr=1e-2)), _rows()
    start = bench.attached.init(0, torch.float64)
    owned = {"a": rows, "b": Rows(rows.encoded, rows.indices[:3]), "c": rows}
    state = dict.fromkeys(owned, Bundle())
    for round_ in (0, 1):
        jobs = [Job(n, round_, r, Fit(start, optimizer_state=state[n])) for n, r in owned.items()]
        together = fit(bench, jobs)
        alone = [fit(bench, [Job(n, round_, r, Fit(start, optimizer_state=state[n]))])[0] for n, r in owned.items()]
        for one, other in zip(together, alone, strict=True):
            assert one.optimizer_state.tensors.keys() == other.optimizer_state.tensors.keys() != set()
            for name, t in one.optimizer_state.tensors.items():
                torch.testing.assert_close(t, other.optimizer_state.tensors[name], rtol=0, atol=1e-12)
        state = {n: f.optimizer_state for n, f in zip(owned, together, strict=True)}


def test_the_rate_of_the_round_counts_not_the_one_that_was_kept() -> None:
    bench, rows = _bench(Trainer(optimizer=Sgd(momentum=0.5), steps=1, batch=4, lr=1.0, clip_norm=None)), _rows()
    start = bench.attached.init(0, torch.float64)
    first = fit(bench, [Job("a", 0, rows, Fit(start, optimizer_state=Bundle()))])[0]
    slower = _bench(Trainer(optimizer=Sgd(momentum=0.5), steps=1, batch=4, lr=0.25, clip_norm=None))
    effect = Fit(first.params, optimizer_state=first.optimizer_state)
    moves = [tensors.sub(fit(b, [Job("a", 1, rows, effect)])[0].params, first.params) for b in (bench, slower)]
    for name in start:
        torch.testing.assert_close(moves[1][name], 0.25 * moves[0][name], rtol=0, atol=1e-14)


def test_one_client_without_outer_momentum_is_one_long_round(tiny_folder: Path, tmp_path: Path) -> None:
    rounds = run(tiny_folder, tmp_path / "a", **PLAIN, **ALONE, trainer={"steps": 2}, rounds=3)
    whole = run(tiny_folder, tmp_path / "b", **ALONE, trainer={"steps": 6}, rounds=1)
    a, b = adapter(rounds), adapter(whole)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-12)
    forgetful = run(tiny_folder, tmp_path / "c", **ALONE, trainer={"steps": 2}, rounds=3)
    assert max(float((adapter(forgetful)[n] - b[n]).abs().max()) for n in b) > 1e-4


def test_one_step_of_sgd_is_plain_outer_nesterov(tiny_folder: Path, tmp_path: Path) -> None:
    """H = 1, K = 1: the outer optimiser sees -lr times the gradient, so it is torch's on lr times the gradient."""
    w, curve = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)), Curve(2.0, 3.0, lr=0.05)
    theirs = torch.optim.SGD([w], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(20):
        w.grad = curve.lr * curve.slope * (w.detach() - curve.target)
        theirs.step()
    server = bare_server(("a",), optimizer=Nesterov(), lr=0.7)
    ours = federate(DiLoCo(), server, {"a": curve}, 20).params["w"]
    torch.testing.assert_close(ours, w.detach(), rtol=0, atol=1e-13)
    sgd = {"trainer": {"optimizer": "sgd", "steps": 1, "lr": 0.1}, **ALONE}
    kept = run(tiny_folder, tmp_path / "a", **sgd, **OUTER)
    plain = run(tiny_folder, tmp_path / "b", **sgd, server=OUTER["server"])
    assert same(adapter(kept), adapter(plain))


def test_in_its_first_round_it_is_fedavg(tiny_folder: Path, tmp_path: Path) -> None:
    uniform = {"name": "fedavg", "weighting": "uniform"}
    first = run(tiny_folder, tmp_path / "a", **PLAIN, rounds=1)
    plain = run(tiny_folder, tmp_path / "b", algorithm=uniform, rounds=1)
    assert same(adapter(first), adapter(plain))


def test_momentum_of_clients_goes_on_in_the_toy() -> None:
    """Two rounds of two steps with a kept velocity are four steps."""
    curves = {"a": Curve(1.0, 4.0, steps=2, momentum=0.8)}
    server = bare_server(("a",), optimizer=Nesterov(momentum=0))
    state = federate(DiLoCo(), server, curves, 2)
    long = federate(FedAvg(), server, {"a": Curve(1.0, 4.0, steps=4, momentum=0.8)}, 1)
    assert float(state.params["w"]) == pytest.approx(float(long.params["w"]), abs=1e-14)


def test_resume_bytes_and_memories(tiny_folder: Path, tmp_path: Path) -> None:
    """Two of three clients a round, so that memories are of different ages."""
    some = {**OUTER, "sampler": {"count": 2}, "rounds": 4}
    whole = run(tiny_folder, tmp_path / "a", **some)
    run(tiny_folder, tmp_path / "b", **{**some, "rounds": 2})
    longer = fedloom.resume(tmp_path / "b", ["rounds=4"])
    assert longer.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert longer.summary["metrics"] == whole.summary["metrics"]
    plain = run(tiny_folder, tmp_path / "c", sampler={"count": 2}, rounds=4)
    for key in ("bytes_up", "bytes_down"):
        assert whole.summary[key] == plain.summary[key]
    size = tensors.nbytes(adapter(whole))
    trained = {x["client"] for x in lines(whole.folder / "metrics.jsonl") if x["name"] == "loss" and x["client"]}
    memories = MemoryStore(whole.folder / "memories")
    memories.restore(4)
    for name in trained:
        kept = memories.load(name)["optimizer"].tensors
        assert set(kept) == {"step", "exp_avg", "exp_avg_sq"}
        assert tensors.nbytes(kept) == 2 * size + 4


def test_processes_keep_it_too(tiny_folder: Path, tmp_path: Path) -> None:
    here = run(tiny_folder, tmp_path / "a", **OUTER)
    there = run(tiny_folder, tmp_path / "b", **OUTER, runtime={"name": "processes", "workers": 2, "threads": 1})
    assert there.summary["adapter_sha256"] == here.summary["adapter_sha256"]


def test_it_needs_nesterov() -> None:
    for optimizer in ("sgd", "fedavgm", "fedadam"):
        message = rf"server\.optimizer={optimizer}: .*set server\.optimizer=nesterov and server\.lr=0\.7"
        with pytest.raises(RecipeError, match=message):
            recipes.load({"algorithm": "diloco", "server": {"optimizer": optimizer}})
    assert recipes.load(OUTER).server.lr == 0.7
