"""Operations: the formulas against torch's counter on real passes; energy: real files of counters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import lines, run
from tests.tiny import tiny_model, tiny_model_folder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from fedloom import cost, energy
from fedloom.client.adapters import Lora
from fedloom.client.attached import Attached
from fedloom.client.batches import collate
from fedloom.client.objectives import Sft
from fedloom.data.encode import Example
from fedloom.types import Fit

aten = torch.ops.aten
FORMULAS = {**flop_registry, aten.addmm_: flop_registry[aten.addmm], aten.baddbmm_: flop_registry[aten.baddbmm]}
"""torch's own, which do not know the two operators in their in-place form."""


class Counter(TorchDispatchMode):
    """torch's formulas for its operators; its own `FlopCounterMode` hooks modules, which `autograd.grad` refuses."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in FORMULAS and func is not torch.ops.prim.device.default:
            with self:  # in inference mode torch does not take composed operators apart by itself
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def counted(model: PreTrainedModel, attached: Attached, lengths: list[int], labels: int, backward: bool = True) -> int:
    """Return what torch counts of one padded pass a row, the logits of `labels` positions each."""
    total = 0
    for length in lengths:
        train = torch.arange(length) >= length - labels
        batch = collate([[Example(torch.arange(length) % 200 + 5, train)]], model.device, packed=False)
        stack = attached.load([attached.init(0)])
        with Counter() as counter, torch.set_grad_enabled(backward):
            loss = Sft().losses(model, batch).sum()
            if backward:
                stack.backward(loss)
        total += counter.total
    return total


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
def test_the_formula_is_what_torch_counts(targets: str | list[str]) -> None:
    model = tiny_model().requires_grad_(False)
    model.set_attn_implementation("eager")
    attached = Lora(r=4, targets=targets).attach(model)
    shapes, fit = cost.shapes_of(model, attached), Fit(attached.init(0))
    lengths = [40, 64, 23]
    ours = cost.of_rows(shapes, fit, lengths, [9] * 3)
    assert ours == pytest.approx(counted(model, attached, lengths, 9), rel=0.03)


def test_zeroth_order_is_two_forward_passes() -> None:
    model = tiny_model().requires_grad_(False)
    model.set_attn_implementation("eager")
    attached = Lora(r=4).attach(model)
    fit = Fit(attached.init(0), order="zeroth")
    ours = cost.of_rows(cost.shapes_of(model, attached), fit, [50], [50 - 1])
    assert ours == pytest.approx(2 * counted(model, attached, [50], 49, backward=False), rel=0.01)


def test_factors_that_stand_still_cost_less() -> None:
    attached = Lora(r=4).attach(model := tiny_model().requires_grad_(False))
    shapes, start = cost.shapes_of(model, attached), attached.init(0)
    whole = cost.of_rows(shapes, Fit(start), [30], [10])
    half = cost.of_rows(shapes, Fit(start, trainable=lambda name: name.endswith("lora_B")), [30], [10])
    a = sum(tensor.numel() for name, tensor in start.items() if name.endswith("lora_A"))
    assert whole - half == 2 * 30 * a


@pytest.mark.bundled
def test_the_formula_holds_for_the_bundled_model() -> None:
    from fedloom.client.models import Model, load_model

    model = load_model(Model(name="smollm2-135m", dtype="bf16", attention="eager")).model
    attached = Lora(r=8).attach(model)
    ours = cost.of_rows(cost.shapes_of(model, attached), Fit(attached.init(0)), [48], [12])
    assert ours == pytest.approx(counted(model, attached, [48], 12), rel=0.03)


def test_a_run_books_bytes_and_operations_of_every_client(tmp_path: Path) -> None:
    result = run(tiny_model_folder(tmp_path / "tiny"), tmp_path / "run", evaluate=[])
    told = lines(result.folder / "metrics.jsonl")
    for name, whole in (("bytes_up", "bytes_up"), ("bytes_down", "bytes_down"), ("flops", "flops")):
        by_client = sum(one["value"] for one in told if one["name"] == name and one["client"] is not None)
        by_round = sum(one["value"] for one in told if one["name"] == name and one["client"] is None)
        assert by_client == pytest.approx(by_round) and by_round == pytest.approx(result.summary[whole])
        assert by_round > 0
    tokens = result.summary["trained_tokens"]
    model = tiny_model().requires_grad_(False)
    weights = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert 3 * weights * tokens < result.summary["flops"] < 12 * weights * tokens
    assert result.summary["machine"]["cores"] >= 1


def _zone(place: Path, name: str, joules: float) -> Path:
    zone = place / name
    zone.mkdir(parents=True)
    (zone / "max_energy_range_uj").write_text("1000000000\n")
    (zone / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")
    return zone / "energy_uj"


def test_energy_adds_packages_and_not_their_parts(tmp_path: Path) -> None:
    first, second = _zone(tmp_path, "intel-rapl:0", 5), _zone(tmp_path, "intel-rapl:1", 990)
    part = _zone(tmp_path, "intel-rapl:0:0", 1)
    meter = energy.Meter(tmp_path)
    first.write_text("7000000\n")
    second.write_text("1000000\n")  # it went round at 1,000 J
    part.write_text("900000000\n")
    assert meter.joules() == pytest.approx(2 + 11)
    assert meter.joules() == 0


def test_a_machine_without_counters_reports_none(tmp_path: Path) -> None:
    assert energy.Meter(tmp_path).joules() is None


def test_operations_for_people() -> None:
    assert [cost.human_flops(x) for x in (0, 999, 1500, 3.21e12)] == ["0 FLOP", "999 FLOP", "1.5 kFLOP", "3.21 TFLOP"]
