"""Encoding: labels are exact, nothing is cut, and the cache spares all tokenising without ever being wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from fedloom.data.encode import CHUNK, Left, encode, encode_spans
from fedloom.data.rows import Row, Turn
from fedloom.data.templates import Alpaca, Chat, Plain, Span, Template
from fedloom.types import DataError, ModelError


def row(answer: str, prompt: str = "Hi", name: str = "r") -> Row:
    return Row(name, (Turn("user", prompt), Turn("assistant", answer)), {})


ROWS = [row("Hello", name="a"), row("Zürich 日本 🙂", name="b"), row("  two\n\nlines\n", "x" * 30, name="c")]


def labels(tokenizer: PreTrainedTokenizerFast, template: Template, rows: list[Row]) -> list[str]:
    encoded, _, _ = encode(rows, tokenizer, template, 10**6, None, None)
    examples = [encoded.example(i) for i in range(len(encoded))]
    return [tokenizer.decode(example.ids[example.train]) for example in examples]


def expected(rows: list[Row], end: str) -> list[str]:
    return [row.turns[1].text + end for row in rows]


@pytest.mark.parametrize("template", [Chat(), Alpaca(), Plain()], ids=lambda part: part.part_name)
def test_labels_are_the_answer_and_its_end_token_though_pad_is_eos(template: Template) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert labels(tokenizer, template, ROWS) == expected(ROWS, "<|im_end|>")


def test_ids_are_those_of_the_tokenizers_own_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    encoded, kept, left = encode(ROWS, tokenizer, Chat(), 10**6, "Be kind.", None)
    assert (kept, left) == ([0, 1, 2], Left())
    for i, one in enumerate(ROWS):
        messages = [{"role": "system", "content": "Be kind."}]
        messages += [{"role": turn.role, "content": turn.text} for turn in one.turns]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert encoded.example(i).ids.tolist() == ids
        assert encoded.length(i) == len(ids)


def test_arrays_have_the_promised_form() -> None:
    encoded, _, _ = encode(ROWS, tiny_tokenizer(), Chat(), 10**6, None, None)
    kinds = (encoded.ids.dtype, encoded.train.dtype, encoded.starts.dtype, encoded.answer_bytes.dtype)
    assert kinds == (np.int32, np.bool_, np.int64, np.int64)
    assert encoded.starts.shape == (4,)
    assert encoded.starts[-1] == len(encoded.ids) == len(encoded.train)
    assert encoded.answer_bytes.tolist() == [5, len("Zürich 日本 🙂".encode()), 13]
    example = encoded.example(1)
    assert (example.ids.dtype, example.train.dtype) == (torch.int64, torch.bool)
    before = encoded.train.copy()
    example.train.fill_(False)
    assert encoded.train.tolist() == before.tolist()


def test_every_answer_of_a_dialogue_is_trained() -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    assert labels(tiny_tokenizer(), Chat(), [Row("r", turns, {})]) == ["b<|im_end|>d<|im_end|>"]


def test_long_rows_are_left_out_and_counted_never_cut() -> None:
    tokenizer = tiny_tokenizer()
    exact = encode(ROWS[:1], tokenizer, Chat(), 10**6, None, None)[0].length(0)
    rows = [row("Hello?"), ROWS[0], row("Hello!!")]
    encoded, kept, left = encode(rows, tokenizer, Chat(), exact, None, None)
    assert (kept, left, left.total) == ([1], Left(too_long=2), 2)
    assert encoded.length(0) == exact
    with pytest.raises(DataError, match=rf"3 have more than data\.max_tokens={exact - 1} tokens"):
        encode(rows, tokenizer, Chat(), exact - 1, None, None)


def test_rows_without_a_label_are_left_out_and_counted() -> None:
    tokenizer = tiny_tokenizer()
    silent = Row("s", (Turn("user", "Hi"),), {})
    _, kept, left = encode([silent, *ROWS], tokenizer, Chat(), 10**6, None, None)
    assert (kept, left) == ([1, 2, 3], Left(no_label=1))
    with pytest.raises(DataError, match="1 have no assistant text"):
        encode([silent], tokenizer, Chat(), 10**6, None, None)


def test_a_token_across_the_border_is_no_label() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    spans = [[Span("aa", False), Span("bab", True), Span("</s>", True)]]
    encoded, _, _ = encode_spans(spans, tokenizer, 99, None)
    assert encoded.ids.tolist() == [0, 2, 2, 3]
    assert encoded.train.tolist() == [False, False, True, True]


def test_a_token_across_two_trained_spans_is_a_label() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    encoded, _, _ = encode_spans(
        [[Span("b", False), Span("a", True), Span("b", True)]],
        PreTrainedTokenizerFast(tokenizer_object=backend),
        99,
        None,
    )
    assert (encoded.ids.tolist(), encoded.train.tolist()) == ([1, 2], [False, True])


def test_a_token_without_text_after_the_end_token_is_no_label() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "\u2581": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    encoded, _, _ = encode_spans(
        [[Span("a", False), Span("b", True), Span("</s>", True), Span("a", False)]], tokenizer, 99, None
    )
    assert encoded.ids.tolist() == [2, 0, 1, 3, 2, 0]
    assert encoded.train.tolist() == [False, False, True, True, False, False]


def test_the_first_token_is_no_label() -> None:
    encoded, _, _ = encode_spans([[Span("abc", True)]], tiny_tokenizer(), 99, None)
    assert encoded.train.tolist() == [False, True, True]


def test_an_end_token_that_swallows_white_space_is_trained() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": AddedToken("<|end|>", rstrip=True, special=True)})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|end|>")
    encoded, _, _ = encode(ROWS[:1], tokenizer, Chat(), 999, None, None)
    example = encoded.example(0)
    assert example.ids[example.train].tolist() == [*tokenizer("Hello").input_ids, tokenizer.eos_token_id]


def trimming_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that merges, whose offsets leave white space out, as those of RoBERTa do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["to be or not to be", "that is the question", "a\n\n\nb\n\nc"] * 9, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_offsets_that_leave_white_space_out_do_not_shift_the_mask() -> None:
    rows = [row("to be  or not", "the question"), row("日本 is the question\n", "a\n\n\n")]
    tokenizer = trimming_tokenizer()
    assert tokenizer("the be", return_offsets_mapping=True).offset_mapping[-1] == (4, 6)
    assert labels(tokenizer, Plain(), rows) == expected(rows, "</s>")


@pytest.mark.data
def test_gpt2s_real_vocabulary_labels_the_answers(data_home: Path) -> None:
    folder = data_home / "tiny_lm" / "gpt2_tokenizer"
    tokenizer = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    assert len(tokenizer) == 50257
    rows = [*ROWS[:2], row("def f(x):\n    return x  # naïve", "Write code.")]
    assert labels(tokenizer, Alpaca(), rows) == expected(rows, "<|endoftext|>")


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"Slow.*tokenizer\.json"):
        encode_spans([[Span("a", True)]], Slow(), 9, None)  # type: ignore[arg-type]


def test_a_row_that_cannot_be_rendered_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"row a: .*no chat template"):
        encode(ROWS, tokenizer, Chat(), 9, None, None)


def test_progress_counts_rows() -> None:
    done: list[int] = []
    spans = [[Span("ab", True)]] * (CHUNK + 5)
    encoded, kept, _ = encode_spans(spans, tiny_tokenizer(), 9, None, done.append)
    assert done == [CHUNK, CHUNK + 5]
    assert len(encoded) == len(kept) == CHUNK + 5


class Counting(PreTrainedTokenizerFast):
    calls = 0

    def __call__(self, *args: object, **kwargs: object) -> object:
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


def counting() -> Counting:
    tiny = tiny_tokenizer()
    Counting.calls = 0
    return Counting(tokenizer_object=tiny.backend_tokenizer, eos_token="<|im_end|>", chat_template=tiny.chat_template)


def test_a_second_run_does_not_tokenise(tmp_path: Path) -> None:
    tokenizer = counting()
    rows = [*ROWS, row("x" * 200)]
    first = encode(rows, tokenizer, Chat(), 150, None, tmp_path)
    assert Counting.calls == 1
    again = encode(rows, tokenizer, Chat(), 150, None, tmp_path)
    assert Counting.calls == 1
    assert again[1:] == first[1:] == ([0, 1, 2], Left(too_long=1))
    for name in ("ids", "train", "starts", "answer_bytes"):
        a, b = getattr(first[0], name), getattr(again[0], name)
        assert (a.dtype, a.tolist()) == (b.dtype, b.tolist())
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_whatever_changes_the_result_misses_the_cache(tmp_path: Path) -> None:
    tokenizer = counting()
    encode(ROWS, tokenizer, Chat(), 150, None, tmp_path)
    encode(ROWS[:2], tokenizer, Chat(), 150, None, tmp_path)
    encode(ROWS, tokenizer, Chat(), 151, None, tmp_path)
    encode(ROWS, tokenizer, Chat(), 150, "Be kind.", tmp_path)
    encode(ROWS, tokenizer, Plain(), 150, None, tmp_path)
    encode_spans([[Span("a", False), Span("b", True)]], tokenizer, 150, tmp_path)
    encode_spans([[Span("a", True), Span("b", True)]], tokenizer, 150, tmp_path)
    tokenizer.add_tokens(["Hello"])
    encode(ROWS, tokenizer, Chat(), 150, None, tmp_path)
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize("damage", [lambda raw: raw[:-40] + bytes([raw[-40] ^ 1]) + raw[-39:], lambda raw: raw[:50]])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage: object) -> None:
    tokenizer = counting()
    first, _, _ = encode(ROWS, tokenizer, Chat(), 150, None, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))  # type: ignore[operator]
    again, _, _ = encode(ROWS, tokenizer, Chat(), 150, None, tmp_path)
    assert Counting.calls == 2
    assert again.ids.tolist() == first.ids.tolist()
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        encode(ROWS, tiny_tokenizer(), Chat(), 150, None, blocked / "cache")
