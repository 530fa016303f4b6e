"""Quantised bases: what a dequantised weight is, the forward and its gradient, loading, and errors for people."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tests.helpers import adapter, run
from tests.tiny import tiny_model, tiny_model_folder, tiny_tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from fedloom import exporting
from fedloom.client import quantize
from fedloom.client.models import DTYPES, Model, load_model
from fedloom.client.quantize import Int8Linear, Nf4Linear, Quantised, dense, is_linear, shape
from fedloom.types import ModelError, RecipeError

# The 16 levels of appendix E of arXiv 2305.14314.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)
SHAPES = [(1, 1), (5, 7), (16, 32), (48, 33), (200, 300)]
KINDS = [("nf4", "fp32"), ("nf4", "bf16"), ("int8", "fp32"), ("int8", "bf16"), ("int8", "fp64")]


def weight(d_out: int, d_in: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(d_out * d_in)).mul(0.1).to(dtype)


def layer(kind: type[Quantised], w: Tensor, bias: bool = False) -> Quantised:
    made = kind(nn.Linear(w.shape[1], len(w), bias, dtype=w.dtype)).requires_grad_(False)
    made.weight = made.pack(w)
    return made


def model(folder: Path, kind: str | None, dtype: str = "fp32") -> Model:
    return Model.model_validate({"name": str(folder), "dtype": dtype, "device": "cpu", "quantize": kind})


def test_a_plain_weight_is_not_copied() -> None:
    plain = nn.Linear(3, 2)
    assert dense(plain) is plain.weight
    assert is_linear(plain)
    assert shape(plain) == (2, 3)


def test_only_layers_whose_weight_is_known_are_linear() -> None:
    packed = nn.Linear(3, 2)
    packed.weight = nn.Parameter(torch.zeros(3, 1, dtype=torch.uint8), requires_grad=False)
    assert [is_linear(m) for m in (packed, Conv1D(2, 3), nn.Embedding(3, 2))] == [False, False, False]
    assert list(quantize.foreign(nn.Sequential(packed, nn.Linear(3, 2)))) == [("0", "Linear")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SHAPES)
def test_int8_is_within_half_a_step_and_the_rounding_of_the_dtype(size: tuple[int, int], dtype: torch.dtype) -> None:
    w = weight(*size, dtype)
    made = layer(Int8Linear, w)
    got, step = dense(made), made.scale.double()
    assert (got.dtype, got.shape, shape(made)) == (dtype, w.shape, size)
    assert made.weight.dtype == torch.int8
    rounding = torch.finfo(dtype).eps / 2 * got.double().abs()
    assert ((got.double() - w.double()).abs() <= step * 0.5001 + rounding).all()


def test_int8_rows_have_scales_of_their_own_and_zeros_stay_zero() -> None:
    w = torch.stack([torch.zeros(64), weight(1, 64)[0], 1e-6 * weight(1, 64)[0]])
    got = dense(layer(Int8Linear, w))
    assert not got[0].any()
    for row in (1, 2):
        assert (got[row] - w[row]).abs().max() < w[row].abs().max() / 250


@pytest.mark.parametrize("size", SHAPES)
def test_nf4_is_the_nearest_level_times_a_scale_of_eight_bits(size: tuple[int, int]) -> None:
    w = weight(*size)
    made = layer(Nf4Linear, w)
    got, numbers = dense(made), w.numel()
    assert (got.dtype, got.shape, shape(made)) == (torch.float32, w.shape, size)
    blocks = functional.pad(w.reshape(-1), (0, -numbers % 64)).view(-1, 64)
    exact = blocks.abs().amax(1)
    outer = made.outer.repeat_interleave(256)[: len(blocks)]
    scales = made.levels[made.absmax.long()] * outer + made.offset
    assert (scales - exact).abs().max() <= 0.02 * (exact - exact.mean()).abs().max() + 1e-7
    nearest = ((blocks / exact[:, None])[..., None] - LEVELS).abs().argmin(-1)
    wanted = (LEVELS[nearest] * scales[:, None]).view(-1)[:numbers].view(size)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def test_nf4_error_is_that_of_sixteen_normal_quantiles() -> None:
    w = weight(256, 512)
    made = layer(Nf4Linear, w)
    assert 0.08 < ((dense(made) - w).square().mean().sqrt() / w.std()).item() < 0.1
    bits = 8 * quantize.nbytes(made) / w.numel()
    assert 4.12 < bits < 4.25  # 4 + 8 / 64 + 32 / (64 * 256), and the 256 levels of the scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Int8Linear, Nf4Linear])
def test_forward_and_gradient_are_those_of_the_dense_weight(kind: type[Quantised], dtype: torch.dtype) -> None:
    made = layer(kind, weight(96, 64, dtype), bias=True)
    x = weight(10, 64, dtype).view(2, 5, 64).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = made(x)
    wanted = functional.linear(x2, dense(made), made.bias)
    assert torch.equal(y, wanted)
    assert not kept
    y.sum().backward()
    wanted.sum().backward()
    assert torch.equal(x.grad, x2.grad)  # type: ignore[arg-type]
    before = dense(made)
    with torch.no_grad():  # where bitsandbytes' own layer reorders its weight
        assert torch.equal(made.eval()(x), y)
    assert torch.equal(dense(made), before)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_loaded_model_counts_and_names_its_weights_like_the_plain_one(
    tiny_folder: Path, kind: str, dtype: str
) -> None:
    plain, told = tiny_model(DTYPES[dtype]), list[str]()
    before = torch.get_rng_state()
    loaded = load_model(model(tiny_folder, kind, dtype), told.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.parameters == sum(p.numel() for p in plain.parameters())
    assert quantize.nbytes(loaded.model) < quantize.nbytes(plain)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert len(told) == 1
    assert f"14 linear layers in {kind}" in told[0]
    assert loaded.spec == loaded.spec.resolved() == model(tiny_folder, kind, dtype).resolved()
    assert loaded.spec.quantize == kind
    assert Model.model_validate(loaded.spec.model_dump(mode="json")) == loaded.spec
    names, state, wanted = set(quantize.quantised(loaded.model)), loaded.model.state_dict(), plain.state_dict()
    assert list(state) == list(wanted)
    for name, value in wanted.items():
        assert (state[name].shape, state[name].dtype) == (value.shape, value.dtype)
        if name.removesuffix(".weight") in names:
            assert torch.equal(state[name], dense(loaded.model.get_submodule(name.removesuffix(".weight"))))
            assert (state[name] - value).abs().max() < 0.16 * value.abs().max()
        else:
            assert torch.equal(state[name], value), name
    assert "lm_head" not in names


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_what_is_saved_is_a_plain_model_that_computes_the_same(
    tiny_folder: Path, tmp_path: Path, kind: str, dtype: str
) -> None:
    ours = load_model(model(tiny_folder, kind, dtype)).model
    ours.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    saved, ids = load_model(model(tmp_path, None, dtype)).model, torch.tensor([[5, 9, 2, 77, 31]])
    assert not list(quantize.quantised(saved))
    assert all(torch.equal(a, saved.state_dict()[name]) for name, a in ours.state_dict().items())
    with torch.no_grad():  # the last bit is free: where a tensor begins in its file decides which kernel multiplies it
        torch.testing.assert_close(ours(ids).logits, saved(ids).logits)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_trains_and_merges_on_a_quantised_base_as_on_its_dense_copy(
    tiny_folder: Path, tmp_path: Path, kind: str
) -> None:
    load_model(model(tiny_folder, kind)).model.save_pretrained(tmp_path / "copy")
    tiny_tokenizer().save_pretrained(tmp_path / "copy")
    ours = run(tiny_folder, tmp_path / "ours", f"model.quantize={kind}")
    copy = run(tmp_path / "copy", tmp_path / "theirs")
    assert ours.recipe.model.quantize == kind
    assert f"quantize: {kind}" in (ours.folder / "recipe.yaml").read_text()
    trained, wanted = adapter(ours), adapter(copy)
    assert trained.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5)
    for result in (ours, copy):
        exporting.merged(result.folder, result.folder / "merged", None, None)
    one, other = (load_model(model(r.folder / "merged", None)).model.state_dict() for r in (ours, copy))
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5)


def test_loading_twice_gives_the_same_bits_and_a_state_dict_is_not_loaded(tiny_folder: Path) -> None:
    one, other = (load_model(model(tiny_folder, "nf4")).model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(TypeError, match=r"load the model with model\.quantize"):
        one.load_state_dict(other.state_dict())


def test_null_is_none_and_other_words_are_named() -> None:
    assert Model(name="x", quantize=None).quantize == "none"
    with pytest.raises(ValidationError, match="'none', 'nf4' or 'int8'"):
        Model(name="x", quantize="int4")


# Errors.


@pytest.mark.parametrize(("installed", "said"), [(None, "not installed"), ("0.45.0", r"0\.45\.0 is installed")])
def test_a_missing_library_and_a_wrong_dtype_are_said_together(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, installed: str | None, said: str
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise quantize.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(quantize, "version", version)
    with pytest.raises(RecipeError) as caught:
        load_model(model(tiny_folder, "nf4", "fp64"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all("model.quantize=nf4" in line and "allowed" in line for line in lines)
    assert caught.match(rf"bitsandbytes>=0\.49.*{said}.*pip install 'fedloom\[quantize\]'")
    assert load_model(model(tiny_folder, "int8", "fp64")).spec.quantize == "int8"


def test_weights_that_are_quantised_already_are_refused(tmp_path: Path) -> None:
    config = json.loads((tiny_model_folder(tmp_path) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"model\.quantize=int8 is for plain weights.*quantised \(bitsandbytes\)"):
        load_model(model(tmp_path, "int8"))


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 272, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model\.quantize=int8: .* gpt2 model.*set model\.quantize=none"):
        load_model(model(tmp_path, "int8"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("change", "said"), [({"intermediate_size": 48}, r"\(64, 32\), not \(48, 32\)"), ({"num_hidden_layers": 3}, "lack")]
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, kind: str, change: dict[str, int], said: str) -> None:
    config = json.loads((tiny_model_folder(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=said):
        load_model(model(tmp_path, kind))


def test_only_nf4_needs_the_library(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    assert load_model(model(tiny_folder, "int8")).spec.quantize == "int8"
    with pytest.raises(ImportError):
        layer(Nf4Linear, weight(2, 2))
    assert not [name for name, value in vars(quantize).items() if "bitsandbytes" in getattr(value, "__module__", "")]


@pytest.mark.bundled
def test_the_bundled_model_answers_in_four_bits() -> None:
    loaded = load_model(Model(name="smollm2-135m", dtype="bf16", device="cpu", quantize="nf4"))
    assert loaded.parameters == 134_515_008
    assert quantize.nbytes(loaded.model) < 112_000_000  # 269 MB in bf16, of which the embedding is 57 MB
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    answer = loaded.model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in loaded.tokenizer.decode(answer)
