"""Operations of further kinds of adapters against torch's counter; gradients that full fine-tuning alone needs."""

from __future__ import annotations

import pytest
import torch
from tests.report.test_cost import counted
from tests.tiny import tiny_model
from torch import Tensor
from torch.nn import functional

from fedloom import cost
from fedloom.client.ada_lora import AdaLora
from fedloom.client.adapters import Adapter
from fedloom.client.full import Full
from fedloom.client.ia3 import Ia3
from fedloom.client.lean import rms_norm
from fedloom.client.objectives import nll, nll_again
from fedloom.types import Fit


@pytest.mark.parametrize(
    "part", [Ia3(), Ia3(targets=("down_proj",), feedforward=("down_proj",)), AdaLora(r=4, target=2), Full()]
)
def test_the_formula_is_what_torch_counts(part: Adapter) -> None:
    model = tiny_model().requires_grad_(False)
    model.set_attn_implementation("eager")
    attached = part.attach(model)
    shapes, fit = cost.shapes_of(model, attached), Fit(attached.init(0))
    lengths = [40, 64, 23]
    ours = cost.of_rows(shapes, fit, lengths, [9] * 3)
    # the logits that full fine-tuning computes again are no operation of the method
    again = 2.0 * 27 * shapes.head if isinstance(part, Full) else 0.0
    assert ours + again == pytest.approx(counted(model, attached, lengths, 9), rel=0.03)


def test_weights_that_stand_still_cost_less() -> None:
    attached = Full().attach(model := tiny_model().requires_grad_(False))
    shapes, start = cost.shapes_of(model, attached), attached.init(0)
    whole = cost.of_rows(shapes, Fit(start), [30], [10])
    some = cost.of_rows(shapes, Fit(start, trainable=lambda name: "mlp" in name), [30], [10])
    attention = 2 * 30 * 2 * (2 * 32 * 32 + 2 * 16 * 32)
    assert whole - some == attention + 2 * 10 * shapes.head


def test_losses_with_a_head_that_is_trained() -> None:
    stream = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 8, generator=stream, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, generator=stream, dtype=torch.float64, requires_grad=True)
    labels, factors = torch.arange(300) % 11, torch.rand(300, generator=stream, dtype=torch.float64)
    logits = lambda h: functional.linear(h, weight)
    plain = functional.cross_entropy(logits(hidden), labels, reduction="none")
    ours = nll_again(logits, hidden, labels)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, nll(logits, hidden, labels), rtol=0, atol=1e-12)
    expected = torch.autograd.grad((plain * factors).sum(), (hidden, weight))
    for found, one in zip(torch.autograd.grad((ours * factors).sum(), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-12)


def test_a_lean_norm_passes_the_gradient_of_its_weight() -> None:
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 6, generator=stream, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, generator=stream, dtype=torch.float64, requires_grad=True)
    forward = lambda a, b: rms_norm(a, b, 1e-5)
    assert torch.autograd.gradcheck(forward, (x, weight))
    frozen: Tensor = weight.detach()
    (alone,) = torch.autograd.grad(forward(x, frozen).sin().sum(), x)
    both = torch.autograd.grad(forward(x, weight).sin().sum(), (x, weight))
    torch.testing.assert_close(both[0], alone, rtol=0, atol=1e-14)
