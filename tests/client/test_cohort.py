"""Many clients in one pass: the same as one after another; packed rows: the same as padded ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
)

from fedloom.client.adapters import Lora
from fedloom.client.attention import can_pack
from fedloom.client.fit import Job, fit, score
from fedloom.client.lora_sb import LoraSb, is_core
from fedloom.client.objectives import Sft
from fedloom.client.optimizers import AdamW, Sgd
from fedloom.client.trainer import Bench, Rows, Trainer
from fedloom.data.encode import Encoded
from fedloom.types import Correction, Fit, Fitted

NAMES = ("a", "b", "c", "d")


def _rows(shared: int = 0) -> dict[str, Rows]:
    """Return four clients' rows: 7, 5, 9 and 3 of them, of 6 to 19 tokens, the first `shared` the same in all."""
    stream = np.random.default_rng(0)
    lengths = stream.integers(6 + shared, 20 + shared, 24)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = stream.integers(3, 250, starts[-1]).astype(np.int32)
    for start in starts[:-1]:
        ids[start : start + shared] = np.arange(shared) + 3
    train = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    encoded = Encoded(ids, train, starts, lengths)
    cuts = np.split(np.arange(24), [7, 12, 21])
    return {name: Rows(encoded, indices) for name, indices in zip(NAMES, cuts, strict=True)}


def _bench(trainer: Trainer, dtype: torch.dtype = torch.float64, r: int = 3, dropout: float = 0.0) -> Bench:
    model = tiny_model(dtype).requires_grad_(False)
    return Bench(model, Lora(r=r, alpha=6, dropout=dropout).attach(model), Sft(), trainer, 0, 10)


def _start(bench: Bench, k: int, r: int | None = None) -> dict[str, torch.Tensor]:
    stream, dtype = torch.Generator().manual_seed(k), torch.promote_types(bench.model.dtype, torch.float32)
    shapes = bench.attached.shapes()
    if r is not None:
        shapes = {n: (r, s[1]) if n.endswith("lora_A") else (s[0], r) for n, s in shapes.items()}
    return {n: (torch.randn(s, generator=stream) * 0.1).to(dtype) for n, s in shapes.items()}


def _both(trainer: Trainer, effects: Any = None, shared: int = 0, **changes: Any) -> tuple[list[Fitted], list[Fitted]]:
    """Return the clients' fits one after another, and all in one pass."""
    bench, rows = _bench(trainer, **changes), _rows(shared)
    jobs = lambda: [
        Job(n, 1, rows[n], effects(bench, k) if effects else Fit(_start(bench, k))) for k, n in enumerate(NAMES)
    ]
    return [fit(bench, [job])[0] for job in jobs()], fit(bench, jobs())


