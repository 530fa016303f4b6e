"""Templates: the text is the model's own, and the mask covers every answer with its end token, and nothing else."""

from __future__ import annotations

import pytest
from tests.tiny import tiny_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from fedloom.data.rows import Turn
from fedloom.data.templates import Alpaca, Chat, Plain, Span, Template, with_system
from fedloom.types import DataError, ModelError

TALK = (Turn("user", "Hi"), Turn("assistant", "Hello  "), Turn("user", "Bye"), Turn("assistant", "Good bye."))
ASKED = (Turn("user", "Add.\n\n1 2", "1 2"), Turn("assistant", "3"))
TEMPLATES = [Chat(), Alpaca(), Plain()]


def text(spans: list[Span]) -> str:
    return "".join(span.text for span in spans)


def trained(spans: list[Span]) -> list[str]:
    return [span.text for span in spans if span.train]


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("turns", [TALK, ASKED, (Turn("system", "Be kind."), *TALK), TALK[:3]])
def test_chat_equals_the_tokenizers_own_template(turns: tuple[Turn, ...]) -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    whole = text(Chat().render(turns, tokenizer))
    assert whole == tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert tokenizer(whole, add_special_tokens=False).input_ids == ids
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert Chat().prompt(turns, tokenizer) == prompt


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda part: part.part_name)
@pytest.mark.parametrize("turns", [TALK, (Turn("system", "Be kind."), *TALK), ASKED])
def test_exactly_the_answers_and_their_end_tokens_are_trained(template: Template, turns: tuple[Turn, ...]) -> None:
    spans = template.render(turns, tiny_tokenizer())
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    assert trained(spans) == [part for answer in answers for part in (answer, "<|im_end|>")]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda part: part.part_name)
def test_a_prompt_begins_the_training_text_up_to_the_answer(template: Template) -> None:
    tokenizer = tiny_tokenizer()
    for turns in (ASKED, TALK, TALK[:2]):
        before, answer = template.prompt(turns[:-1], tokenizer), turns[-1].text
        assert text(template.render(turns, tokenizer)).startswith(f"{before}{answer}<|im_end|>")


def test_chat_refuses_a_template_that_rewrites_earlier_turns() -> None:
    forgetful = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"changes earlier text.*data\.template=alpaca"):
        Chat().render(TALK, with_template(forgetful))


def test_chat_explains_what_it_cannot_do() -> None:
    with pytest.raises(DataError, match=r"no chat template.*data\.template=alpaca or plain"):
        Chat().render(TALK, with_template(None))
    with pytest.raises(DataError, match="without an end token"):
        Chat().render(TALK, with_template("{% for m in messages %}{{ m.content }}\n{% endfor %}"))
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    with pytest.raises(DataError, match=r"system, user.*No system.*leave data\.system unset"):
        Chat().render(with_system(TALK, "Be kind."), with_template(strict))


def test_a_template_that_trims_answers_trains_the_trimmed_text() -> None:
    trimming = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert trained(Chat().render(TALK[:2], with_template(trimming))) == ["Hello", "<|im_end|>"]


def test_a_template_that_prints_the_date_prints_the_same_one_for_ever() -> None:
    dated = (
        "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }}"
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    assert Chat().prompt(TALK[:1], with_template(dated)) == "26 Jul 2024Hi<|im_end|>"


def test_alpaca_sets_instruction_and_input_apart() -> None:
    spans = Alpaca().render(ASKED, tiny_tokenizer())
    assert text(spans).endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>")
    bare = text(Alpaca().render(TALK[:2], tiny_tokenizer()))
    assert "### Input" not in bare
    assert "None" not in bare
    assert bare.endswith("\n\n### Instruction:\nHi\n\n### Response:\nHello  <|im_end|>")
    assert text(Alpaca().render(with_system(TALK, "Be kind."), tiny_tokenizer())).startswith("Be kind.\n\n### Instr")


def test_bos_is_written_only_where_the_tokenizer_adds_it() -> None:
    tokenizer = tiny_tokenizer()
    for template in (Alpaca(), Plain()):
        assert not text(template.render(TALK, tokenizer)).startswith("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    for template in (Alpaca(), Plain()):
        assert text(template.render(TALK, tokenizer)).startswith("<|im_start|>")
        assert template.prompt(TALK[:1], tokenizer).count("<|im_start|>") == 1


def test_markers_need_an_end_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"data\.template=plain: the tokenizer has no end token"):
        Plain().render(TALK, tokenizer)


def test_a_system_prompt_is_put_in_only_where_there_is_none() -> None:
    own = (Turn("system", "Mine."), *TALK)
    assert with_system(TALK, "Be kind.") == (Turn("system", "Be kind."), *TALK)
    assert with_system(own, "Be kind.") == own
    assert with_system(TALK, None) == TALK
