"""Virtual tokens: the model behind them is the one that a naive forward computes, wherever it is called from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.client.test_cohort import NAMES, _rows, _worst
from tests.client.test_generate import PROMPTS, TOKENIZER, oracle
from tests.client.test_likelihood import PAIRS, check
from tests.client.virtual_parts import IDS, PARTS, M, attached, each, some, tokens_of
from tests.report.test_cost import counted
from tests.tiny import tiny_model
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
)

from fedloom import cost
from fedloom.client.fit import Job, fit, gradient, score
from fedloom.client.generate import greedy, sample
from fedloom.client.likelihood import likelihoods
from fedloom.client.objectives import Sft
from fedloom.client.p_tuning import encode
from fedloom.client.prefix_tuning import PrefixTuning
from fedloom.client.prompt_tuning import PromptTuning
from fedloom.client.prompts import Batch, begin, beginning, evaluating
from fedloom.client.trainer import Bench, Trainer
from fedloom.client.virtual import EMBEDDINGS
from fedloom.types import Correction, Fit, Fitted, ModelError


def naive(model: PreTrainedModel, kind: str, tokens: Tensor, ids: Tensor) -> Tensor:
    """Return the logits of rows without padding: embeddings side by side, or keys and values copied into a cache."""
    if kind == "prefix":
        cache, config = DynamicCache(config=model.config), model.config
        cut = tokens.view(M, config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
        for layer in range(config.num_hidden_layers):
            pair = [cut[:, layer, i].transpose(0, 1)[None].repeat(len(ids), 1, 1, 1) for i in (0, 1)]
            cache.update(*pair, layer)
        logits: Tensor = model(input_ids=ids, past_key_values=cache).logits
        return logits
    row = model.get_input_embeddings()(ids)
    whole = torch.cat([tokens[None].expand(len(ids), -1, -1), row], 1)
    return model(inputs_embeds=whole, use_cache=False).logits[:, M:]


@each
def test_logits_and_gradients_are_those_of_a_naive_forward(kind: str) -> None:
    plain, (model, adapter) = tiny_model(torch.float64), attached(kind)
    params = {name: t.requires_grad_(True) for name, t in some(adapter).items()}
    expected = naive(plain, kind, tokens_of(params), IDS)
    wanted = torch.autograd.grad(expected.square().mean(), list(params.values()))
    stack = adapter.load([params])
    ours = model(input_ids=IDS, use_cache=False).logits
    stack.backward(ours.square().mean())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    for name, found in zip(stack.moving, stack.grads(0), strict=True):
        # transformers' norms compute in float32 whatever the model's dtype
        torch.testing.assert_close(found, dict(zip(params, wanted, strict=True))[name], rtol=0, atol=1e-7)
    assert float(stack.grad.abs().max()) > 1e-4


@each
def test_off_is_the_untouched_base(kind: str) -> None:
    expected = tiny_model(torch.float64)(input_ids=IDS).logits.detach()
    model, adapter = attached(kind)
    assert torch.equal(model(input_ids=IDS).logits, expected)  # nothing is loaded yet
    adapter.load([some(adapter)])
    assert float((model(input_ids=IDS).logits - expected).detach().abs().max()) > 0.1
    with adapter.off():
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert float((model(input_ids=IDS).logits - expected).detach().abs().max()) > 0.1


@each
def test_checkpointed_layers_read_the_virtual_tokens_again(kind: str) -> None:
    model, adapter = attached(kind)
    found = []
    for wanted in (False, True):
        for packing in (False, True):
            bench = Bench(model, adapter, Sft(), Trainer(steps=2, batch=3, packing=packing, checkpointing=wanted), 0, 1)
            found.append(fit(bench, [Job("a", 0, _rows(9)["a"], Fit(some(adapter)))]))
    assert _worst(found[0], found[2]) == 0
    assert _worst(found[1], found[3]) == 0
    assert _worst(found[0], found[1]) < 1e-6


@each
@pytest.mark.parametrize("packing", [False, True])
def test_a_cohort_equals_one_after_another(kind: str, packing: bool) -> None:
    model, adapter = attached(kind)
    bench = Bench(model, adapter, Sft(), Trainer(epochs=1, batch=4, lr=1e-2, micro_tokens=128, packing=packing), 0, 1)
    jobs = lambda: [Job(n, 1, _rows(9)[n], Fit(some(adapter, k))) for k, n in enumerate(NAMES)]
    apart, together = [fit(bench, [job])[0] for job in jobs()], fit(bench, jobs())
    # transformers' norms compute in float32, and AdamW makes the rounding of a small gradient a step
    assert _worst(apart, together) < 1e-6
    assert len({one.steps for one in apart}) > 1  # some are done before others
    moved = [
        float((f.params[n] - t).abs().max())
        for f, j in zip(apart, jobs(), strict=True)
        for n, t in j.effect.start.items()
    ]
    assert min(moved) > 1e-4


@each
def test_padded_and_packed_rows_have_one_loss(kind: str) -> None:
    model, adapter = attached(kind)
    params, rows = some(adapter), _rows(9)["c"]
    benches = [Bench(model, adapter, Sft(), Trainer(packing=packing), 0, 1) for packing in (False, True)]
    sums = [score(bench, rows, params).scalars for bench in benches]
    assert sums[0] == pytest.approx(sums[1], rel=1e-10)
    slopes = [gradient(bench, rows, params) for bench in benches]
    for name, slope in slopes[0].items():
        torch.testing.assert_close(slope, slopes[1][name], rtol=0, atol=1e-7)
    want, count = 0.0, 0
    for i in range(len(rows)):
        logs = naive(tiny_model(torch.float64), kind, tokens_of(params), rows[i].ids[None].long())[0].log_softmax(-1)
        at = [p for p in range(1, len(rows[i].ids)) if rows[i].train[p]]
        want, count = want - sum(float(logs[p - 1, rows[i].ids[p]].detach()) for p in at), count + len(at)
    assert sums[0]["nll"] == pytest.approx(want, rel=1e-9)
    assert sums[0]["tokens"] == count


@each
def test_answers_token_by_token_are_those_of_the_whole_text(kind: str) -> None:
    """`oracle` reads the whole text again for each token; the loop pads on the left and shares what prompts share."""
    model, adapter = attached(kind)
    adapter.load([some(adapter)])
    ends = [2, *range(5, 272, 5)]  # answers end at different times, so rows leave the batch and others join it
    model.generation_config.eos_token_id = ends
    expected = [oracle(model, prompt, 12, ends) for prompt in PROMPTS]
    model.generation_config.eos_token_id = ends
    assert greedy(model, TOKENIZER, PROMPTS, 12, batch_rows=3) == expected
    assert greedy(model, TOKENIZER, PROMPTS, 12, batch_rows=1) == expected
    assert ["".join(sample(model, TOKENIZER, prompt, 12, 0.0, 1.0, 0)) for prompt in PROMPTS] == expected
    assert len(set(expected)) > 3
    with adapter.off():
        assert greedy(model, TOKENIZER, PROMPTS, 12) != expected


@each
def test_logits_over_a_cache_are_those_of_training(kind: str) -> None:
    plain, (model, adapter) = tiny_model(torch.float64), attached(kind)
    params = some(adapter)
    adapter.load([params])
    rows = TOKENIZER(PROMPTS[:3], add_special_tokens=False)["input_ids"]
    with evaluating(model), torch.inference_mode():
        batch: Batch = begin(rows, beginning(model, rows), model.device)
        for _ in range(3):
            logits = batch.logits(model)[:, -1]
            for row, found in zip(rows, logits, strict=True):
                expected = naive(plain, kind, tokens_of(params), torch.tensor([row]))[0, -1]
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
                row.append(int(found.argmax()))
            batch = batch.extended(logits.argmax(-1))


@each
def test_likelihoods_are_those_of_one_pass_a_pair(kind: str) -> None:
    model, adapter = attached(kind)
    with_base = [one.logprob for one in likelihoods(model, TOKENIZER, PAIRS)]
    adapter.load([some(adapter)])
    check(model, PAIRS)
    assert [one.logprob for one in likelihoods(model, TOKENIZER, PAIRS)] != with_base


@each
def test_another_adapter_is_answered_with_at_once(kind: str) -> None:
    model, adapter = attached(kind)
    found = []
    for seed in (1, 2, 1):
        adapter.load([some(adapter, seed)])
        found.append(greedy(model, TOKENIZER, PROMPTS[:2], 8))
    assert found[0] == found[2] != found[1]


@each
def test_transformers_own_generation_knows_nothing(kind: str) -> None:
    model, adapter = attached(kind)
    adapter.load([some(adapter)])
    model.generation_config.eos_token_id = 2
    ids = TOKENIZER(PROMPTS[1], return_tensors="pt", add_special_tokens=False)["input_ids"]
    theirs = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert [TOKENIZER.decode(theirs, skip_special_tokens=True)] == greedy(model, TOKENIZER, PROMPTS[1:2], 8)


@each
def test_peft_loads_the_folder_and_computes_the_same(kind: str, tmp_path: Path) -> None:
    plain, (model, adapter) = tiny_model(torch.float64), attached(kind)
    params = some(adapter)
    adapter.save(tmp_path / "a", params, "tiny")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "a", autocast_adapter_dtype=False)
    (own,) = (p for name, p in loaded.named_parameters() if "prompt_encoder" in name)
    assert tuple(own.shape) == tuple(tokens_of(params).shape)
    torch.testing.assert_close(own.double(), tokens_of(params), rtol=0, atol=1e-6)
    own.data = tokens_of(params).clone()  # peft makes the place for them in float32
    adapter.load([params])
    theirs = loaded(input_ids=IDS).logits[:, -IDS.shape[1] :]
    torch.testing.assert_close(model(input_ids=IDS).logits, theirs, rtol=0, atol=1e-10)

    assert set(adapter.read(tmp_path / "a")) == set(params)
    for name, t in adapter.read(tmp_path / "a").items():
        assert torch.equal(t, params[name])
    part = type(PARTS[kind]).from_peft(peft.PeftConfig.from_pretrained(str(tmp_path / "a")))
    assert part is not None
    other, ours = tiny_model(torch.float64), model(input_ids=IDS).logits
    again = part.attach(other)
    again.load([part.read(tmp_path / "a")])
    torch.testing.assert_close(other(input_ids=IDS).logits, ours, rtol=0, atol=1e-10)


def test_the_encoder_is_pefts() -> None:
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=M, token_dim=32, num_transformer_submodules=1, num_attention_heads=4, num_layers=2,
        encoder_hidden_size=12,
    )  # fmt: skip
    theirs = peft.PromptEncoder(config).double()
    params = {
        f"prompt_encoder.{n.replace('.weight', '') if 'embedding' in n else n}": p for n, p in theirs.named_parameters()
    }
    _, adapter = attached("encoder")
    assert {n: tuple(p.shape) for n, p in params.items()} == adapter.shapes()
    expected = theirs(torch.arange(M)[None])
    torch.testing.assert_close(encode({name: t[None] for name, t in params.items()}), expected, rtol=0, atol=1e-12)


@each
def test_the_start_is_drawn_from_our_own_stream(kind: str) -> None:
    _, adapter = attached(kind)
    first = adapter.init(3, torch.float64)
    torch.manual_seed(5)
    again = attached(kind)[1].init(3, torch.float64)
    assert first.keys() == again.keys() == adapter.shapes().keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(tokens_of(first), tokens_of(adapter.init(4, torch.float64)))
    assert not torch.equal(tokens_of(first), tokens_of(adapter.init(3, torch.float64, round_=1)))
    assert all(t.dtype is torch.float32 for t in adapter.init(3).values())
    torch.testing.assert_close(tokens_of(first).float(), tokens_of(adapter.init(3)), rtol=0, atol=1e-6)


def test_a_drawn_prompt_is_as_large_as_the_table() -> None:
    model = tiny_model()
    start = PromptTuning(tokens=400).attach(model).init(0)[EMBEDDINGS]
    assert float(start.std()) == pytest.approx(float(model.get_input_embeddings().weight.detach().std()), rel=0.05)


@pytest.mark.parametrize("part", [PromptTuning, PrefixTuning])
def test_a_text_to_start_from_makes_the_model_read_it(part: Any, tiny_folder: Path) -> None:
    """Nothing trained yet: the same as if the text stood before every row, cut or repeated to m tokens."""
    model = tiny_model(torch.float64)
    model.name_or_path = str(tiny_folder)
    own = TOKENIZER("ab", add_special_tokens=False)["input_ids"]
    adapter = part(tokens=M, text="ab").attach(model)
    adapter.load([adapter.init(0, torch.float64)])
    said = torch.tensor([(own * M)[:M]] * 2)
    expected = tiny_model(torch.float64)(input_ids=torch.cat([said, IDS], 1)).logits[:, M:]
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-10)
    if part is PrefixTuning:  # without a text: as if tokens stood there that were drawn
        drawn = adapter.words(None, torch.Generator().manual_seed(0))
        assert all((model.get_input_embeddings().weight.double() == row).all(1).any() for row in drawn)


def test_embeddings_that_an_encoder_moves_are_what_the_encoder_gives() -> None:
    """Seed 0 draws the encoder of every round, so from its own embeddings one round is that of the encoder itself."""
    found = []
    for kind in ("encoder", "embeddings"):
        model, adapter = attached(kind)
        bench = Bench(model, adapter, Sft(), Trainer(steps=3, batch=4, lr=1e-2), 0, 1)
        (done,) = fit(bench, [Job("a", 0, _rows()["a"], Fit(adapter.init(0, torch.float64)))])
        found.append((tokens_of(done.params), tokens_of(adapter.init(0, torch.float64)), done.losses))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-10)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-10)
    assert float((found[0][0] - found[0][1]).abs().max()) > 1e-3


@each
def test_training_lowers_the_loss(kind: str) -> None:
    model, adapter = attached(kind)
    bench = Bench(model, adapter, Sft(), Trainer(steps=20, batch=7, lr=3e-2), 0, 1)
    (done,) = fit(bench, [Job("a", 0, _rows()["a"], Fit(adapter.init(0, torch.float64)))])
    assert done.losses[-1] < done.losses[0] - 0.2


def test_a_penalty_on_embeddings_reaches_the_encoder() -> None:
    model, adapter = attached("embeddings")
    start = some(adapter)

    def pulled(mu: float) -> Fitted:
        penalty = lambda params: mu * sum((params[n] - start[n]).square().sum() for n in start)
        bench = Bench(model, adapter, Sft(), Trainer(steps=5, batch=4, lr=1e-2), 0, 1)
        return fit(bench, [Job("a", 0, _rows()["a"], Fit(start, penalty=penalty))])[0]

    far, near = (float((pulled(mu).params[EMBEDDINGS] - start[EMBEDDINGS]).norm()) for mu in (0.0, 100.0))
    assert 0 < near < far / 2


def test_a_frozen_embedding_is_not_moved_by_an_encoder() -> None:
    _, adapter = attached("embeddings")
    start = some(adapter)
    stack = adapter.load([start], lambda name: False)
    assert stack.moving == []
    assert torch.equal(stack.values(0)[EMBEDDINGS], start[EMBEDDINGS])


def test_a_correction_of_embeddings_has_no_place_in_an_encoder() -> None:
    model, adapter = attached("embeddings")
    bench = Bench(model, adapter, Sft(), Trainer(steps=1), 0, 1)
    effect = Fit(some(adapter), correct=Correction(some(adapter), "gradient"))
    with pytest.raises(ModelError, match=r"set adapter\.share=encoder"):
        fit(bench, [Job("a", 0, _rows()["a"], effect)])


@each
def test_nothing_can_be_merged(kind: str) -> None:
    model, adapter = attached(kind)
    with pytest.raises(ModelError, match="export with --to adapter"):
        adapter.merged(model, some(adapter))


def test_folders_of_another_kind_or_size_are_refused(tmp_path: Path) -> None:
    prompt, prefix, encoder = (attached(kind)[1] for kind in ("prompt", "prefix", "encoder"))
    prompt.save(tmp_path / "prompt", prompt.init(0), "tiny")
    prefix.save(tmp_path / "prefix", prefix.init(0), "tiny")
    for adapter, folder in ((prompt, "prefix"), (prefix, "prompt"), (encoder, "prefix")):
        with pytest.raises(ModelError, match="cannot take"):
            adapter.read(tmp_path / folder)
    with pytest.raises(ModelError, match=r"set adapter\.tokens=5"):
        PromptTuning(tokens=4).attach(tiny_model()).read(tmp_path / "prompt")
    with pytest.raises(ModelError, match=r"without encoder\.safetensors"):
        encoder.read(tmp_path / "prompt")  # embeddings: good to answer with, and not to train on
    model = tiny_model()
    PARTS["encoder"].attach(model).load([PARTS["encoder"].read(tmp_path / "prompt")])
    with pytest.raises(ModelError, match="do not fit"):
        encoder.load([{EMBEDDINGS: torch.zeros(M, 31)}])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        prompt.read(tmp_path)


def test_a_text_without_tokens_is_refused(tiny_folder: Path) -> None:
    model = tiny_model()
    model.name_or_path = str(tiny_folder)
    adapter = PromptTuning(text=" ").attach(model)
    assert adapter.init(0)[EMBEDDINGS].shape == (20, 32)  # a space is a token here
    model.name_or_path = "no/such"
    with pytest.raises(ModelError, match=r"adapter\.text"):
        adapter.init(0)


@each
@pytest.mark.parametrize("lengths", [[40], [12, 30, 55]])
def test_operations_are_what_torch_counts(kind: str, lengths: list[int]) -> None:
    model = tiny_model().requires_grad_(False)
    model.set_attn_implementation("eager")
    adapter = PARTS[kind].attach(model)
    start = Fit(adapter.init(0))
    ours = cost.of_rows(cost.shapes_of(model, adapter), start, lengths, [10] * len(lengths))
    assert ours == pytest.approx(counted(model, adapter, lengths, 10), rel=0.08)
    virtual = cost.shapes_of(model, adapter)
    more = cost.of_rows(virtual, start, [n + 1 for n in lengths], [10] * len(lengths))
    assert more > ours
