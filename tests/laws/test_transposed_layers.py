"""GPT-2 keeps its weights transposed: merges and exports add the same products there, the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.helpers import lines, run
from tests.tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from fedloom import baselog
from fedloom.checkpoint import Checkpoints
from fedloom.client.lora import LoraLinear, Owners
from fedloom.factors import Factors


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=272, n_positions=512, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_merge_adds_the_product_to_the_weight_that_is_multiplied() -> None:
    base = Conv1D(5, 3).double()  # d_out 5, d_in 3; the weight is (3, 5)
    before = base.weight.detach().clone()
    layer = LoraLinear(base, 2, 0.0, reference=False, owners=Owners())
    pair = Factors(torch.randn(2, 3).double(), torch.randn(5, 2).double(), 0.5)
    x = torch.randn(4, 3).double()
    plain = layer(x)
    layer.shift(None, pair)
    torch.testing.assert_close(layer(x), plain + x @ pair.product().T, rtol=0, atol=1e-12)
    layer.shift(None, None)
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("algorithm", ["fedex", "flora"])
def test_methods_that_change_the_base_are_exact_on_gpt2(gpt2: Path, tmp_path: Path, algorithm: str) -> None:
    model = {"name": str(gpt2), "dtype": "fp64"}
    result = run(gpt2, tmp_path / "a", model=model, algorithm=algorithm, rounds=1, evaluate=["loss"])
    logged = lines(result.folder / "metrics.jsonl")
    assert next(line["value"] for line in logged if line["name"] == "aggregation_error") < 1e-12
    state, _ = Checkpoints(result.folder / "checkpoints", 2).load(1)
    plain, ours = (AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float64).eval() for _ in range(2))
    peft = PeftModel.from_pretrained(plain, result.folder / "adapter").eval()
    (params,) = result.recipe.algorithm.export(state).values()
    ids = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for module in baselog.modules(state.base):
            scale = 4 / len(params[f"{module}.lora_A"])
            change = scale * params[f"{module}.lora_B"] @ params[f"{module}.lora_A"]
            change = change + baselog.delta(state.base, module)
            assert isinstance(ours.get_submodule(module), Conv1D)
            ours.get_parameter(f"{module}.weight").add_(change.T)
        torch.testing.assert_close(peft(ids).logits, ours(ids).logits, rtol=0, atol=1e-9)
