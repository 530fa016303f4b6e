"""Reordered weights: the same products, for as long as the context lasts, and only where they fit."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_model
from torch import nn

from fedloom.client import prepacked
from fedloom.client.prepacked import _can
from fedloom.client.prepacked import prepacked as reordered

needs = pytest.mark.skipif(not _can(), reason="this CPU or torch has no products with reordered bf16 weights")


@needs
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_the_same_for_every_number_of_rows(bias: bool) -> None:
    torch.manual_seed(0)
    model = tiny_model().to(torch.bfloat16)
    model.lm_head = nn.Linear(model.config.hidden_size, 96, bias=bias, dtype=torch.bfloat16)
    with torch.inference_mode():
        for rows in (1, 5, 32, 300):
            x = torch.randn(rows, 1, model.config.hidden_size).bfloat16()
            expected = model.lm_head(x)
            with reordered(model, 32):
                found = model.lm_head(x)
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@needs
def test_every_linear_layer_and_restored_after_an_error() -> None:
    model = tiny_model().to(torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with pytest.raises(ZeroDivisionError), reordered(model, 4) as count:
        assert count == len(layers)
        raise ZeroDivisionError
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_other_dtypes_and_large_models_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with reordered(tiny_model(), 4) as count:
        assert count == 0
    monkeypatch.setattr(prepacked, "LARGEST", 1000)
    with reordered(tiny_model().to(torch.bfloat16), 4) as count:
        assert count == 0
