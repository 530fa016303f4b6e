"""The lean norm and gated product: the functions and derivatives of autograd, and only where they are the same."""

from __future__ import annotations

import copy

import torch
from tests.tiny import tiny_model
from torch.nn import functional
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from fedloom.client.adapters import Lora
from fedloom.client.compiling import compile_layers
from fedloom.client.lean import lean, rms_norm, swiglu


def _draw(*shape: int) -> torch.Tensor:
    stream = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=stream, dtype=torch.float64, requires_grad=True)


def test_derivatives_by_finite_differences() -> None:
    weight = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), _draw(2, 3, 6))
    assert torch.autograd.gradcheck(swiglu, (_draw(2, 3, 6), _draw(2, 3, 6) * 0.5))


def test_values_are_those_of_torch() -> None:
    x, weight = _draw(4, 6), torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), functional.rms_norm(x, (6,), weight, 1e-5))
    torch.testing.assert_close(swiglu(x, x + 1), functional.silu(x) * (x + 1))


def test_half_precision_models_alone_are_changed() -> None:
    assert lean(tiny_model(torch.float32)) == 0
    plain = tiny_model(torch.bfloat16).requires_grad_(False)
    changed = copy.deepcopy(plain)
    assert lean(changed) == 2 * 3 + 1  # two norms and an MLP a layer, and the last norm
    ids = torch.arange(3, 40)[None]
    outs, grads = [], []
    for model in (plain, changed):
        attached = Lora(r=2).attach(model)
        start = {n: t + 0.01 for n, t in attached.init(0).items()}
        stack = attached.load([start])
        out = model(input_ids=ids).logits.float()
        stack.backward(functional.cross_entropy(out[0, :-1], ids[0, 1:]))
        outs.append(out.detach())
        grads.append(stack.grad.clone())
    assert (outs[0] - outs[1]).abs().max() <= 1e-2 * outs[0].abs().max()
    assert functional.cosine_similarity(grads[0], grads[1]).item() > 0.999


def test_compiled_layers_give_the_same_gradients() -> None:
    grads, ids = [], torch.arange(3, 40)[None]
    for compiled in (False, True):
        model = tiny_model(torch.bfloat16, layers=1).requires_grad_(False)
        lean(model)
        attached = Lora(r=2).attach(model)
        stack = attached.load([{n: t + 0.01 for n, t in attached.init(0).items()}])
        if compiled:
            compile_layers(model)
        stack.backward(functional.cross_entropy(model(input_ids=ids).logits.float()[0, :-1], ids[0, 1:]))
        grads.append(stack.grad.clone())
    assert functional.cosine_similarity(*grads).item() > 0.999


def test_a_norm_that_is_another_function_stays() -> None:
    model = tiny_model(torch.bfloat16)
    model.model.norm = norm = GemmaRMSNorm(32).to(torch.bfloat16)
    norm.variance_epsilon = 1e-6  # looks like a Llama norm, and multiplies by 1 + weight
    with torch.no_grad():
        norm.weight.fill_(0.5)
    assert lean(model) == 6
