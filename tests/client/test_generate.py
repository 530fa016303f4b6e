from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.tiny import tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, Qwen3NextConfig, Qwen3NextForCausalLM

from fedloom.client import generate
from fedloom.client.generate import Decoding, answers, cut, greedy, sample
from fedloom.types import DataError, RecipeError

TOKENIZER = tiny_tokenizer()
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
PROMPTS = [SYSTEM + text for text in ("a", "What is this, and why?", "b c", "Add 3 and 4.", "a", "The longest of them")]
MANY_ENDS = [2, *range(5, 272, 5)]  # so that random answers end, at different times


def sliding() -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=16, initializer_range=0.2, eos_token_id=2,
        )
    ).eval()  # fmt: skip


def recurrent() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, initializer_range=0.2, eos_token_id=2, num_experts=0,
            linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        )
    ).eval()  # fmt: skip


def oracle(model: PreTrainedModel, prompt: str, max_new_tokens: int, ends: list[int]) -> str:
    """One prompt, no padding, no cache, the whole text again for each token."""
    ids = TOKENIZER(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(max_new_tokens):
        token = int(model(input_ids=ids).logits[0, -1].argmax())
        if token in ends:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return TOKENIZER.decode(ids[0, start:], skip_special_tokens=True)


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """Collect the (rows, tokens) of every forward pass."""
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


@contextmanager
def scripted(model: PreTrainedModel, tokens: list[int]) -> Iterator[None]:
    """Make the model say these tokens, whatever it is asked."""
    left = iter(tokens)

    def speak(module: Any, args: Any, output: Any) -> Any:
        output.logits = torch.nn.functional.one_hot(torch.tensor([[next(left)]]), 272).float()
        return output

    hook = model.register_forward_hook(speak)
    yield
    hook.remove()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture
def ending() -> PreTrainedModel:
    found = tiny_model()
    found.generation_config.eos_token_id = MANY_ENDS
    return found


@pytest.mark.parametrize("batch_rows", [1, 4, 32])
def test_batches_answer_as_single_prompts_do(ending: PreTrainedModel, batch_rows: int) -> None:
    expected = [oracle(ending, prompt, 20, MANY_ENDS) for prompt in PROMPTS]
    assert len({len(text) for text in expected}) > 2  # rows leave the batch at different times
    assert greedy(ending, TOKENIZER, PROMPTS, 20, batch_rows=batch_rows) == expected


@pytest.mark.parametrize("build", [sliding, recurrent])
def test_caches_that_cannot_share_a_beginning_answer_the_same(build: Any) -> None:
    other = build()
    other.generation_config.eos_token_id = MANY_ENDS
    expected = [oracle(other, prompt, 12, MANY_ENDS) for prompt in PROMPTS]
    with watched(other) as shapes:
        assert greedy(other, TOKENIZER, PROMPTS, 12) == expected
    assert shapes[0][0] == len(PROMPTS)  # no pass for the beginning
    assert shapes[-1][0] < len(PROMPTS)


def test_eager_attention_answers_the_same(ending: PreTrainedModel) -> None:
    expected = greedy(ending, TOKENIZER, PROMPTS, 12)
    ending.set_attn_implementation("eager")
    assert greedy(ending, TOKENIZER, PROMPTS, 12) == expected


def test_prompts_with_nothing_in_common(ending: PreTrainedModel) -> None:
    prompts = ["one", "2", "a longer one"]
    with watched(ending) as shapes:
        answers = greedy(ending, TOKENIZER, prompts, 12)
    assert shapes[0] == (3, len("a longer one"))
    assert answers == [oracle(ending, prompt, 12, MANY_ENDS) for prompt in prompts]


def test_equal_prompts_and_a_prompt_that_begins_all_others(model: PreTrainedModel) -> None:
    for prompts in (["same", "same"], ["be", "begin", "beginning"]):
        assert greedy(model, TOKENIZER, prompts, 6) == [oracle(model, prompt, 6, [2]) for prompt in prompts]


def test_the_common_beginning_is_computed_once_and_finished_rows_leave(ending: PreTrainedModel) -> None:
    common = len(TOKENIZER(SYSTEM, add_special_tokens=False)["input_ids"])
    longest = max(len(TOKENIZER(prompt, add_special_tokens=False)["input_ids"]) for prompt in PROMPTS)
    with watched(ending) as shapes:
        greedy(ending, TOKENIZER, PROMPTS, 20)
    assert shapes[0] == (1, common)
    assert shapes[1] == (len(PROMPTS), longest - common)
    rows = [rows for rows, _ in shapes[1:]]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < rows[0]
    assert {tokens for _, tokens in shapes[2:]} == {1}


def test_ends_early_when_all_rows_have_ended(model: PreTrainedModel) -> None:
    with scripted(model, [68, 69, 2]), watched(model) as shapes:
        assert greedy(model, TOKENIZER, ["x"], 50) == [TOKENIZER.decode([68, 69])]
    assert len(shapes) == 3


def test_the_longest_prompts_come_first(model: PreTrainedModel) -> None:
    with watched(model) as shapes:
        greedy(model, TOKENIZER, ["four", "sixsix", "x", "three"], 1, batch_rows=2)
    assert shapes == [(2, 6), (2, 4)]


def test_prompts_are_tokenised_as_they_are(model: PreTrainedModel) -> None:
    adding = tiny_tokenizer()
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        "<|im_start|> $0", special_tokens=[("<|im_start|>", 1)]
    )
    assert adding("x")["input_ids"] == [1, *TOKENIZER("x")["input_ids"]]
    with watched(model) as shapes:
        greedy(model, adding, ["x"], 1)
    assert shapes == [(1, 1)]


