from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.client.test_generate import sliding
from tests.tiny import tiny_model
from torch import Tensor, nn

from fedloom.client import cached
from fedloom.client.cached import by_products
from fedloom.client.prompts import _Roomy, evaluating


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One row, head and token at a time."""
    b, heads, t, d = q.shape
    out = torch.zeros(b, t, heads, d)
    for r in range(b):
        for h in range(heads):
            for i in range(t):
                g = h // (heads // k.shape[1])
                scores = (k[r, g] @ q[r, h, i]) * d**-0.5 + mask[r, 0, i]
                out[r, i, h] = torch.softmax(scores, 0) @ v[r, g]
    return out


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_a_loop(tokens: int, groups: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, tokens, 8), torch.randn(2, groups, 5, 8), torch.randn(2, groups, 5, 8)
    mask = torch.zeros(2, 1, tokens, 5).masked_fill(torch.rand(2, 1, tokens, 5) < 0.3, torch.finfo(torch.float32).min)
    out, _ = cached.attend(nn.Module(), q, k, v, mask)
    torch.testing.assert_close(out, naive(q, k, v, mask), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("build", [tiny_model, sliding])
def test_a_model_computes_the_same(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    ids = torch.arange(80).view(2, 40) % 200 + 5
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits
        with by_products(model):
            assert model.config._attn_implementation == cached.NAME
            found = model(input_ids=ids, attention_mask=mask).logits
            monkeypatch.setattr(cached, "LARGEST", 1)  # the fused kernel with the same mask
            fused = model(input_ids=ids, attention_mask=mask).logits
    assert model.config._attn_implementation == "sdpa"
    for one in (found, fused):
        torch.testing.assert_close(one[0, 7:], expected[0, 7:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one[1], expected[1], atol=1e-4, rtol=1e-4)


def test_other_implementations_are_left_alone() -> None:
    model = tiny_model()
    model.set_attn_implementation("eager")
    with by_products(model):
        assert model.config._attn_implementation == "eager"


def test_restored_after_an_error() -> None:
    model = tiny_model()
    with pytest.raises(ZeroDivisionError), by_products(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("room", [0, 2])
def test_a_roomy_layer_holds_what_a_growing_one_does(room: int) -> None:
    torch.manual_seed(0)
    layer, seen = _Roomy(room), torch.zeros(3, 2, 0, 4)
    for step in range(12):
        new = torch.randn(len(seen), 2, 1 + step % 2, 4)
        seen = torch.cat([seen, new], dim=2)
        covered = layer.get_mask_sizes(new.shape[2])
        keys, values = layer.update(new, -new)
        assert covered == (keys.shape[2], 0)
        assert keys.is_contiguous()
        assert torch.equal(keys[:, :, : seen.shape[2]], seen)
        assert torch.equal(values[:, :, : seen.shape[2]], -seen)
        assert not keys[:, :, seen.shape[2] :].any()
        if step == 5:  # a row leaves
            layer.reorder_cache(torch.tensor([1, 2]))
            seen = seen[1:]
        assert layer.get_seq_length() == seen.shape[2]


def test_the_head_gets_its_rows_side_by_side_and_keeps_no_hook() -> None:
    model, seen = tiny_model(), []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    ids = torch.arange(24).view(3, 8) + 5
    with torch.inference_mode():
        model(input_ids=ids, logits_to_keep=1)
        hook.remove()
        before = len(model.lm_head._forward_pre_hooks)
        with evaluating(model):
            hook = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
            model(input_ids=ids, logits_to_keep=1)
            hook.remove()
    assert seen == [False, True]
    assert len(model.lm_head._forward_pre_hooks) == before
