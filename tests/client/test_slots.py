"""Several LoRA adapters in one forward: the same as a naive forward, as one adapter, and as client after client."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from torch.nn import functional

from fedloom import cost, slots
from fedloom.client.adapters import Lora
from fedloom.client.fit import Job, fit, losses, score
from fedloom.client.generate import answers
from fedloom.client.lora import Beside
from fedloom.client.objectives import Sft
from fedloom.client.optimizers import AdamW, Sgd
from fedloom.client.trainer import Bench, Rows, Trainer
from fedloom.data.encode import Encoded
from fedloom.types import Fit, ModelError, Tensors

ALPHA = 6.0
PLAIN = Trainer(optimizer=Sgd(), clip_norm=None, lr=1.0, steps=1, batch=5)
RANKS = (3, 2, 4)


def _bench(trainer: Trainer = PLAIN, dtype: torch.dtype = torch.float64, dropout: float = 0.0, **how: Any) -> Bench:
    model = tiny_model(dtype).requires_grad_(False)
    attached = Lora(r=RANKS[0], alpha=ALPHA, dropout=dropout).attach(model, how.get("reference", False))
    return Bench(model, attached, Sft(), trainer, 0, 10, **how)


def _rows(seed: int = 0, count: int = 5) -> Rows:
    stream = np.random.default_rng(seed)
    lengths = stream.integers(6, 20, count)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = stream.integers(3, 250, starts[-1]).astype(np.int32)
    train = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    return Rows(Encoded(ids, train, starts, lengths), np.arange(count))


def _adapter(bench: Bench, seed: int, rank: int) -> dict[str, Tensor]:
    stream, dtype = torch.Generator().manual_seed(seed), torch.promote_types(bench.model.dtype, torch.float32)
    shapes = {n: (rank, s[1]) if n.endswith("lora_A") else (s[0], rank) for n, s in bench.attached.shapes().items()}
    return {n: (torch.randn(s, generator=stream, dtype=torch.float64) * 0.1).to(dtype) for n, s in shapes.items()}


def _routers(bench: Bench, seed: int, count: int) -> dict[str, Tensor]:
    stream, dtype = torch.Generator().manual_seed(seed), torch.promote_types(bench.model.dtype, torch.float32)
    return {
        f"{module}.router": (0.5 * torch.randn(count, layer.d_in, generator=stream, dtype=torch.float64)).to(dtype)
        for module, layer in bench.attached.layers.items()
    }


def _mixture(bench: Bench, kind: str, seed: int = 0, ranks: tuple[int, ...] = RANKS) -> dict[str, Tensor]:
    several = [_adapter(bench, 10 * seed + i, rank) for i, rank in enumerate(ranks)]
    if kind == "routed":
        return slots.routed(*several, routers=_routers(bench, seed, len(ranks)))
    return slots.beside(*several, weights=(0.5, 0.3, -0.4)[: len(ranks)] if kind == "mixed" else None)


def _naive_losses(params: Mapping[str, Tensor], rows: Rows) -> Tensor:
    """Return the summed loss of each row by a forward of its own: every slot apart, token by token, no batches."""
    model, hooks = tiny_model(torch.float64).requires_grad_(False), []

    def low_rank(module: str, x: Tensor) -> Tensor:
        count = slots.count(params)
        if f"{module}.router" in params:
            weights = [torch.exp(x @ row) for row in params[f"{module}.router"]]
            weights = [one / sum(weights) for one in weights]
        else:
            mix = params.get(f"{module}.mix", torch.ones(count, dtype=torch.float64))
            weights = [mix[i].expand(x.shape[:-1]) for i in range(count)]
        total: Any = 0
        for i in range(count):
            own = slots.slot(params, i)
            a, b = own[f"{module}.lora_A"], own[f"{module}.lora_B"]
            total = total + weights[i][..., None] * (ALPHA / len(a)) * ((x @ a.T) @ b.T)
        return total

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and f"{name}.lora_A" in params:
            add = lambda _, given, out, name=name: out + low_rank(name, given[0])
            hooks.append(layer.register_forward_hook(add))
    found = []
    for i in range(len(rows)):
        row = rows[i]
        logits = model(input_ids=row.ids[None].long()).logits[0, :-1]
        kept = row.train[1:]
        found.append(functional.cross_entropy(logits[kept], row.ids[1:].long()[kept], reduction="sum"))
    return torch.stack(found)


def _near(a: Tensors, b: Tensors, atol: float = 1e-11) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["plain", "mixed", "routed"])
@pytest.mark.parametrize("reference", [False, True])
def test_losses_equal_a_naive_forward(kind: str, reference: bool) -> None:
    bench, rows = _bench(reference=reference), _rows()
    params = _mixture(bench, kind)
    naive = _naive_losses(params, rows)
    torch.testing.assert_close(losses(bench, rows, params).tensors["nll"], naive, rtol=1e-11, atol=0)
    assert score(bench, rows, params).scalars["nll"] == pytest.approx(float(naive.sum()), rel=1e-11)


MOVES = {"main": slots.is_main, "others": lambda name: not slots.is_main(name), "all": None}


@pytest.mark.parametrize("kind", ["plain", "mixed", "routed"])
@pytest.mark.parametrize("moving", list(MOVES))
def test_gradients_equal_those_of_a_naive_forward(kind: str, moving: str) -> None:
    bench, rows = _bench(), _rows()
    params, moves = _mixture(bench, kind), MOVES[moving]
    leaves = {name: t.clone().requires_grad_(True) for name, t in params.items()}
    (_naive_losses(leaves, rows).sum() / sum(rows.labels())).backward()
    ended = fit(bench, [Job("a", 0, rows, Fit(params, moves))])[0].params
    assert ended.keys() == params.keys()
    for name, t in params.items():
        if moves is not None and not moves(name):
            assert torch.equal(ended[name], t), name
        else:  # one plain step with learning rate 1
            torch.testing.assert_close(t - ended[name], leaves[name].grad, rtol=0, atol=1e-12, msg=name)
            assert float(leaves[name].grad.abs().max()) > 0, name


@pytest.mark.parametrize("weights", [None, (0.25, 2.0, -1.0)])
def test_a_mixture_is_one_adapter_of_the_summed_rank(weights: tuple[float, ...] | None) -> None:
    bench, rows = _bench(), _rows()
    several = [_adapter(bench, i, rank) for i, rank in enumerate(RANKS)]
    params = slots.beside(*several, weights=weights)
    one = slots.collapsed(params, bench.attached.scale)
    assert not slots.is_mixture(one)
    assert {len(t) for name, t in one.items() if name.endswith("lora_A")} == {sum(RANKS)}
    both = [losses(bench, rows, given).tensors["nll"] for given in (params, one)]
    torch.testing.assert_close(*both, rtol=1e-12, atol=0)
    assert slots.collapsed(several[0], bench.attached.scale) is several[0]
    merged = [bench.attached.merged(bench.model, given) for given in (params, one)]
    _near(*merged, atol=1e-12)


@pytest.mark.parametrize("kind", ["mixed", "routed"])
def test_answers_equal_those_of_one_adapter(kind: str) -> None:
    bench, tokenizer = _bench(), tiny_tokenizer()
    several = [_adapter(bench, i, rank) for i, rank in enumerate(RANKS)]
    prompts = ["one and two", "a", "What is it?"]
    if kind == "mixed":
        params: Tensors = slots.beside(*several, weights=(0.5, 3.0, 1.0))
        plain = slots.collapsed(params, bench.attached.scale)
    else:  # a router that does not look at the token is a mean
        routers = {name: torch.zeros_like(t) for name, t in _routers(bench, 0, 3).items()}
        params = slots.routed(*several, routers=routers)
        plain = slots.collapsed(slots.beside(*several, weights=(1 / 3,) * 3), bench.attached.scale)
    told = []
    for given in (params, plain, several[0]):
        bench.attached.load([given])
        told.append(answers(bench.model, tokenizer, prompts, 12))
    assert told[0] == told[1] != told[2]


@pytest.mark.parametrize("kind", ["plain", "mixed", "routed"])
@pytest.mark.parametrize(("packing", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_a_cohort_equals_one_after_another(kind: str, packing: bool, dropout: float) -> None:
    trainer = Trainer(optimizer=AdamW(), lr=1e-2, steps=3, batch=3, packing=packing)
    bench = _bench(trainer, dropout=dropout)
    ranks = [(3, 2), (1, 4), (3, 3)]  # of the slots of each client
    jobs = lambda: [
        Job(name, 1, _rows(k, 4 + k), Fit(_mixture(bench, kind, k, ranks[k]), MOVES["main"]))
        for k, name in enumerate("abc")
    ]
    alone, together = [fit(bench, [job])[0] for job in jobs()], fit(bench, jobs())
    for one, other in zip(alone, together, strict=True):
        _near(one.params, other.params)
        assert one.losses == pytest.approx(other.losses, abs=1e-12)
        assert one.tokens == other.tokens


@pytest.mark.parametrize("kind", ["mixed", "routed"])
def test_the_reference_computes_the_same(kind: str) -> None:
    trainer = Trainer(optimizer=AdamW(), lr=1e-2, steps=3, batch=3)
    fits = []
    for reference in (False, True):
        bench = _bench(trainer, reference=reference)
        fits.append(fit(bench, [Job("a", 0, _rows(), Fit(_mixture(bench, kind)))])[0])
    _near(fits[0].params, fits[1].params)


def test_dropout_drops_the_same_inputs_of_all_slots() -> None:
    """With equal adapters in all slots, weights that sum to one leave nothing of the mixture."""
    trainer = Trainer(optimizer=Sgd(), clip_norm=None, lr=1e-2, steps=1, batch=5)
    bench = _bench(trainer, dropout=0.4)
    one = _adapter(bench, 0, 3)
    several = [one, slots.beside(one, one, weights=(0.3, 0.7)), slots.routed(one, one, routers=_routers(bench, 0, 2))]
    found = [fit(bench, [Job("a", 0, _rows(), Fit(given))])[0].losses[0] for given in several]
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    assert found[0] == pytest.approx(found[2], abs=1e-12)


def test_a_plain_adapter_follows_a_mixture_in_the_same_layers() -> None:
    bench, rows = _bench(), _rows()
    main = _adapter(bench, 0, 3)
    before = score(bench, rows, main).scalars["nll"]
    score(bench, rows, _mixture(bench, "routed"))
    assert score(bench, rows, main).scalars["nll"] == before
    assert score(bench, rows, slots.beside(main, main, weights=(1.0, 0.0))).scalars["nll"] == pytest.approx(before)


def test_router_weights_are_in_float32_at_least() -> None:
    stream = torch.Generator().manual_seed(0)
    router = torch.randn(1, 2, 8, generator=stream)
    beside = Beside([(torch.zeros(1, 3, 8), torch.zeros(1, 4, 3))], [torch.ones(1, 1, 1)], None, router)
    x = torch.randn(5, 8, generator=stream).bfloat16()
    weights = beside.weights(x, 0, 2)
    assert weights.dtype == torch.float32
    assert weights.shape == (5, 2 + 3)
    naive = torch.softmax(x.float() @ router[0].bfloat16().float().T, -1)
    torch.testing.assert_close(weights[:, [0, 4]], naive, rtol=0.02, atol=0.02)
    torch.testing.assert_close(weights[:, 0] + weights[:, 4], torch.ones(5))


def test_what_does_not_fit_is_refused() -> None:
    bench = _bench()
    params = _mixture(bench, "routed")
    with pytest.raises(ValueError, match="a router weighs the slots token by token"):
        slots.collapsed(params, bench.attached.scale)
    with pytest.raises(ModelError, match="cannot be merged into the weights: a router weighs"):
        bench.attached.merged(bench.model, params)
    module = slots.modules(params)[0]
    for name in (f"{module}.router", f"{module}.slot1.lora_A"):
        odd = {**params, name: params[name][:, :-1]}
        with pytest.raises(ModelError, match=name.replace(".", r"\.") + " has shape"):
            bench.attached.check(odd)
    lacking = {name: t for name, t in params.items() if name != f"{module}.slot2.lora_B"}
    with pytest.raises(ModelError, match="missing 1, such as"):
        bench.attached.check(lacking)


def test_names() -> None:
    bench = _bench()
    params = _mixture(bench, "routed")
    assert slots.count(params) == 3
    several = [_adapter(bench, i, rank) for i, rank in enumerate(RANKS)]
    for i, one in enumerate(several):
        _near(slots.slot(params, i), one, 0.0)
    _near(slots.main(params), several[0], 0.0)
    assert set(filter(slots.is_main, params)) == set(several[0])
    assert slots.modules(params) == slots.modules(several[0]) == list(bench.attached.layers)


@pytest.mark.parametrize("kind", ["mixed", "routed"])
def test_saved_mixtures_mean_the_same_when_read(tmp_path: Path, kind: str) -> None:
    bench, rows = _bench(), _rows()
    params = _mixture(bench, kind)
    bench.attached.save(tmp_path / "a", params, "tiny")
    read = Lora(r=RANKS[0], alpha=ALPHA).read(tmp_path / "a")
    both = [losses(bench, rows, given).tensors["nll"] for given in (params, read)]
    torch.testing.assert_close(*both, rtol=1e-12, atol=0)
    if kind == "routed":
        _near(read, params, 0.0)
        own = Lora(r=RANKS[0], alpha=ALPHA).read(tmp_path / "a" / "slot0")
        _near(own, slots.main(params), 0.0)
    else:
        assert slots.count(read) == 1


def test_the_router_sees_what_dropout_does_not_touch() -> None:
    trainer = Trainer(optimizer=Sgd(), clip_norm=None, lr=1e-2, steps=1, batch=5)
    bench, rows = _bench(trainer, dropout=0.5), _rows()
    seen: list[Tensor] = []
    real = Beside.weights

    def weights(self: Beside, x: Tensor, k: int, rank: int) -> Tensor:
        seen.append(x)
        return real(self, x, k, rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Beside, "weights", weights)
        fit(bench, [Job("a", 0, rows, Fit(_mixture(bench, "routed")))])
    assert seen
    assert not any(bool((x == 0).any()) for x in seen)


def test_a_slot_costs_what_a_higher_rank_costs() -> None:
    bench = _bench()
    shapes = cost.shapes_of(bench.model, bench.attached)
    several = [_adapter(bench, i, rank) for i, rank in enumerate(RANKS)]
    mixed = Fit(slots.beside(*several, weights=(1.0, 2.0, 3.0)))
    one = Fit(slots.collapsed(mixed.start, bench.attached.scale))
    assert cost.of_rows(shapes, mixed, [7, 9], [3, 4]) == cost.of_rows(shapes, one, [7, 9], [3, 4])