def test_end_tokens_come_from_the_tokenizer_and_from_the_generation_config() -> None:
    for configured, script in ((None, [68, 2, 69]), (7, [68, 7, 69]), (7, [68, 2, 69]), ([7, 8], [68, 8, 69])):
        other = tiny_model()
        other.generation_config.eos_token_id = configured
        with scripted(other, script):
            assert greedy(other, TOKENIZER, ["x"], 3) == [TOKENIZER.decode([68])]


def test_special_tokens_are_no_text(model: PreTrainedModel) -> None:
    with scripted(model, [68, 1, 69]):
        assert greedy(model, TOKENIZER, ["x"], 3) == [TOKENIZER.decode([68, 69])]


def test_stop_strings_cut_the_text_and_end_the_row(model: PreTrainedModel) -> None:
    script = TOKENIZER("It is 9.\n\nQuestion: what", add_special_tokens=False)["input_ids"]
    with scripted(model, script), watched(model) as shapes:
        assert greedy(model, TOKENIZER, ["x"], len(script), stop=["Question:", "###"]) == ["It is 9.\n\n"]
    assert len(shapes) == len("It is 9.\n\nQuestion:")


def test_cut_takes_the_first_stop_string_of_the_text() -> None:
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", ["two"]) == "one"
    assert cut("one", []) == "one"


