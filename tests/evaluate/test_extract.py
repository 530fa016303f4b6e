from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from fedloom.client.generate import cut
from fedloom.evaluate.extract import RULES, flexible, has_marker, numeric, strict
from fedloom.types import DataError


@pytest.mark.parametrize(
    ("output", "gold", "right"),
    [  # which rules call it right; the first two are those of lm-evaluation-harness 0.4.13
        ("#### $18.00", "18", {"numeric"}),
        ("#### 18.00", "18", {"numeric"}),
        ("#### 18.", "18", {"strict", "flexible", "numeric"}),
        ("#### 1,000", "1000", {"strict", "flexible", "numeric"}),
        ("#### -5", "-5", {"strict", "flexible", "numeric"}),
        ("#### −5", "-5", {"numeric"}),
        ("####18", "18", {"flexible", "numeric"}),
        ("#### **18**", "18", {"flexible", "numeric"}),
        ("#### 1/2", "0.5", {"numeric"}),
        ("#### 4 no, wait\n#### 9", "9", {"flexible", "numeric"}),
        ("#### 9\n\nQuestion: And then?\n#### 7", "9", {"strict"}),
        ("She has $18 left. (3 x 6)", "18", set()),
        ("It costs 9 - 5", "4", set()),
        ("#### 18 dollars in 7 days", "18", {"strict", "numeric"}),
    ],
)
def test_rules_on_the_known_hard_cases(output: str, gold: str, right: set[str]) -> None:
    assert {name for name, rule in RULES.items() if rule(output, gold)} == right
    assert {name for name, rule in RULES.items() if rule(output, f"3 + 6 = 9 or so.\n#### {gold}")} == right


def test_the_wrong_readings_are_those_of_the_harness() -> None:
    assert flexible("#### −5") == "5"
    assert (strict("#### 1/2"), flexible("#### 1/2")) == ("1", "2")
    assert strict("#### 4 no, wait\n#### 9") == "4"
    assert flexible("#### 18 dollars in 7 days") == "7"
    assert strict("####18") is None
    assert flexible("no digits") is None


def test_numeric_is_right_once_the_text_is_cut_at_its_stop_string() -> None:
    assert RULES["numeric"](cut("#### 9\n\nQuestion: And then?\n#### 7", ["Question:"]), "9")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 12 apples, not 13.", 12),
        ("THE ANSWER IS: $1,234.50.", Fraction(2469, 2)),
        (r"so \boxed{42} of 50", 42),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"\boxed{-\$3}", -3),
        ("#### 5 is the sum. The answer is 6", 6),  # the last marker counts
        ("It is 7.\n####", 7),  # a marker without a number
        ("16-3-4=9", 9),
        ("from 9-5", 5),  # a subtraction is no negative number
        ("x=-5", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("it is .5", Fraction(1, 2)),
        ("1,2,3", 3),
        ("9/0", 0),
        ("0", 0),
        ("#### 0", 0),
        ("0.10", Fraction(1, 10)),
        ("none", None),
        ("", None),
    ],
)
def test_numeric_reads(text: str, value: Fraction | int | None) -> None:
    assert numeric(text) == value


def test_zero_is_a_number_and_nothing_is_not() -> None:
    assert RULES["numeric"]("#### 0.0", "0")
    assert not any(rule("no number", "0") for rule in RULES.values())


@pytest.mark.parametrize(
    ("text", "marked"),
    [("#### 5", True), ("the Answer is 5", True), (r"\boxed{5}", True), ("5 ####", False), ("it is 5", False)],
)
def test_a_marker_needs_a_number_behind_it(text: str, marked: bool) -> None:
    assert has_marker(text) is marked


def test_a_gold_answer_without_a_number_is_an_error_in_the_data() -> None:
    for rule in RULES.values():
        with pytest.raises(DataError, match="'#### none' holds no number"):
            rule("#### 5", "#### none")


@pytest.mark.data
@pytest.mark.parametrize(("split", "count"), [("test", 1319), ("train", 7473)])
def test_every_gold_answer_is_read_right(data_home: Path, split: str, count: int) -> None:
    lines = (data_home / "gsm8k" / f"gsm8k_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    golds = [json.loads(line)["answer"] for line in lines]
    assert len(golds) == count
    for gold in golds:
        number = gold.rpartition("#### ")[2].replace(",", "")
        assert (strict(gold), flexible(gold), numeric(gold)) == (number, number, int(number))
        assert has_marker(gold)
        assert all(rule(gold, gold) for rule in RULES.values())
