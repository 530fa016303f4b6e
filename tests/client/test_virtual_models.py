"""Virtual tokens in other architectures, and models that they are refused in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.client.test_generate import recurrent, sliding
from tests.client.virtual_parts import PARTS, M
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from fedloom.client.adapters import Adapter
from fedloom.client.prefix_tuning import PrefixTuning
from fedloom.client.prompt_tuning import PromptTuning
from fedloom.client.virtual import EMBEDDINGS, Backbone
from fedloom.types import ModelError


def other_model(config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)
    return model


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
    "neox": GPTNeoXConfig(**SMALL, intermediate_size=48, initializer_range=0.3),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3),
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "falcon": FalconConfig(**SMALL, alibi=False, initializer_range=0.3),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("part", [PromptTuning(tokens=M), PrefixTuning(tokens=M)])
def test_other_architectures_read_on_behind_what_they_read_before(name: str, part: Adapter) -> None:
    """Learned positions, ALiBi, rotary: what real tokens would have left is put in as virtual ones."""
    model, ids = other_model(OTHERS[name]), torch.arange(3, 23).view(2, 10)
    plain = copy.deepcopy(model)
    try:
        adapter = part.attach(model)
    except ModelError as error:
        assert name == "bloom", error
        assert all(word in str(error) for word in (part.part_name, "bloom"))
        return
    front = torch.tensor([[7, 8, 9, 10, 11]])
    table = plain.get_input_embeddings()(front)
    if isinstance(part, PromptTuning):
        params = {EMBEDDINGS: table[0]}
    else:
        pairs = Backbone(copy.deepcopy(plain), M, adapter.owners).pairs_of(table)
        whole = torch.stack([torch.stack(pair) for pair in pairs])[:, :, 0]
        params = {EMBEDDINGS: whole.permute(3, 0, 1, 2, 4).reshape(M, -1)}
    adapter.load([params])
    expected = plain(input_ids=torch.cat([front.expand(2, -1), ids], 1)).logits[:, M:]
    # some of these compute norms or softmax in float32 whatever the model's dtype
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-4)


def t5() -> PreTrainedModel:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["prompt", "prefix", "encoder"])
@pytest.mark.parametrize(("build", "words"), [(sliding, "mistral"), (recurrent, "qwen3_next"), (t5, "t5")])
def test_a_model_that_cannot_see_them_is_refused_by_name(kind: str, build: Callable[[], Any], words: str) -> None:
    model = build()
    decoder = model.get_decoder()
    before = decoder.forward
    with pytest.raises(ModelError, match=words) as error:
        PARTS[kind].attach(model)
    assert f"adapter={PARTS[kind].part_name}" in str(error.value)
    assert decoder.forward == before
