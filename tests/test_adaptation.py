"""Some steps of every client before it is measured: what they are, and that nothing of them is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers import adapter, run, same

from fedloom.client import fit
from fedloom.client.trainer import Bench
from fedloom.runtime import effects
from fedloom.types import Tensors

CHANGES = {"data": {"unseen": 0.34}, "evaluate": ["loss"], "trainer": {"schedule": "cosine"}}


def test_adapted_regimes_are_beside_the_others_and_touch_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    plain = run(tiny_folder, tmp_path / "plain", **CHANGES)
    adapted = run(tiny_folder, tmp_path / "adapted", **CHANGES, adapt_steps=2)
    assert same(adapter(plain), adapter(adapted))
    beside = {"federated adapted", "unseen adapted"}
    assert adapted.metrics.keys() == plain.metrics.keys() | beside
    assert all(adapted.metrics[name] == plain.metrics[name] for name in plain.metrics)
    for name in beside:
        assert adapted.metrics[name]["loss"]["loss"] != plain.metrics[name.removesuffix(" adapted")]["loss"]["loss"]


def test_the_steps_are_on_own_rows_from_the_own_adapter(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Tensors, list[int], float]] = []
    real = fit.fit

    def noted(bench: Bench, jobs: list[fit.Job]) -> list[object]:
        done = real(bench, jobs)
        for job, fitted in zip(jobs, done, strict=True):
            seen.append((job.client, job.effect.start, list(job.effect.steps or ()), fitted.lr))
        return list(done)

    monkeypatch.setattr(effects.fit, "fit", noted)
    result = run(tiny_folder, tmp_path / "r", **CHANGES, adapt_steps=2, adapt_lr=5e-4)
    after = {name.removeprefix("base_model.model.").removesuffix(".weight"): t for name, t in adapter(result).items()}
    ours = [one for one in seen if one[2]]
    # two that trained and one that did not, once for each of the two regimes
    assert sorted(client for client, *_ in ours) == ["client-1", "client-2", "client-3"]
    for _, start, steps, lr in ours:
        assert (steps, lr) == ([0, 1], 5e-4)
        assert all(torch.equal(start[name], after[name]) for name in after)


def test_steps_too_small_to_matter_change_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    found = run(tiny_folder, tmp_path / "r", **CHANGES, adapt_steps=1, adapt_lr=1e-12).metrics
    assert found["unseen adapted"]["loss"]["loss"] == pytest.approx(found["unseen"]["loss"]["loss"], rel=1e-6)
