from __future__ import annotations

import math

import pytest
import torch
from tests.client.test_generate import recurrent, sliding, watched
from tests.tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from fedloom.client import likelihood
from fedloom.client.likelihood import Likelihood, likelihoods
from fedloom.types import DataError

TOKENIZER = tiny_tokenizer()
HEAD = "Questions about things.\n\n"
PAIRS = [
    *((f"{HEAD}What is it?\nAnswer:", f" {letter}") for letter in "ABCD"),
    (f"{HEAD}Why, and since when, and for whom?\nAnswer:", " because"),
    (f"{HEAD}Why, and since when, and for whom?\nAnswer:", " because of it"),
    (f"{HEAD}Who? ", "nobody"),
]


def oracle(model: PreTrainedModel, context: str, continuation: str) -> Likelihood:
    """One pair, no padding, no cache."""
    ids = TOKENIZER(context + continuation, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = len(TOKENIZER(context.rstrip(), add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    wanted = ids[0, 1:]
    own = [(float(logs[i, wanted[i]]), int(logs[i].argmax()) == int(wanted[i])) for i in range(start - 1, len(wanted))]
    return Likelihood(sum(p for p, _ in own), len(own), all(hit for _, hit in own))


def check(model: PreTrainedModel, pairs: list[tuple[str, str]]) -> None:
    for one, (context, continuation) in zip(likelihoods(model, TOKENIZER, pairs), pairs, strict=True):
        expected = oracle(model, context, continuation)
        assert one.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert (one.tokens, one.greedy) == (expected.tokens, expected.greedy)


def test_equals_one_pass_a_pair() -> None:
    check(tiny_model(), PAIRS)


@pytest.mark.parametrize("build", [sliding, recurrent])
def test_other_caches(build: object) -> None:
    check(build(), PAIRS)  # type: ignore[operator]


def test_passes_of_one_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "PASS_TOKENS", 1)
    check(tiny_model(), PAIRS)


def test_continuations_that_begin_alike_are_not_taken_for_context() -> None:
    check(tiny_model(), [("Q: x\nA:", " not true"), ("Q: x\nA:", " not false")])


def test_white_space_belongs_to_the_continuation() -> None:
    with_space, without = likelihoods(tiny_model(), TOKENIZER, [("a ", "b"), ("a", " b")])
    assert with_space == without


def test_greedy_where_the_most_likely_token_is_asked_for() -> None:
    model, found = tiny_model(), []
    for context in map(chr, range(97, 123)):
        ids = TOKENIZER(context, add_special_tokens=False, return_tensors="pt")["input_ids"]
        best = TOKENIZER.decode([int(model(input_ids=ids).logits[0, -1].argmax())])
        if best.isascii() and best.isprintable() and len(best) == 1:
            found += likelihoods(model, TOKENIZER, [(context, best), (context, "z" if best != "z" else "y")])
    assert found
    assert all(hit.greedy and not miss.greedy for hit, miss in zip(found[::2], found[1::2], strict=True))


def test_letters_of_a_question_take_one_row_and_the_beginning_one_pass() -> None:
    model = tiny_model()
    with watched(model) as shapes:
        likelihoods(model, TOKENIZER, PAIRS)
    assert shapes[0][0] == 1  # the common beginning
    assert shapes[0][1] >= len(HEAD)
    assert sum(rows for rows, _ in shapes[1:]) == 4  # four letters share one row


def test_probabilities_of_all_next_tokens_sum_to_one() -> None:
    model = tiny_model()
    letters = [chr(c) for c in range(33, 127)]
    found = likelihoods(model, TOKENIZER, [("the", letter) for letter in letters])
    assert 0 < sum(math.exp(one.logprob) for one in found) < 1


def test_leaves_modes_and_random_streams_alone() -> None:
    model = tiny_model().train()
    state = torch.get_rng_state()
    likelihoods(model, TOKENIZER, PAIRS)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_and_empty_pairs() -> None:
    model = tiny_model()
    assert likelihoods(model, TOKENIZER, []) == []
    with pytest.raises(DataError, match=r"2 of 3 pairs have a context or a continuation without tokens.* index 1"):
        likelihoods(model, TOKENIZER, [("a", "b"), ("a", ""), ("", "b")])