def test_leaves_modes_gradients_and_random_streams_alone() -> None:
    other = tiny_model().train()
    other.model.layers[0].eval()
    modes = {name: module.training for name, module in other.named_modules()}
    state = torch.get_rng_state()
    greedy(other, TOKENIZER, PROMPTS, 3)
    "".join(sample(other, TOKENIZER, "x", 3, 1.0, 1.0, 0))
    assert {name: module.training for name, module in other.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    other(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()  # no inference tensor was left in the model


def test_restores_modes_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny_model().train()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(generate, "_decode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        greedy(other, TOKENIZER, ["x"], 3)
    assert all(module.training for module in other.modules())


def test_needs_no_pad_token_and_warns_of_nothing(
    ending: PreTrainedModel, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    expected = greedy(ending, TOKENIZER, PROMPTS, 5)
    bare = tiny_tokenizer()
    bare.pad_token = None
    ending.generation_config.update(do_sample=True, temperature=0.3, top_p=0.5)
    assert greedy(ending, bare, PROMPTS, 5) == expected
    assert (capfd.readouterr().err, list(recwarn)) == ("", [])


def test_reports_progress_in_prompts(model: PreTrainedModel) -> None:
    seen: list[int] = []
    greedy(model, TOKENIZER, PROMPTS, 1, batch_rows=4, progress=seen.append)
    assert seen == [4, 6]


def test_no_prompts_and_empty_prompts(model: PreTrainedModel) -> None:
    assert greedy(model, TOKENIZER, [], 5) == []
    with pytest.raises(DataError, match="2 of 3 prompts have no tokens, the first at index 1"):
        greedy(model, TOKENIZER, ["x", "", ""], 5)


def test_temperature_zero_streams_the_greedy_answer(model: PreTrainedModel) -> None:
    [expected] = greedy(model, TOKENIZER, [PROMPTS[0]], 20)
    assert "".join(sample(model, TOKENIZER, PROMPTS[0], 20, 0.0, 1.0, 0)) == expected


def test_samples_depend_on_the_seed_alone(model: PreTrainedModel) -> None:
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(texts))
        texts.append("".join(sample(model, TOKENIZER, "x", 20, 1.0, 1.0, seed)))
    assert texts[0] == texts[1] != texts[2]


def test_a_piece_never_ends_within_a_character(model: PreTrainedModel) -> None:
    script = TOKENIZER("é😀!", add_special_tokens=False)["input_ids"]
    with scripted(model, [*script, 2]):
        assert list(sample(model, TOKENIZER, "x", 50, 0.0, 1.0, 0)) == ["é", "😀", "!"]
    with scripted(model, [*script[:3], 2]):  # what is left incomplete is not lost
        assert list(sample(model, TOKENIZER, "x", 50, 0.0, 1.0, 0)) == ["é", "\N{REPLACEMENT CHARACTER}"]


def test_streaming_does_not_change_the_callers_gradient_mode(model: PreTrainedModel) -> None:
    inside: list[bool] = []
    hook = model.register_forward_pre_hook(lambda *_: inside.append(torch.is_inference_mode_enabled()))
    for _ in sample(model, TOKENIZER, "x", 3, 0.0, 1.0, 0):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    hook.remove()
    assert inside == [True] * 3


@pytest.mark.parametrize(("top_p", "drawn"), [(0.5, {0}), (0.51, {0, 2}), (0.8, {0, 2}), (0.81, {0, 1, 2})])
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float, drawn: set[int]) -> None:
    logits = torch.tensor([0.5, 0.2, 0.3]).log()
    stream = torch.Generator().manual_seed(0)
    assert {generate._draw(logits, top_p - 1e-6, stream) for _ in range(200)} == drawn


def test_draws_follow_the_probabilities() -> None:
    stream = torch.Generator().manual_seed(0)
    drawn = [generate._draw(torch.tensor([0.25, 0.75]).log(), 1.0, stream) for _ in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("temperature", "top_p", "knob"), [(-0.1, 1.0, "temperature is -0.1"), (1.0, 0.0, "top_p is 0")]
)
def test_knobs_out_of_range_are_refused_at_once(
    model: PreTrainedModel, temperature: float, top_p: float, knob: str
) -> None:
    with pytest.raises(RecipeError, match=knob):
        sample(model, TOKENIZER, "x", 3, temperature, top_p, 0)


def test_waiting_prompts_take_the_places_of_ended_ones(ending: PreTrainedModel) -> None:
    prompts = [f"{SYSTEM}{'x' * (7 * i % 23)} {i}" for i in range(24)]
    expected = [oracle(ending, prompt, 20, MANY_ENDS) for prompt in prompts]
    with watched(ending) as shapes:
        assert greedy(ending, TOKENIZER, prompts, 20, batch_rows=8) == expected
    begun = [i for i, (_, tokens) in enumerate(shapes) if tokens > 1][2:]
    assert begun  # after the common beginning and the first batch
    assert any(shapes[i - 1][0] > 1 for i in begun)  # while others were being answered
    assert max(rows for rows, _ in shapes) == 8


def test_columns_that_nobody_needs_any_more_are_dropped(ending: PreTrainedModel) -> None:
    widths: list[int] = []
    hook = ending.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs.get("attention_mask", torch.ones(1, 1)).shape[1]),
        with_kwargs=True,
    )
    greedy(ending, TOKENIZER, [f"{'x' * (60 - i)} {i}" for i in range(40)], 20, batch_rows=4)
    hook.remove()
    assert max(widths) < 60 + 2 * 20  # without that it grows with every prompt


def test_sampled_answers_do_not_depend_on_the_batch() -> None:
    other = tiny_model()
    other.generation_config.eos_token_id = MANY_ENDS
    drawn = [
        answers(other, TOKENIZER, PROMPTS * 2, 12, Decoding(temperature=1.0, top_p=0.9, seed=3, batch_rows=rows))
        for rows in (1, 4, 32)
    ]
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0][: len(PROMPTS)] != drawn[0][len(PROMPTS) :]  # equal prompts are drawn apart
    assert answers(other, TOKENIZER, PROMPTS * 2, 12, Decoding(temperature=1.0, top_p=0.9, seed=4)) != drawn[0]


def test_a_nucleus_of_more_tokens_than_are_sorted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "NUCLEUS", 2)
    logits, stream = torch.tensor([0.3, 0.1, 0.3, 0.3]).log(), torch.Generator().manual_seed(0)
    assert {generate._draw(logits, 0.85, stream) for _ in range(300)} == {0, 2, 3}


def test_no_token_at_all(model: PreTrainedModel) -> None:
    assert greedy(model, TOKENIZER, ["x"], 0) == [""]
