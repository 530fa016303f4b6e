"""DoRA, (IA)^3, AdaLoRA and all weights: our forward is peft's and that of dense weights made by hand."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.tiny import tiny_model, tiny_model_folder, tiny_tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fedloom.client import generate
from fedloom.client.ada_lora import AdaLora
from fedloom.client.adapters import Adapter, Lora
from fedloom.client.attached import Attached
from fedloom.client.dora import Dora
from fedloom.client.full import Full
from fedloom.client.ia3 import Ia3
from fedloom.client.models import Model, load_model
from fedloom.client.rslora import RsLora
from fedloom.parts import Part
from fedloom.reopen import load
from fedloom.types import ModelError, Tensors

IDS = torch.arange(3, 43).view(2, 20)
KINDS: list[Adapter] = [
    Dora(r=3, alpha=7),
    Dora(r=2, targets=("q_proj", "down_proj")),
    Ia3(),
    Ia3(targets=("q_proj", "up_proj"), feedforward=("up_proj",)),
    AdaLora(r=4, target=2),
]
EVERY: list[Adapter] = [*KINDS, Full()]


def _name(part: object) -> str:
    return part.part_name if isinstance(part, Part) else str(part)


def _near(attached: Attached, seed: int) -> dict[str, Tensor]:
    """Return an adapter at some distance from the start."""
    stream = torch.Generator().manual_seed(seed)
    start = attached.init(0, torch.float64)
    return {n: t + 0.1 * torch.randn(t.shape, generator=stream, dtype=torch.float64) for n, t in start.items()}


def _attached(part: Adapter, reference: bool = False) -> tuple[PreTrainedModel, Attached]:
    model = tiny_model(torch.float64).requires_grad_(False)
    return model, part.attach(model, reference)


def _logits(model: PreTrainedModel, attached: Attached, clients: list[Tensors], ids: Tensor) -> Tensor:
    attached.load(clients)
    return model(input_ids=ids).logits.detach()  # type: ignore[no-any-return]


def _live(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("part", KINDS, ids=_name)
def test_forward_and_gradients_are_pefts(tmp_path: Path, part: Adapter, reference: bool) -> None:
    model, attached = _attached(part, reference)
    params = _near(attached, 1)
    attached.save(tmp_path / "a", params, "tiny")
    theirs = peft.PeftModel.from_pretrained(
        tiny_model(torch.float64), tmp_path / "a", is_trainable=True, autocast_adapter_dtype=False
    )
    stack = attached.load([params])
    ours, expected = model(input_ids=IDS).logits, theirs(input_ids=IDS).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    stack.backward(ours.square().mean())
    expected.square().mean().backward()
    gradients = dict(zip(stack.moving, stack.grads(0), strict=True))
    found = {_live(n): p.grad for n, p in theirs.named_parameters() if p.grad is not None and "ranknum" not in n}
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradients[name].view(gradient.shape), gradient, rtol=0, atol=1e-10)
        assert gradient.any(), name
    again = part.read(tmp_path / "a")
    assert again.keys() == params.keys()
    assert all(torch.equal(again[name], params[name]) for name in params)


def _by_hand(part: Adapter, plain: PreTrainedModel, params: Tensors) -> None:
    """Write into a plain model the dense weights that the equations of each paper name."""
    state = dict(plain.named_parameters())
    for name, t in params.items():
        module, _, kind = name.rpartition(".")
        weight = state[f"{module}.weight"].data if f"{module}.weight" in state else state[name].data
        if isinstance(part, Full):
            state[name].data.copy_(t)
        elif isinstance(part, Ia3):
            for i, j in itertools.product(*map(range, weight.shape)):
                weight[i, j] *= t[0, j] if len(t) == 1 else t[i, 0]
        elif kind == "lora_A":
            b, r = params[f"{module}.lora_B"], len(t)
            if isinstance(part, AdaLora):
                weight += part.alpha / (r + 1e-5) * b @ torch.diag(params[f"{module}.lora_E"][:, 0]) @ t
            elif isinstance(part, Dora):
                weight += part.alpha / r * b @ t
                for i, row in enumerate(weight):
                    row *= params[f"{module}.lora_magnitude_vector"][i] / row.square().sum().sqrt()


@pytest.mark.parametrize("part", EVERY, ids=_name)
def test_forward_is_that_of_dense_weights_by_hand_and_of_the_merged_model(part: Adapter) -> None:
    model, attached = _attached(part)
    params = _near(attached, 2)
    ours = _logits(model, attached, [params], IDS)
    hand, merged = tiny_model(torch.float64), tiny_model(torch.float64)
    _by_hand(part, hand, params)
    merged.load_state_dict(attached.merged(model, params))
    for plain in (hand, merged):
        torch.testing.assert_close(plain(input_ids=IDS).logits, ours, rtol=0, atol=1e-10)
    assert float((ours - tiny_model(torch.float64)(input_ids=IDS).logits).detach().abs().max()) > 0.1


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("part", EVERY, ids=_name)
def test_begins_at_the_base_and_off_is_the_base(part: Adapter, reference: bool) -> None:
    model, attached = _attached(part, reference)
    base = tiny_model(torch.float64)(input_ids=IDS).logits
    assert torch.equal(_logits(model, attached, [attached.init(0, torch.float64)], IDS), base)
    other = _logits(model, attached, [_near(attached, 3)], IDS)
    assert not torch.equal(other, base)
    with attached.off():
        assert torch.equal(model(input_ids=IDS).logits, base)
    assert torch.equal(model(input_ids=IDS).logits, other)


@pytest.mark.parametrize("spans", [None, (30, 10)])
@pytest.mark.parametrize("part", KINDS, ids=_name)
def test_stacked_clients_equal_each_alone(part: Adapter, spans: tuple[int, ...] | None) -> None:
    model, attached = _attached(part)
    assert part.stackable
    one, two = _near(attached, 4), _near(attached, 5)
    lengths = (20, 20) if spans is None else spans
    ids = [IDS.view(1, -1)[:, : lengths[0]], IDS.view(1, -1)[:, lengths[0] :]]
    apart = [_logits(model, attached, [own], part_ids) for own, part_ids in zip((one, two), ids, strict=True)]
    attached.load([one, two])
    layer = next(iter(attached.layers.values()))
    # one layer sees every token by itself, so that clients may have unequal numbers of them
    x = torch.randn(1, 40, layer.d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with attached.owned(spans):
        both = layer(x)
        if spans is None:
            together = model(input_ids=IDS).logits.detach()
            torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-10)
    cut = lengths[0]
    for own, piece, expected in ((one, x[:, :cut], both[:, :cut]), (two, x[:, cut:], both[:, cut:])):
        attached.load([own])
        torch.testing.assert_close(layer(piece), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("part", EVERY, ids=_name)
def test_token_by_token_is_the_training_forward(part: Adapter) -> None:
    model, attached = _attached(part)
    attached.load([_near(attached, 6)])
    tokenizer, prompts = tiny_tokenizer(), ["ab", "a longer one 1 2 3", "ab c"]
    found = generate.greedy(model, tokenizer, prompts, 12, batch_rows=2)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        new: list[int] = []
        while len(new) < 12 and (not new or new[-1] != tokenizer.eos_token_id):
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert answer == tokenizer.decode(new, skip_special_tokens=True)
    assert len(set(found)) > 1


GPT2: list[Adapter] = [
    Dora(r=2, targets=("c_attn", "c_proj")),
    Ia3(),
    AdaLora(r=2, target=1, targets=("c_attn",)),
    Full(),
]


@pytest.mark.parametrize("part", GPT2, ids=_name)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_transposed_layers_with_biases(tmp_path: Path, part: Adapter) -> None:
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data += 0.1
    plain, theirs = copy.deepcopy(model), copy.deepcopy(model)
    attached = part.attach(model)
    params = _near(attached, 7)
    ours = _logits(model, attached, [params], IDS)
    plain.load_state_dict(attached.merged(model, params))
    torch.testing.assert_close(plain(input_ids=IDS).logits, ours, rtol=0, atol=1e-10)
    if not isinstance(part, Full):
        attached.save(tmp_path / "a", params, "tiny")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a", autocast_adapter_dtype=False)
        torch.testing.assert_close(theirs(input_ids=IDS).logits, ours, rtol=0, atol=1e-10)


@pytest.mark.parametrize("part", KINDS, ids=_name)
def test_a_folder_is_taken_up_by_what_it_says_of_itself(tmp_path: Path, part: Adapter) -> None:
    folder = tiny_model_folder(tmp_path / "m", torch.float64)
    model, attached = _attached(part)
    params = _near(attached, 8)
    attached.save(tmp_path / "a", params, "tiny")
    opened = load(Model(name=str(folder), dtype="fp64", device="cpu", attention="sdpa"), tmp_path / "a")
    with torch.no_grad():
        found = opened.model(input_ids=IDS).logits
    torch.testing.assert_close(found, _logits(model, attached, [params], IDS), rtol=0, atol=1e-10)


def test_what_a_folder_is_not(tmp_path: Path) -> None:
    _, dora = _attached(Dora(r=3))
    dora.save(tmp_path / "dora", dora.init(0), "tiny")
    _, ia3 = _attached(Ia3())
    ia3.save(tmp_path / "ia3", ia3.init(0), "tiny")
    for part, folder, message in (
        (Dora(r=4), "dora", r"r is 3, the recipe's 4; set the adapter's knobs"),
        (Dora(r=3, alpha=3), "dora", r"lora_alpha is 16.0, the recipe's 3.0"),
        (Dora(r=3), "ia3", "holds an adapter of kind IA3, and the recipe's is LORA"),
        (Ia3(), "dora", "holds an adapter of kind LORA, and the recipe's is IA3"),
        (AdaLora(), "dora", "kind LORA, and the recipe's is ADALORA"),
        (Full(), "dora", r"holds no model\.safetensors"),
    ):
        with pytest.raises(ModelError, match=message):
            part.read(tmp_path / folder)
    lora = Lora(r=3, rslora=True).attach(tiny_model())
    lora.save(tmp_path / "plain", lora.init(0), "tiny")
    with pytest.raises(
        ModelError, match=r"use_rslora is True, the recipe's False; use_dora is False, the recipe's True"
    ):
        Dora(r=3).read(tmp_path / "plain")
    with pytest.raises(ModelError, match="no adapter to write"):
        Full().attach(tiny_model()).save(tmp_path / "full", {}, "tiny")


def test_a_peft_folder_with_rank_stabilised_dora(tmp_path: Path) -> None:
    """The same numbers mean alpha sqrt r in a scale of alpha / r."""
    _, attached = _attached(Dora(r=4, alpha=8))
    config: Any = attached.config  # type: ignore[attr-defined]
    config.use_rslora = True
    params = _near(attached, 9)
    attached.save(tmp_path / "a", params, "tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_model(torch.float64), tmp_path / "a", autocast_adapter_dtype=False)
    part = Dora.from_peft(peft.PeftConfig.from_pretrained(str(tmp_path / "a")))
    assert part is not None
    model, attached = _attached(part)
    found = _logits(model, attached, [params], IDS)
    torch.testing.assert_close(found, theirs(input_ids=IDS).logits, rtol=0, atol=1e-10)


def test_a_quantised_base_of_dora_has_the_norms_of_its_dense_weights(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m")
    loaded = load_model(Model(name=str(folder), dtype="fp32", device="cpu", attention="sdpa", quantize="int8"))
    base = loaded.model(input_ids=IDS).logits
    part = Dora(r=2)
    attached = part.attach(loaded.model)
    start = attached.init(0)
    stack = attached.load([start])
    ours = loaded.model(input_ids=IDS).logits
    torch.testing.assert_close(ours, base, rtol=0, atol=1e-5)
    stack.backward(ours.square().mean())
    assert all(gradient.any() for gradient in stack.grads(0) if gradient.dim() == 1)
    name, layer = next(iter(attached.layers.items()))
    expected = layer.base.dense().norm(dim=1)
    torch.testing.assert_close(start[f"{name}.lora_magnitude_vector"], expected, rtol=0, atol=1e-6)
    plain = tiny_model()
    plain.load_state_dict(attached.merged(loaded.model, start))
    torch.testing.assert_close(plain(input_ids=IDS).logits, base, rtol=0, atol=1e-4)
    with pytest.raises(ModelError, match=r"trains plain weights only, and .*q_proj is quantised"):
        Full().attach(load_model(loaded.spec).model)


def test_rslora_is_lora_with_the_flag() -> None:
    models = [_attached(part) for part in (RsLora(r=4, alpha=8), Lora(r=4, alpha=8, rslora=True))]
    params = _near(models[0][1], 10)
    assert torch.equal(*(_logits(model, attached, [params], IDS) for model, attached in models))
    assert RsLora().scale(16) == 4.0
    assert "alpha / sqrt r" in (RsLora.__doc__ or "")


def test_ia3_of_an_architecture_that_peft_does_not_list() -> None:
    model = tiny_model()
    model.config.model_type = "novel"
    with pytest.raises(ModelError, match=r"peft lists no \(IA\)\^3 layers for novel models.*set adapter.targets"):
        Ia3().attach(model)
    with pytest.raises(ModelError, match=r"named 'k_prj'; did you mean 'k_proj'.*linear modules"):
        Ia3(targets=("k_prj",), feedforward=()).attach(model)


def test_norms_are_measured_anew_where_weights_may_have_moved() -> None:
    model, attached = _attached(Dora(r=2))
    stack = attached.load([_near(attached, 11)])
    with torch.inference_mode():
        before = model(input_ids=IDS).logits
    stack.flat.mul_(1.5)
    with attached.owned((40,)), torch.inference_mode():
        moved = model(input_ids=IDS).logits
    assert not torch.equal(before, moved)
    with torch.enable_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, moved, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_master_weights_and_what_is_computed_with(dtype: torch.dtype) -> None:
    """A step below half a unit in the last place of a bf16 weight is kept, and counts once enough came together."""
    model = tiny_model(dtype).requires_grad_(False)
    attached = Full().attach(model)
    start = attached.init(0)
    assert {t.dtype for t in start.values()} == {torch.float32}
    stack = attached.load([start])
    for _ in range(8):
        stack.flat.mul_(1 + 2.0**-10)
    with torch.enable_grad():
        model(input_ids=IDS)
    own = model.get_input_embeddings().weight
    assert own.dtype == dtype
    expected = (start["model.embed_tokens.weight"] * (1 + 2.0**-10) ** 8).to(dtype)
    torch.testing.assert_close(own.detach(), expected, rtol=2e-3 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert own is model.get_output_embeddings().weight
    assert not torch.equal(own.detach(), start["model.embed_tokens.weight"].to(dtype))


@pytest.mark.parametrize(
    "part", [Lora(targets=("q_proj", "lm_head")), Dora(targets=("lm_head",)), Ia3(targets=("lm_head",), feedforward=())]
)
def test_the_output_head_is_no_target(part: Adapter) -> None:
    with pytest.raises(ModelError, match=r"adapter.targets: lm_head is the output head.*leave it out"):
        part.attach(tiny_model())
    with pytest.raises(ModelError, match="embed_tokens is a Embedding; adapters here change linear layers only"):
        part.model_copy(update={"targets": ("embed_tokens",)}).attach(tiny_model())
