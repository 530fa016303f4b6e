"""Base models: exact loading, the forward in two halves, what `auto` means, and errors for people."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tests.tiny import stories_model, tiny_model, tiny_model_folder, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
)
from transformers.utils import logging as transformers_logging

from fedloom.client import models
from fedloom.client.models import Model, hidden_states, load_model, load_tokenizer, logits
from fedloom.types import ModelError, RecipeError

SIZES = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
FAMILIES = [
    LlamaConfig(**SIZES),
    Qwen2Config(**SIZES),
    Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5),
    GraniteConfig(**SIZES, logits_scaling=8.0),
    CohereConfig(**SIZES, logit_scale=0.0625),
]
ONLY_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA answers")


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def cpu(name: Path | str, **knobs: object) -> Model:
    return Model.model_validate({"name": str(name), "dtype": "fp32", "device": "cpu", **knobs})


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_halves_are_the_models_own_forward(config: PretrainedConfig) -> None:
    model, ids = random_model(config), torch.tensor([[5, 9, 2, 77, 31]])
    with torch.no_grad():
        hidden = hidden_states(model, ids)
        assert hidden.shape == (1, 5, 32)
        assert torch.equal(logits(model, hidden[0]), model(ids).logits[0])


def test_hidden_states_do_not_depend_on_masked_tokens() -> None:
    model, mask = tiny_model(), torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        one, other = (hidden_states(model, torch.tensor([[pad, pad, 5, 9, 2]]), mask) for pad in (7, 200))
    assert torch.equal(one[:, 2:], other[:, 2:])


def test_a_family_with_other_logits_is_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "logits", lambda model, hidden: 1.5 * logits(model, hidden))
    with pytest.raises(ModelError, match="a llama model changes its logits"):
        load_model(cpu(tiny_folder))


def test_load_model_gives_the_saved_bits_frozen_without_touching_the_random_stream(tiny_folder: Path) -> None:
    before = torch.get_rng_state()
    loaded = load_model(cpu(tiny_folder))
    assert torch.equal(torch.get_rng_state(), before)
    wanted = tiny_model().state_dict()
    assert all(torch.equal(wanted[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.parameters == sum(p.numel() for p in tiny_model().parameters())
    assert loaded.source == f"folder {tiny_folder}"
    assert loaded.tokenizer("Hi\n")["input_ids"] == tiny_tokenizer()("Hi\n")["input_ids"]
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.spec == cpu(tiny_folder).resolved() == loaded.spec.resolved()


@pytest.mark.parametrize("name", ["bf16", "fp64"])
def test_dtype_is_that_of_the_weights(tiny_folder: Path, name: str) -> None:
    model = load_model(cpu(tiny_folder, dtype=name)).model
    assert {p.dtype for p in model.parameters()} == {models.DTYPES[name]}


def test_tokenizer_needs_no_weights_and_pads_with_the_end_token(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    edit(tmp_path / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(cpu(tmp_path))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")


def test_a_bare_name_is_a_model() -> None:
    assert Model.model_validate("org/name") == Model(name="org/name")
    assert {"type": "string"} in Model.model_json_schema()["anyOf"]


@pytest.mark.parametrize(("value", "said"), [("gpu", "allowed: auto, cpu, cuda, cuda:N, mps"), ("cudo", "'cuda'")])
def test_unknown_device_names_what_is_allowed(value: str, said: str) -> None:
    with pytest.raises(ValidationError, match=f"'{value}'.*{said}"):
        Model(name="x", device=value)


@pytest.mark.parametrize(("instructions", "dtype"), [("AMX", "bf16"), ("AVX512-BF16", "bf16"), ("", "fp32")])
def test_auto_dtype_follows_the_cpu(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, instructions: str, dtype: str
) -> None:
    monkeypatch.setattr(models, "cpu_bf16", lambda: instructions)
    resolved = Model(name=str(tiny_folder), device="cpu").resolved()
    assert (resolved.dtype, resolved.device, resolved.attention) == (dtype, "cpu", "sdpa")


def test_auto_attention_is_eager_where_scores_are_capped(tmp_path: Path) -> None:
    random_model(FAMILIES[2]).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(cpu(tmp_path))
    assert loaded.spec.attention == loaded.model.config._attn_implementation == "eager"
    with pytest.raises(RecipeError, match=r"model\.attention=sdpa.*gemma2.*allowed: auto, eager"):
        load_model(cpu(tmp_path, attention="sdpa"))


@ONLY_CPU
def test_all_knobs_that_do_not_fit_are_named_together(tiny_folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_model(cpu(tiny_folder, device="cuda:7", dtype="fp32", attention="flash_attention_2"))
    assert "model.device=cuda:7" in str(caught.value)
    assert "allowed: auto, " in str(caught.value)
    assert "model.attention=flash_attention_2" in str(caught.value)


def test_fp16_on_a_cpu_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.dtype=fp16.*allowed: auto, bf16, fp32, fp64"):
        load_model(cpu(tiny_folder, dtype="fp16"))


def test_a_revision_is_only_for_the_hub(tiny_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.revision=main"):
        load_model(cpu(tiny_folder, revision="main"))


# What a folder may have wrong. Each function spoils a good folder; the pattern is what a person is told.


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def to_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def to_remote_code(folder: Path) -> None:
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n")


def to_other_kind(folder: Path) -> None:
    T5Config().save_pretrained(folder)


def to_half_a_file(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def to_small_embeddings(folder: Path) -> None:
    random_model(LlamaConfig(**{**SIZES, "vocab_size": 200})).save_pretrained(folder)


def to_no_end_token(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)


SPOILED: list[tuple[Callable[[Path], object], str]] = [
    (to_pickle, r"pickle \(pytorch_model\.bin\).*safetensors:\n  python -c .*save_pretrained"),
    (to_adapter, "PEFT adapter.*`init`"),
    (to_remote_code, r"its own Python code.*model\.trust_remote_code=true"),
    (to_other_kind, "t5 model.*not a causal language model"),
    (to_half_a_file, "weights cannot be read"),
    (to_small_embeddings, "259 tokens but the model embeds only 200"),
    (to_no_end_token, "no end token.*tokenizer_config.json"),
    (lambda folder: (folder / "config.json").unlink(), r"no config\.json \(it holds "),
    (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "m.gguf"), r"did you mean the file .*m\.gguf"),
    (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer cannot be read.*tokenizer\.json"),
    (lambda folder: edit(folder / "config.json", model_type="lama"), "'lama'.*did you mean 'llama'"),
    (lambda folder: edit(folder / "config.json", hidden_size="wide"), r"config\.json cannot be read"),
    (lambda folder: edit(folder / "config.json", num_hidden_layers=3), r"lack model\.layers\.2\..* and 6 more"),
    (lambda folder: edit(folder / "config.json", intermediate_size=48), r"mlp.*\(64, 32\), not \(48, 32\)"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILED, ids=[said[:24] for _, said in SPOILED])
def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(tiny_model_folder(tmp_path))
    with pytest.raises(ModelError, match=f"(?s){said}") as caught:
        load_model(cpu(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_status == 2
    assert not (tmp_path / "ran").exists()


def test_weights_without_a_place_are_told(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path, layers=3)
    edit(tmp_path / "config.json", num_hidden_layers=2)
    told: list[str] = []
    load_model(cpu(tmp_path), told.append)
    assert len(told) == 1
    assert "model.layers.2" in told[0]


def test_a_missing_path_is_not_taken_for_a_hub_id(tiny_folder: Path) -> None:
    wrong = tiny_folder.with_name(tiny_folder.name + "x")
    with pytest.raises(ModelError, match=f"no such file or folder.*did you mean '{tiny_folder.name}'"):
        load_model(cpu(wrong))


@pytest.mark.parametrize("bars", [True, False])
def test_quiet_loading_restores_the_logging_of_transformers(tiny_folder: Path, bars: bool) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    show, hide = transformers_logging.enable_progress_bar, transformers_logging.disable_progress_bar
    try:
        transformers_logging.set_verbosity_info()
        (show if bars else hide)()
        load_model(cpu(tiny_folder))
        with pytest.raises(ModelError):
            load_model(cpu(tiny_folder / "config.json"))
        now = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        assert now == (transformers_logging.INFO, bars)
    finally:
        transformers_logging.set_verbosity(before[0])
        (show if before[1] else hide)()


# Real models.


@pytest.mark.bundled
def test_bundled_model_answers() -> None:
    loaded = load_model(cpu("smollm2-135m"))
    assert loaded.parameters == 134_515_008
    assert (loaded.tokenizer.eos_token, loaded.tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>assistant\n")
    ids = loaded.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    answer = loaded.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert loaded.tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


@pytest.mark.data
def test_stories_model_tells_a_story(data_home: Path) -> None:
    model, tokenizer = stories_model(data_home)
    ids = tokenizer("<s>Once upon a time", return_tensors="pt", add_special_tokens=False)
    story = model.generate(**ids, max_new_tokens=24, do_sample=False)
    assert tokenizer.decode(story[0], skip_special_tokens=True).endswith("Lily. She loved to play outside in the p")
