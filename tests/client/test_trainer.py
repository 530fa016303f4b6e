"""The local loop: batches, budgets, accumulation, schedules, corrections, dropout, and the loss itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model
from torch.nn import functional

from fedloom.client import fit as loop
from fedloom.client.adapters import Lora
from fedloom.client.batches import collate, passes
from fedloom.client.fit import Job, fit, score
from fedloom.client.objectives import Sft, nll
from fedloom.client.optimizers import AdamW, Constant, Cosine, Sgd, WarmUp
from fedloom.client.trainer import Bench, Rows, Trainer, row_stream, step_rows
from fedloom.data.encode import Encoded
from fedloom.types import Correction, Fit


def _rows(count: int = 10, seed: int = 0) -> Rows:
    stream = np.random.default_rng(seed)
    lengths = stream.integers(6, 20, count)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = stream.integers(3, 250, starts[-1]).astype(np.int32)
    train = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    return Rows(Encoded(ids, train, starts, lengths), np.arange(count))


def _bench(trainer: Trainer, dropout: float = 0.0, dtype: torch.dtype = torch.float64, **changes: Any) -> Bench:
    model = tiny_model(dtype)
    model.requires_grad_(False)
    attached = Lora(r=2, alpha=4, dropout=dropout).attach(model, changes.get("reference", False))
    return Bench(model, attached, Sft(), trainer, 0, 10, **changes)


def _fit(trainer: Trainer, effect: Any = None, client: str = "a", round_: int = 0, **changes: Any) -> Any:
    bench = _bench(trainer, **changes)
    start = bench.attached.init(0, torch.promote_types(bench.model.dtype, torch.float32))
    return fit(bench, [Job(client, round_, _rows(), Fit(start, **(effect or {})))])[0], start


def _close(a: Any, b: Any, atol: float) -> None:
    for name in a.params:
        torch.testing.assert_close(a.params[name], b.params[name], rtol=0, atol=atol)


def test_accumulation_equals_one_big_batch() -> None:
    big, _ = _fit(Trainer(steps=3, batch=8, lr=1e-2))
    small, _ = _fit(Trainer(steps=3, batch=2, accumulate=4, lr=1e-2))
    cut, _ = _fit(Trainer(steps=3, batch=8, lr=1e-2, micro_tokens=1))
    _close(big, small, 1e-12)
    _close(big, cut, 1e-12)
    assert small.steps == 3
    assert big.tokens == small.tokens == cut.tokens


def test_reference_equals_fast() -> None:
    fast, _ = _fit(Trainer(steps=4, batch=4, lr=1e-2))
    reference, _ = _fit(Trainer(steps=4, batch=4, lr=1e-2), reference=True)
    _close(fast, reference, 1e-10)
    assert fast.losses == pytest.approx(reference.losses, abs=1e-12)


def test_every_row_comes_before_any_comes_again() -> None:
    stream = row_stream(10, 0, "a", 0)
    epochs = [[next(stream) for _ in range(10)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    later = row_stream(10, 0, "a", 17)
    assert [next(later) for _ in range(3)] == epochs[1][7:]
    trainer = Trainer(steps=2, batch=3)
    rounds = [step_rows(trainer, [5] * 12, 0, r, "a") for r in range(2)]
    assert sorted(row for steps in rounds for step in steps for row in step) == list(range(12))
    assert step_rows(trainer, [5] * 12, 0, 0, "b") != rounds[0]


def test_epochs_and_tokens() -> None:
    steps = step_rows(Trainer(epochs=2, batch=4), [5] * 10, 0, 0, "a")
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    trainer = Trainer(tokens=100, batch=2)
    lengths = [3 + i for i in range(10)]
    total = sum(lengths[r] for t in range(7) for step in step_rows(trainer, lengths, 0, t, "a") for r in step)
    assert abs(total - 700) <= 12  # half a step: what is left over in one round is made up for in the next
    assert Trainer(tokens=5).steps is None
    with pytest.raises(ValueError, match="exactly one"):
        Trainer(steps=3, epochs=1)
    with pytest.raises(ValueError, match="exactly one"):
        Trainer(steps=None)


def test_more_batch_than_rows() -> None:
    assert [len(step) for step in step_rows(Trainer(steps=3, batch=64), [5] * 10, 0, 0, "a")] == [10, 10, 10]


@pytest.mark.parametrize("packed", [False, True])
def test_passes_stay_within_the_limit(packed: bool) -> None:
    lengths = [50, 10, 30, 20, 400, 10]
    steps = [[(row, lengths[row]) for row in rows] for rows in ((0, 2, 4), (1, 3, 5))]
    cut = passes(steps, 100, packed=packed)
    assert sorted(row for one in cut for client in one for row in client) == list(range(6))
    for one in cut:
        taken = [lengths[row] for client in one for row in client]
        assert len(taken) == 1 or (sum(taken) if packed else len(taken) * max(taken)) <= 100
        assert all(row in {r for r, _ in step} for step, client in zip(steps, one, strict=True) for row in client)


def test_only_what_is_trainable_moves() -> None:
    fitted, start = _fit(Trainer(steps=2, batch=2, lr=0.1), {"trainable": lambda name: name.endswith("lora_B")})
    for name, value in fitted.params.items():
        assert torch.equal(value, start[name]) == name.endswith("lora_A"), name


def test_corrections_enter_where_they_say() -> None:
    trainer = Trainer(steps=1, batch=2, lr=0.5, optimizer=Sgd(), clip_norm=None)
    plain, start = _fit(trainer)
    ones = {name: torch.ones_like(t) for name, t in start.items()}
    for where in ("gradient", "weights"):
        moved, _ = _fit(trainer, {"correct": Correction(ones, where)})
        for name in start:  # with plain SGD the two are the same step
            torch.testing.assert_close(moved.params[name], plain.params[name] - 0.5, rtol=0, atol=1e-12)


def test_penalty_is_differentiated() -> None:
    trainer = Trainer(steps=1, batch=2, lr=1.0, optimizer=Sgd(), clip_norm=None)
    plain, start = _fit(trainer)
    pulled, _ = _fit(trainer, {"penalty": lambda w: sum(3.0 * t.sum() for t in w.values())})
    for name in start:
        torch.testing.assert_close(pulled.params[name], plain.params[name] - 3.0, rtol=0, atol=1e-12)


def test_clipping_bounds_a_step() -> None:
    trainer = Trainer(steps=1, batch=4, lr=1.0, optimizer=Sgd(), clip_norm=1e-3)
    fitted, start = _fit(trainer)
    moved = sum(float((fitted.params[n] - start[n]).square().sum()) for n in start) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-4)


def test_dropout_takes_the_clients_stream() -> None:
    trainer = Trainer(steps=2, batch=10, lr=1e-2)
    torch.manual_seed(1)
    first, _ = _fit(trainer, dropout=0.5)
    torch.manual_seed(2)
    again, _ = _fit(trainer, dropout=0.5)
    other, _ = _fit(trainer, dropout=0.5, client="b")
    none, _ = _fit(trainer)
    _close(first, again, 0.0)
    assert first.losses[1] != other.losses[1]
    assert first.losses[1] != none.losses[1]


def test_training_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.random.get_rng_state()
    _fit(Trainer(steps=1, batch=2), dropout=0.2)
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_bf16_base_with_fp32_adapter() -> None:
    fitted, _ = _fit(Trainer(steps=3, batch=4, lr=1e-2), dtype=torch.bfloat16)
    exact, _ = _fit(Trainer(steps=3, batch=4, lr=1e-2))
    assert all(t.dtype == torch.float32 for t in fitted.params.values())
    assert fitted.losses == pytest.approx(exact.losses, rel=2e-2)


def test_scores_add_up_and_ignore_padding() -> None:
    bench, rows = _bench(Trainer()), _rows()
    whole = score(bench, rows, None).scalars
    parts = [score(bench, Rows(rows.encoded, rows.indices[i : i + 1]), None).scalars for i in range(len(rows))]
    for name in ("nll", "tokens", "bytes", "examples"):
        assert sum(part[name] for part in parts) == pytest.approx(whole[name], abs=1e-9)


def test_loss_is_cross_entropy_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=stream, dtype=torch.float64, requires_grad=True)
    head = torch.randn(6, 9, generator=stream, dtype=torch.float64)
    labels = torch.randint(0, 9, (11,), generator=stream)
    weights = torch.rand(11, generator=stream, dtype=torch.float64)
    monkeypatch.setattr("fedloom.client.objectives.LOGIT_ROWS", 4)
    ours = nll(lambda h: h @ head, hidden, labels)
    expected = functional.cross_entropy(hidden @ head, labels, reduction="none")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)
    (mine,) = torch.autograd.grad((ours * weights).sum(), hidden)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), hidden)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("packed", [False, True])
def test_collate_finds_the_labels(packed: bool) -> None:
    rows = _rows(4)
    clients = [[rows[0], rows[1]], [], [rows[2], rows[3]]]
    batch = collate(clients, torch.device("cpu"), packed=packed)
    flat = batch.ids.flatten()
    assert sum(batch.spans) == len(flat)
    assert batch.spans[1] == batch.terms[1] == 0
    expected = [int(t) for row in (rows[i] for i in range(4)) for t in row.ids[1:][row.train[1:]]]
    assert batch.labels.tolist() == expected
    before = [int(t) for row in (rows[i] for i in range(4)) for t in row.ids[:-1][row.train[1:]]]
    assert flat[batch.at].tolist() == before


def test_schedules() -> None:
    assert [Constant().factor(t, 4) for t in range(4)] == [1.0] * 4
    assert [WarmUp(warmup=3).factor(t, 8) for t in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = [Cosine(warmup=1, floor=0.1).factor(t, 5) for t in range(5)]
    assert cosine[:2] == [0.5, 1.0]
    assert cosine[1:] == sorted(cosine[1:], reverse=True)
    assert cosine[-1] > 0.1
    slow, _ = _fit(Trainer(steps=1, lr=1e-2, schedule=WarmUp(warmup=9)))
    assert slow.lr == pytest.approx(1e-3)


def test_optimizers_take_their_options() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    assert AdamW(weight_decay=0.1).build([p], 1e-3).param_groups[0]["weight_decay"] == 0.1
    assert Sgd(momentum=0.9).build([p], 1e-3).param_groups[0]["momentum"] == 0.9


def test_steps_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    bench = _bench(Trainer(steps=2, batch=2), on_step=lambda *one: told.append(one))
    fit(bench, [Job("a", 0, _rows(), Fit(bench.attached.init(0, torch.float64)))])
    assert [one[0] for one in told] == ["a", "a"]
    assert loop.SCORE_TOKENS > 0
