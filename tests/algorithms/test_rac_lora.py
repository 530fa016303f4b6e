"""RAC-LoRA: exact, one factor on the wire, merges told by halves; its steps are those of projected full fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.test_toys import drive
from tests.bare import bare_server
from tests.helpers import lines, run, same
from tests.messages import payload, watched
from torch import Tensor

import fedloom
from fedloom import baselog
from fedloom.algorithms import Client
from fedloom.algorithms.raclora import RacLora
from fedloom.checkpoint import Checkpoints
from fedloom.factors import Ranks
from fedloom.types import Fit, Fitted, Merge, RecipeError, ServerState

FP64 = {"model": {"dtype": "fp64"}}
SIDES = ("B", "A")
M = torch.diag(torch.tensor([10.0, 1.0, 1.0], dtype=torch.float64))
GOAL = torch.tensor([[1.0, 2.0, -1.0], [3.0, -2.0, 0.5], [0.5, 1.0, 2.0]], dtype=torch.float64)
"""The quadratic f(W) = 1/2 <W - GOAL, M (W - GOAL)>, whose gradient is M (W - GOAL) and whose L is 10."""


def rac(side: str) -> dict[str, Any]:
    return {"algorithm": {"name": "rac-lora", "trains": side}}


def chain(algorithm: RacLora, draw: Any, rounds: int, lr: float, w: Tensor, scale: float = 1.0) -> Tensor:
    """Run one client that takes one step of plain SGD on the quadratic a round; return W after it."""
    whole = {"m": len(draw(0)["m.lora_A"])}
    ranks = Ranks(whole, lambda client: whole, lambda rank: scale)
    server = bare_server(("a",), lora=ranks, draw=draw)
    state = algorithm.init(draw(0))
    for _ in range(rounds):
        changed = baselog.delta(state.base, "m")
        at = w if changed is None else w + changed
        client = Client("a", state.round, {}, 1, 1.0, draw(0), draw, ranks)
        steps = algorithm.train(client, algorithm.broadcast(server, state, "a"))
        update, _ = drive(steps, lambda effect, at=at: _step(effect, at, lr, scale))
        combined = drive(algorithm.combine(server, state, [update]), None)
        state = drive(algorithm.step(server, state, combined), None)
    changed = baselog.delta(state.base, "m")
    assert changed is not None
    return w + changed


def _step(effect: Fit, w: Tensor, lr: float, scale: float) -> Fitted:
    """Plain SGD on the factors that the effect lets move."""
    p = {name: t.clone().requires_grad_() for name, t in effect.start.items()}
    residual = w + scale * p["m.lora_B"] @ p["m.lora_A"] - GOAL
    gradients = torch.autograd.grad(0.5 * (residual * (M @ residual)).sum(), list(p.values()))
    moved = {
        name: (t - lr * g).detach() if effect.trainable is None or effect.trainable(name) else effect.start[name]
        for (name, t), g in zip(p.items(), gradients, strict=True)
    }
    return Fitted(moved, 1, lr, 1, 1, (0.0,))


def test_an_orthogonal_block_of_full_rank_is_a_step_of_full_fine_tuning() -> None:
    stream = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(3, 3, generator=stream, dtype=torch.float64)).Q
    draw = lambda round_: {"m.lora_A": q, "m.lora_B": torch.zeros(3, 3, dtype=torch.float64)}
    w = torch.zeros(3, 3, dtype=torch.float64)
    torch.testing.assert_close(chain(RacLora(), draw, 1, 0.05, w), w - 0.05 * M @ (w - GOAL), rtol=0, atol=1e-14)


@pytest.mark.parametrize("side", SIDES)
def test_a_step_is_the_projected_gradient(side: Any) -> None:
    """-eta s^2 G A^T A, or -eta s^2 B B^T G with the B that the seed gives."""
    algorithm, w, s = RacLora(trains=side), torch.ones(3, 3, dtype=torch.float64), 2.0
    start = algorithm.block(_drawn(0), float(_seed(0)))
    g, a, b = M @ (w - GOAL), start["m.lora_A"], start["m.lora_B"]
    expected = w - 0.01 * s**2 * (g @ a.mT @ a if side == "B" else b @ b.mT @ g)
    torch.testing.assert_close(chain(algorithm, _drawn, 1, 0.01, w, s), expected, rtol=0, atol=1e-13)


def test_the_chain_converges_where_lora_with_the_same_step_diverges() -> None:
    w = torch.zeros(3, 3, dtype=torch.float64)
    draw = lambda round_: {n: t[:1] if n.endswith("A") else t[:, :1] for n, t in _drawn(round_).items()}
    found = chain(RacLora(), draw, 4000, 1 / 10, w)
    torch.testing.assert_close(found, GOAL, rtol=0, atol=1e-6)
    start = draw(0)
    plain = Fitted(start, 0, 0.1, 0, 0, ())
    largest = 0.0
    for _ in range(4000):
        plain = _step(Fit(plain.params), w, 1 / 10, 1.0)
        largest = float((plain.params["m.lora_B"] @ plain.params["m.lora_A"]).abs().max())
        if not largest < 1e6:
            break
    assert not largest < 1e6


def _drawn(round_: int) -> dict[str, Tensor]:
    """A Kaiming-uniform (2, 3), B zero."""
    stream = torch.Generator().manual_seed(round_)
    a = (2 * torch.rand(2, 3, generator=stream) - 1).double() / 3**0.5
    return {"m.lora_A": a, "m.lora_B": torch.zeros(3, 2, dtype=torch.float64)}


def _seed(round_: int) -> float:
    server = bare_server(("a",), draw=_drawn)
    return RacLora(trains="A").broadcast(server, ServerState(round_, {}), "a").groups["block"].scalars["seed"]


def test_the_drawn_b_is_normal_and_new_in_every_round() -> None:
    wide = {"m.lora_A": torch.zeros(50, 3), "m.lora_B": torch.zeros(400, 50)}
    b = RacLora(trains="A").block(wide, _seed(0))["m.lora_B"]
    assert float(b.mean()) == pytest.approx(0, abs=0.02)
    assert float(b.std()) == pytest.approx(1, abs=0.02)
    assert _seed(0) != _seed(1)
    assert torch.equal(b, RacLora(trains="A").block(wide, _seed(0))["m.lora_B"])


@pytest.mark.parametrize("side", SIDES)
def test_exact_and_what_is_merged_is_naive_arithmetic(tiny_folder: Path, tmp_path: Path, side: str) -> None:
    with watched() as seen:
        result = run(tiny_folder, tmp_path / "a", **FP64, **rac(side), checkpoint={"keep": 9})
    error = [line["value"] for line in lines(result.folder / "metrics.jsonl") if line["name"] == "aggregation_error"]
    assert len(error) == 2
    assert max(error) < 1e-12
    state, _ = Checkpoints(result.folder / "checkpoints", 9).load(2)
    algorithm, engine = result.recipe.algorithm, seen[0].engine
    for module in baselog.modules(state.base):
        ideal = 0.0
        for round_ in (0, 1):
            passed = [one for one in seen if one.round == round_]
            seed = passed[0].down.groups["block"].scalars["seed"] if side == "A" else 0.0
            fresh = algorithm.block(engine.stage.server.draw(round_), seed)
            sizes = [len(engine.stage.clients[one.client].train) for one in passed]
            for one, size in zip(passed, sizes, strict=True):
                ended = {n: t + one.up.groups["params"].tensors.get(n, 0) for n, t in fresh.items()}
                product = ended[f"{module}.lora_B"] @ ended[f"{module}.lora_A"]
                ideal = ideal + size / sum(sizes) * 2.0 * product  # alpha 4, rank 2
        torch.testing.assert_close(baselog.delta(state.base, module), ideal, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
def test_only_the_trained_factor_travels(tiny_folder: Path, tmp_path: Path, side: str) -> None:
    with watched() as seen:
        run(tiny_folder, tmp_path / "a", **rac(side), rounds=4, sampler={"count": 2}, evaluate=[])
    shapes = seen[0].engine.stage.bench.attached.shapes()
    one = sum(4 * rows * columns for name, (rows, columns) in shapes.items() if name.endswith(side))
    last: dict[str, int] = {}
    for passed in seen:
        assert payload(passed.up) == one
        assert all(name.endswith(f"lora_{side}") for name in passed.up.groups["params"].tensors)
        missed = passed.round - last.get(passed.client, 0)
        assert payload(passed.down) == missed * one
        last[passed.client] = passed.round
    assert {passed.round - last[passed.client] for passed in seen} != {0}


@pytest.mark.parametrize("side", SIDES)
def test_an_absent_client_holds_the_servers_log(tiny_folder: Path, tmp_path: Path, side: str) -> None:
    """From its own messages alone, bit for bit, also once the log has a dense entry."""
    logs: dict[str, tuple[Merge, ...]] = {}
    with watched() as seen:
        result = run(
            tiny_folder, tmp_path / "a", **rac(side), rounds=9, sampler={"count": 2}, adapter={"r": 4, "alpha": 12},
            evaluate=[], checkpoint={"keep": 99},
        )  # fmt: skip
    checkpoints, dense = Checkpoints(result.folder / "checkpoints", 99), 0
    for passed in seen:
        server = passed.engine.stage.server
        before = logs.get(passed.client, ())
        mine = result.recipe.algorithm.received(before, passed.down, server.draw, server.ranks.scale)
        theirs = checkpoints.load(passed.round)[0].base
        assert [(m.round, m.whole) for m in mine] == [(m.round, m.whole) for m in theirs]
        assert all(same(dict(m.tensors), dict(t.tensors)) for m, t in zip(mine, theirs, strict=True))
        logs[passed.client], dense = mine, dense + any(".delta" in n for n in _names(passed.down))
    assert dense  # a client that was absent while the log folded


def _names(message: Any) -> list[str]:
    return [name for bundle in message.groups.values() for name in bundle.tensors]


@pytest.mark.parametrize("side", SIDES)
def test_a_resumed_run_is_the_straight_one(tiny_folder: Path, tmp_path: Path, side: str) -> None:
    whole = run(tiny_folder, tmp_path / "a", **rac(side), rounds=3, sampler={"count": 2})
    run(tiny_folder, tmp_path / "b", **rac(side), rounds=1, sampler={"count": 2})
    longer = fedloom.resume(tmp_path / "b", ["rounds=3"])
    for key in ("adapter_sha256", "metrics", "trained_tokens"):
        assert longer.summary[key] == whole.summary[key], key


def test_the_fixed_factor_does_not_move(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloom.runtime import effects

    real, rounds = effects.fit.fit, {}

    def noted(bench: Any, jobs: Any) -> Any:
        done = real(bench, jobs)
        for job, fitted in zip(jobs, done, strict=True):
            for name, t in fitted.params.items():
                assert torch.equal(t, job.effect.start[name]) == name.endswith("lora_A")
            rounds[job.round] = fitted.params
        return done

    monkeypatch.setattr(effects.fit, "fit", noted)
    run(
        tiny_folder, tmp_path / "a", algorithm="rac-lora", trainer={"optimizer": {"name": "adamw", "weight_decay": 0.5}}
    )
    first, second = ({n: t for n, t in rounds[i].items() if n.endswith("lora_A")} for i in (0, 1))
    assert not any(torch.equal(first[n], second[n]) for n in first)


def test_a_robust_rule_combines_the_trained_factor(tiny_folder: Path, tmp_path: Path) -> None:
    with watched() as seen:
        result = run(tiny_folder, tmp_path / "a", **rac("B"), server={"aggregator": "median"}, rounds=1, evaluate=[])
    (merge,) = Checkpoints(result.folder / "checkpoints", 9).load(1)[0].base
    for name in (name for name in merge.tensors if name.endswith("lora_B")):
        sent = torch.stack([passed.up.groups["params"].tensors[name] for passed in seen])
        torch.testing.assert_close(merge.tensors[name], 2 * sent.median(0).values, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": {"lr": 0.5}}, "the block is merged into the base.*server.lr=1"),
        ({"server": {"aggregator": "foolsgold"}}, "foolsgold compares with earlier rounds.*rule without memory"),
        ({"server": {"aggregator": {"name": "krum", "distance": "product"}}}, "distance=product needs both factors"),
        ({"adapter": {"ranks": [1, 2]}}, "rac-lora needs one rank at all clients"),
        ({"init": "somewhere"}, "begins every round with a fresh block.*--to merged"),
        ({"algorithm": {"trains": "C"}}, "algorithm.trains"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_folder: Path, tmp_path: Path, changes: Any, message: str) -> None:
    algorithm = {"name": "rac-lora", **changes.pop("algorithm", {})}
    with pytest.raises(RecipeError, match=message):
        run(tiny_folder, tmp_path / "a", algorithm=algorithm, **changes)
