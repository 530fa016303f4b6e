"""QLoRA end to end: runs on a quantised base learn, repeat, and may merge into the base, whose weights stay packed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.helpers import adapter, run, same

KINDS = [
    "int8",
    pytest.param("nf4", marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["fedavg", "flora"])
def test_a_run_on_a_quantised_base(tiny_folder: Path, tmp_path: Path, kind: str, algorithm: str) -> None:
    """The loss falls, the run repeats bit for bit, and what was merged counts: the loss is that of `adapter/`."""
    short = {"rounds": 2, "evaluate": ["loss"], "sampler": {"count": 2}}
    changes = {"model": {"quantize": kind}, "algorithm": algorithm, **short}
    first = run(tiny_folder, tmp_path / "a", **changes)
    again = run(tiny_folder, tmp_path / "b", **changes)
    assert same(adapter(first), adapter(again))
    loss = {regime: found["loss"]["loss"] for regime, found in first.metrics.items()}
    assert loss["federated"] < loss["base"]
    plain = run(tiny_folder, tmp_path / "c", **{**changes, "model": {"quantize": "none"}})
    assert not same(adapter(first), adapter(plain))
    # the summed adapter on the quantised base gives the loss that the run reports
    ranks = json.loads((first.folder / "adapter" / "adapter_config.json").read_text())
    init = {"init": str(first.folder / "adapter"), "adapter": {"r": ranks["r"], "alpha": ranks["lora_alpha"]}}
    still = {**changes, "algorithm": "fedavg", "rounds": 1, "trainer": {"lr": 1e-12}}
    started = run(tiny_folder, tmp_path / "d", **still, **init)
    torch.testing.assert_close(started.metrics["federated"]["loss"]["loss"], loss["federated"], rtol=1e-4, atol=1e-4)