def _worst(one: list[Fitted], other: list[Fitted]) -> float:
    assert [f.steps for f in one] == [f.steps for f in other]
    assert [f.tokens for f in one] == [f.tokens for f in other]
    return max(
        float((a.params[n] - b.params[n]).abs().max()) for a, b in zip(one, other, strict=True) for n in a.params
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro_tokens", [16, 1024])
@pytest.mark.parametrize("length", [{"steps": 3}, {"epochs": 2}])
def test_a_cohort_equals_one_after_another(packing: bool, micro_tokens: int, length: dict[str, int]) -> None:
    for batch in (1, 4):
        trainer = Trainer(**length, batch=batch, lr=1e-2, micro_tokens=micro_tokens, packing=packing)
        apart, together = _both(trainer)
        assert _worst(apart, together) < 1e-10
        for one, other in zip(apart, together, strict=True):
            assert one.losses == pytest.approx(other.losses, abs=1e-12)
            assert one.losses[0] != one.losses[-1]


def test_in_float32_with_sgd() -> None:
    trainer = Trainer(steps=4, batch=2, lr=1e-1, optimizer=Sgd(momentum=0.5), packing=True)
    assert _worst(*_both(trainer, dtype=torch.float32)) < 1e-5


def test_in_bf16_the_loss_is_near() -> None:
    apart, together = _both(Trainer(steps=8, batch=4, lr=1e-3, packing=True), dtype=torch.bfloat16)
    mean = [np.mean([f.losses[-1] for f in fits]) for fits in (apart, together)]
    assert mean[0] == pytest.approx(mean[1], rel=2e-3)


def test_a_cohort_equals_itself_bit_for_bit() -> None:
    trainer = Trainer(epochs=1, batch=2, lr=1e-2, packing=True)
    first, again = (_both(trainer, dtype=torch.float32)[1] for _ in range(2))
    assert _worst(first, again) == 0.0


def test_penalties_corrections_and_clipping_are_each_clients_own() -> None:
    def effects(bench: Bench, k: int) -> Fit:
        start = _start(bench, k)
        direction = {n: torch.full_like(t, 0.01 * k) for n, t in start.items() if n.endswith("lora_B")}
        where: Any = ("gradient", "weights")[k % 2]
        return Fit(
            start, None, lambda w: k * sum(((w[n] - start[n]) ** 2).sum() for n in w), Correction(direction, where)
        )

    for optimizer in (AdamW(weight_decay=0.1), Sgd(momentum=0.9)):
        trainer = Trainer(steps=3, batch=2, lr=1e-2, optimizer=optimizer, clip_norm=0.05, packing=True)
        assert _worst(*_both(trainer, effects)) < 1e-10


def test_what_does_not_move_stays() -> None:
    trainer = Trainer(steps=2, batch=2, lr=1e-1, optimizer=AdamW(weight_decay=0.5))
    effects = lambda bench, k: Fit(_start(bench, k), trainable=lambda name: name.endswith("lora_B"))
    apart, together = _both(trainer, effects)
    assert _worst(apart, together) < 1e-10
    start = _start(_bench(trainer), 2)
    assert all(torch.equal(v, start[n]) == n.endswith("lora_A") for n, v in together[2].params.items())


def test_mixed_ranks_are_padded_and_come_back_in_their_own() -> None:
    ranks = (1, 3, 2, 5)
    trainer = Trainer(steps=3, batch=2, lr=1e-2, optimizer=AdamW(weight_decay=0.1), packing=True)
    apart, together = _both(trainer, lambda bench, k: Fit(_start(bench, k, ranks[k])))
    assert _worst(apart, together) < 1e-10
    for fitted, r in zip(together, ranks, strict=True):
        assert {t.shape[0] for n, t in fitted.params.items() if n.endswith("lora_A")} == {r}


@pytest.mark.parametrize(("packing", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_a_core_between_frozen_factors(packing: bool, dropout: float) -> None:
    """One after another, all in one pass, and by the plain arithmetic: the same; only R moves."""
    trainer = Trainer(steps=3, batch=2, lr=1e-2, optimizer=AdamW(weight_decay=0.1), packing=packing)
    fits = []
    for reference, cohort in ((False, False), (False, True), (True, False)):
        model = tiny_model(torch.float64).requires_grad_(False)
        attached = LoraSb(r=3, dropout=dropout).attach(model, reference)
        bench = Bench(model, attached, Sft(), trainer, 0, 10, reference)
        starts = [attached.init(k, torch.float64) for k in range(len(NAMES))]
        jobs = [Job(n, 1, _rows()[n], Fit(starts[k])) for k, n in enumerate(NAMES)]
        fits.append(fit(bench, jobs) if cohort else [fit(bench, [job])[0] for job in jobs])
    assert _worst(fits[0], fits[1]) < 1e-10
    if not dropout:  # masks are drawn for a pass's rows, which the reference orders in another way
        assert _worst(fits[0], fits[2]) < 1e-6
    for fitted, start in zip(fits[1], starts, strict=True):
        assert all(torch.equal(v, start[n]) != is_core(n) for n, v in fitted.params.items())


def test_a_loss_that_is_not_finite_ends_one_client_alone() -> None:
    def effects(bench: Bench, k: int) -> Fit:
        start = _start(bench, k)
        return Fit({n: t * float("nan") if k == 1 else t for n, t in start.items()})

    apart, together = _both(Trainer(steps=3, batch=2, lr=1e-2, packing=True), effects)
    assert [f.steps for f in together] == [3, 0, 3, 3]
    assert np.isnan(together[1].losses[0])
    for k in (0, 2, 3):
        assert _worst([apart[k]], [together[k]]) < 1e-10


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, _ = _both(Trainer(steps=2, batch=3, lr=1e-2, packing=True))
    kept, together = _both(Trainer(steps=2, batch=3, lr=1e-2, packing=True, checkpointing=True))
    assert _worst(plain, kept) == 0.0
    assert _worst(plain, together) < 1e-10


def test_zeroth_order_in_a_cohort_and_without_a_graph() -> None:
    trainer = Trainer(steps=3, batch=2, lr=1e-2, optimizer=Sgd(), clip_norm=None, packing=True)
    effects = lambda bench, k: Fit(_start(bench, k), order="zeroth")
    apart, together = _both(trainer, effects)
    assert _worst(apart, together) < 1e-9
    assert all(len(f.slopes) == 3 and f.slopes[0] != f.slopes[1] for f in together)


def test_the_zeroth_order_slope_is_the_directional_derivative() -> None:
    trainer = Trainer(steps=1, batch=4, lr=1.0, optimizer=Sgd(), clip_norm=None)
    bench, rows = _bench(trainer), _rows()["a"]
    start = _start(bench, 0)
    first = fit(bench, [Job("a", 0, rows, Fit(start))])[0]
    zeroth = fit(bench, [Job("a", 0, rows, Fit(start, order="zeroth", epsilon=1e-3))])[0]
    slope = zeroth.slopes[0]
    direction = {n: (start[n] - zeroth.params[n]) / slope for n in start}
    gradient = {n: start[n] - first.params[n] for n in start}
    assert slope == pytest.approx(float(sum((gradient[n] * direction[n]).sum() for n in start)), rel=5e-3)
    assert float(torch.cat([d.flatten() for d in direction.values()]).std()) == pytest.approx(1.0, abs=0.1)


def test_dropout_draws_from_each_clients_own_stream() -> None:
    trainer = Trainer(steps=2, batch=2, lr=1e-2, packing=True)
    apart, together = _both(trainer, dropout=0.3, shared=9)
    assert _worst(apart, together) < 1e-10


@pytest.mark.parametrize("shared", [0, 3, 9])
def test_packed_rows_train_as_padded_ones(shared: int) -> None:
    fits = [_both(Trainer(steps=3, batch=4, lr=1e-2, packing=packing), shared=shared)[0] for packing in (False, True)]
    # transformers' norms compute in float32 whatever the model's dtype, so a rounding may go the other way
    assert _worst(*fits) < 1e-6
    scores = []
    for packing in (False, True):
        bench = _bench(Trainer(packing=packing))
        scores.append(score(bench, _rows(shared)["c"], _start(bench, 1)).scalars)
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_long_rows_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """A row in one piece, in pieces of four tokens, and padded: the same, also where a token sees only five."""
    fits = []
    for packing, tokens in ((False, 256), (True, 256), (True, 4)):
        monkeypatch.setattr("fedloom.client.batches.PIECE_TOKENS", tokens)
        trainer = Trainer(steps=2, batch=3, lr=1e-2, optimizer=Sgd(), packing=packing)
        model = tiny_model(torch.float64) if window is None else _windowed(window)
        bench = Bench(model.requires_grad_(False), Lora(r=3).attach(model), Sft(), trainer, 0, 10)
        fits.append(fit(bench, [Job("c", 0, _rows(9)["c"], Fit(_start(bench, 0)))]))
    assert _worst(fits[0], fits[1]) < 1e-6
    assert _worst(fits[0], fits[2]) < 1e-6


def _windowed(window: int) -> MistralForCausalLM:
    llama = tiny_model(torch.float64)
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {key: getattr(llama.config, key) for key in (*keys, "num_key_value_heads", "tie_word_embeddings")}
    with torch.random.fork_rng(devices=[]):
        model = MistralForCausalLM(MistralConfig(sliding_window=window, **shape)).double().eval()
    model.load_state_dict(llama.state_dict())
    return model


@pytest.mark.parametrize(("config", "able"), [(MistralConfig, True), (Gemma2Config, False), (MambaConfig, False)])
def test_which_models_can_be_packed(config: Any, able: bool) -> None:
    """Gemma 2 caps its scores and Mamba has no attention: they keep the padded layout."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    if config is not MambaConfig:
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        assert can_pack(AutoModelForCausalLM.from_config(config(**sizes)).eval()) == able
