"""Our LoRA layer computes what peft's does, and peft loads what we write."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from tests.helpers import run
from tests.tiny import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

import fedloom
from fedloom.client.adapted import Owners
from fedloom.client.adapters import Lora
from fedloom.client.lora import LoraLinear, fused
from fedloom.client.peft_files import load_peft, save_peft
from fedloom.types import ModelError, Tensors

IDS = torch.arange(3, 43).view(2, 20)


def _draw(shapes: dict[str, tuple[int, int]], seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=stream, dtype=dtype) * 0.1 for name, shape in shapes.items()}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    "lora", [Lora(r=3, alpha=7), Lora(r=4, rslora=True), Lora(r=2, targets=("q_proj", "down_proj"))]
)
def test_forward_and_gradients_are_pefts(tmp_path: Path, lora: Lora, reference: bool) -> None:
    model = tiny_model(torch.float64)
    theirs = copy.deepcopy(model)
    attached = lora.attach(model, reference)
    params = _draw(attached.shapes(), 1)
    save_peft(tmp_path / "a", params, attached.config, "tiny")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a", is_trainable=True, autocast_adapter_dtype=False)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = params[name.removeprefix("base_model.model.").replace(".default.weight", "")].clone()

    stack = attached.load([params])
    live = stack.views
    ours = model(input_ids=IDS).logits
    stack.backward(ours.square().mean())
    expected = theirs(input_ids=IDS).logits
    expected.square().mean().backward()

    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    gradients, compared = dict(zip(stack.moving, stack.grads(0), strict=True)), 0
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            mine = gradients[name.removeprefix("base_model.model.").replace(".default.weight", "")]
            torch.testing.assert_close(mine, p.grad, rtol=0, atol=1e-12)
            compared += 1
    assert compared == len(live)


def test_stacked_clients_equal_each_alone() -> None:
    model = tiny_model(torch.float64)
    attached = Lora(r=3).attach(model)
    one, two = _draw(attached.shapes(), 1), _draw(attached.shapes(), 2)

    def logits(clients: list[Tensors], ids: torch.Tensor) -> torch.Tensor:
        attached.load(clients)
        return model(input_ids=ids).logits.detach()

    both = logits([one, two], torch.cat([IDS, IDS]))
    torch.testing.assert_close(both[:2], logits([one], IDS), rtol=0, atol=1e-12)
    torch.testing.assert_close(both[2:], logits([two], IDS), rtol=0, atol=1e-12)
    assert not torch.equal(both[:2], both[2:])


@pytest.mark.parametrize("spans", [None, (1, 5), (0, 6)])
def test_fused_gradients_by_finite_differences(spans: tuple[int, ...] | None) -> None:
    stream = torch.Generator().manual_seed(0)
    owners = Owners(spans)
    layers = [LoraLinear(torch.nn.Linear(5, out, dtype=torch.float64), 2, 0.0, False, owners) for out in (4, 3)]
    for layer in layers:
        layer.requires_grad_(False)
        layer.scale = torch.tensor([1.5, 0.5], dtype=torch.float64).view(2, 1, 1)
    shapes = [(6, 5), (2, 2, 5), (2, 4, 2), (2, 2, 5), (2, 3, 2)]
    draws = [torch.randn(s, generator=stream, dtype=torch.float64, requires_grad=True) for s in shapes]

    def forward(x: torch.Tensor, *factors: torch.Tensor) -> list[torch.Tensor]:
        for layer, a, b in zip(layers, factors[::2], factors[1::2], strict=True):
            layer.a, layer.b = a, b
        return fused(x, layers)

    assert torch.autograd.gradcheck(forward, draws)


def test_transposed_layers_of_gpt2(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double().eval()
    plain = copy.deepcopy(model)
    attached = Lora(r=2, targets=("c_attn",)).attach(model)
    params = _draw(attached.shapes(), 3)
    attached.load([params])
    adapted = model(input_ids=IDS).logits
    plain.load_state_dict(attached.merged(model, params))
    torch.testing.assert_close(plain(input_ids=IDS).logits, adapted, rtol=0, atol=1e-12)


def test_merged_equals_adapter_forward() -> None:
    model = tiny_model(torch.float64)
    plain = copy.deepcopy(model)
    attached = Lora(r=3).attach(model)
    params = _draw(attached.shapes(), 4)
    attached.load([params])
    plain.load_state_dict(attached.merged(model, params))
    torch.testing.assert_close(plain(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=1e-12)


def test_off_is_the_untouched_base() -> None:
    model = tiny_model(torch.float64)
    expected = model(input_ids=IDS).logits
    attached = Lora(r=3).attach(model)
    attached.load([_draw(attached.shapes(), 5)])
    with attached.off():
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert not torch.equal(model(input_ids=IDS).logits, expected)


def test_peft_folder_round_trip_and_refusals(tmp_path: Path) -> None:
    attached = Lora(r=2).attach(tiny_model())
    params = _draw(attached.shapes(), 6, torch.float32)
    save_peft(tmp_path / "a", params, attached.config, "tiny")
    assert all(torch.equal(value, params[name]) for name, value in load_peft(tmp_path / "a").items())
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_peft(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="never loaded"):
        load_peft(tmp_path)
    with pytest.raises(ModelError, match="missing 1"):
        attached.load([dict(list(params.items())[1:])])
    with pytest.raises(ModelError, match="has shape"):
        attached.load([{name: t[:1] for name, t in params.items()}])


def test_peft_gives_the_reported_loss(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from fedloom.client.trainer import Rows
    from fedloom.data.federation import build

    result = run(tiny_folder, tmp_path / "a", rounds=3)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = peft.PeftModel.from_pretrained(base, result.adapter)
    from tests.tiny import tiny_tokenizer

    split = build(result.recipe.data, tiny_tokenizer(), 0, None)
    nll, count = 0.0, 0
    for client in split.clients.values():
        rows = Rows(split.encoded, client.test)
        for i in range(len(rows)):
            ids, train = rows[i].ids, rows[i].train
            labels = torch.where(train, ids, -100)[None]
            with torch.no_grad():
                loss = float(model(input_ids=ids[None], labels=labels).loss)
            n = int(train[1:].sum())
            nll, count = nll + loss * n, count + n
    assert nll / count == pytest.approx(result.metrics["federated"]["loss"]["loss"], abs=1e-5)
    assert result.metrics["federated"]["loss"]["loss"] < result.metrics["base"]["loss"]["loss"]


def test_targets_that_match_nothing_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(fedloom.ModelError, match=r"q_prj.*did you mean 'q_proj'.*all-linear"):
        run(tiny_folder, tmp_path / "a", adapter={"targets": ["q_prj"]})
