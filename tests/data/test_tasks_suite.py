"""The task suite: pure, disjoint, varied, short, and right, by solving every prompt again from its text alone."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from hashlib import sha256

import pytest

from fedloom.data.tasks import CATEGORIES, SPLITS, Item, contained, exact_match, items, split_of
from fedloom.data.tasks.words import GROUPS, MONTHS, NUMBER_WORDS, THINGS, WEEKDAYS
from fedloom.types import DataError

MANY = 200


@pytest.fixture(scope="module")
def drawn() -> dict[tuple[str, str], list[Item]]:
    """All categories and splits, drawn once."""
    return {(category, split): items(category, split, MANY) for category in CATEGORIES for split in SPLITS}


# ---- the contract of `items` ----------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_items() -> None:
    for category in CATEGORIES:
        assert items(category, "train", 40, seed=3) == items(category, "train", 40, seed=3)
        assert items(category, "train", 40, seed=3) != items(category, "train", 40, seed=4)


def test_the_items_stay_what_they_are() -> None:
    """Every published score depends on them: a change here is a new version of the data set."""
    rows = [items(category, split, 5) for category in CATEGORIES for split in SPLITS]
    assert sha256(repr(rows).encode()).hexdigest()[:16] == "430013ddb2009616"


def test_a_longer_list_begins_with_the_shorter_one(drawn: dict[tuple[str, str], list[Item]]) -> None:
    for (category, split), rows in drawn.items():
        assert items(category, split, 17) == rows[:17]
        assert items(category, split, 0) == []


def test_ids_name_category_split_and_index(drawn: dict[tuple[str, str], list[Item]]) -> None:
    for (category, split), rows in drawn.items():
        assert [row.id for row in rows] == [f"{category}/{split}/{index}" for index in range(MANY)]
        assert {row.category for row in rows} == {category}


def test_no_prompt_is_in_two_splits_for_any_seed(drawn: dict[tuple[str, str], list[Item]]) -> None:
    for category in CATEGORIES:
        prompts = {split: {row.prompt for row in drawn[category, split]} for split in SPLITS}
        for split in SPLITS:
            prompts[split] |= {row.prompt for row in items(category, split, 60, seed=11)}
            assert {split_of(prompt) for prompt in prompts[split]} == {split}
        assert not prompts["train"] & prompts["test"]
        assert not prompts["train"] & prompts["validation"]
        assert not prompts["validation"] & prompts["test"]


def test_the_split_does_not_depend_on_case_or_whitespace() -> None:
    for row in items("dates", "test", 20):
        assert split_of(f"  {row.prompt.upper()}\n") == split_of(row.prompt.replace(" ", "  ")) == "test"


def test_eight_tenths_of_all_prompts_are_for_training() -> None:
    shares = Counter(split_of(f"prompt {index}") for index in range(5000))
    assert 0.77 < shares["train"] / 5000 < 0.83
    assert 0.08 < shares["test"] / 5000 < 0.12


def test_no_prompt_comes_twice() -> None:
    for category in CATEGORIES:
        rows = items(category, "train", 1200)
        assert len({row.prompt.casefold() for row in rows}) == 1200


@pytest.mark.parametrize(
    ("category", "split", "count", "words"),
    [
        ("sortin", "train", 1, ["'sortin'", "'sorting'", "filtering"]),
        ("xyz", "train", 1, ["'xyz'", "arithmetic", "sequences"]),
        ("sorting", "tests", 1, ["'tests'", "'test'", "validation"]),
        ("sorting", "test", -1, ["-1"]),
    ],
)
def test_wrong_arguments_are_refused_with_advice(category: str, split: str, count: int, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        items(category, split, count)
    assert all(word in str(caught.value) for word in words)


# ---- what the items are like ----------------------------------------------------------------------------------------


def test_prompts_and_answers_are_short(drawn: dict[tuple[str, str], list[Item]]) -> None:
    for rows in drawn.values():
        sizes = [_pieces(row.prompt) for row in rows]
        assert statistics.median(sizes) < 50
        assert max(sizes) < 110
        assert max(_pieces(row.answer) for row in rows) <= 16
        assert all(row.answer == row.answer.strip() != "" and "\n" not in row.answer for row in rows)


def test_every_category_has_many_wordings(drawn: dict[tuple[str, str], list[Item]]) -> None:
    for category in CATEGORIES:
        rows = drawn[category, "train"]
        # what stands in nearly no other prompt is a name or a number; the rest is the wording
        frequent = Counter(word for row in rows for word in set(re.findall(r"[A-Za-z]{2,}", row.prompt)))
        common = {word for word, count in frequent.items() if count >= MANY // 40}
        shapes = Counter(" ".join(w for w in re.findall(r"\w+", row.prompt) if w in common) for row in rows)
        assert len(shapes) >= 8, category
        assert max(shapes.values()) < MANY // 4, category


def test_no_constant_answer_gets_far(drawn: dict[tuple[str, str], list[Item]]) -> None:
    for (category, _), rows in drawn.items():
        most = Counter(row.answer for row in rows).most_common(1)[0][1] / MANY
        assert most < (0.6 if category == "logic" else 0.28), category


def test_categories_differ_in_their_answers(drawn: dict[tuple[str, str], list[Item]]) -> None:
    forms = {
        "units": r"\d+ (km|m|cm|mm|t|kg|g|L|mL)",
        "sorting": r"\w+(, \w+){2,}",
        "filtering": r"\w+(; \w+)*",
        "counting": "|".join(NUMBER_WORDS),
        "logic": r"TRUE|FALSE|[A-Z][a-z]+",
        "arithmetic": r"\$?\d+",
    }
    for category, form in forms.items():
        assert all(re.fullmatch(form, row.answer) for row in drawn[category, "test"]), category


def test_groups_of_words_are_disjoint() -> None:
    counts = Counter(word for members in GROUPS.values() for word in members)
    assert counts.most_common(1)[0][1] == 1
    assert len({singular for singular, _ in THINGS}) == len(THINGS)


def _pieces(text: str) -> int:
    """Estimate the tokens of a text: every digit and mark is one, a word one for every six letters."""
    return sum(-(-len(piece) // 6) for piece in re.findall(r"[A-Za-z]+|\d|[^\w\s]|_", text))


# ---- every answer, found again from the prompt alone ----------------------------------------------------------------


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _listed(text: str) -> list[str]:
    """Find the longest run of words with commas between them."""
    runs: list[str] = re.findall(r"(?:[\w-]+, )+[\w-]+", text)
    return max(runs, key=lambda run: run.count(",")).split(", ")


def _arithmetic(prompt: str) -> str:
    a, b = _numbers(prompt)
    sign = "$" if "$" in prompt else ""
    if re.search(r" each\b|a day|apiece|^One ", prompt):
        return f"{sign}{a * b}"
    if re.search(r"gives|takes out|lost|needs|with a \$|spends|saves", prompt):
        return f"{sign}{abs(a - b)}"
    return f"{a + b}"


def _units(prompt: str) -> str:
    names = "kilometres km metres m centimetres cm millimetres mm tonnes t kilograms kg grams g litres L millilitres mL"
    symbols = dict(zip(names.split()[::2], names.split()[1::2], strict=True))
    size = {"km": 10**6, "m": 1000, "cm": 10, "mm": 1, "t": 10**6, "kg": 1000, "g": 1, "L": 1000, "mL": 1}
    number, unit = next(m for m in re.findall(r"(\d+) (\w+)", prompt) if m[1] in symbols or m[1] in size)
    (target,) = (symbols[name] for name in re.findall(rf"\b(?:in|to|into|many) ({'|'.join(symbols)})\b", prompt))
    amount, rest = divmod(int(number) * size[symbols.get(unit, unit)], size[target])
    assert rest == 0
    return f"{amount} {target}"


def _dates(prompt: str) -> str:
    days = re.search(r"(\d+) days?\b", prompt)
    day = re.search("|".join(WEEKDAYS), prompt)
    if day and days:
        # 2024-01-01 was a Monday
        start = datetime(2024, 1, 1 + WEEKDAYS.index(day[0]))
        return f"{start + timedelta(days=int(days[1])):%A}"
    iso = re.search(r"\d{4}-\d\d-\d\d", prompt)
    if iso:
        parsed = datetime.fromisoformat(iso[0])
        return f"{parsed + timedelta(days=int(days[1])):%Y-%m-%d}" if days else f"{parsed:%B}"
    text, form = re.search(r"\d+ [A-Z][a-z]+ \d{4}", prompt), "%d %B %Y"
    if not text:
        text, form = re.search(r"[A-Z][a-z]+ \d+, \d{4}", prompt), "%B %d, %Y"
    assert text
    return f"{datetime.strptime(text[0], form):%Y-%m-%d}"


def _sorting(prompt: str) -> str:
    down = bool(re.search("descending|decreasing|largest to smallest|high to low|highest first", prompt))
    for cycle in (WEEKDAYS, MONTHS):
        if f"from {cycle[0]} to {cycle[-1]}" in prompt or f"{cycle[0]} first" in prompt:
            return ", ".join(sorted(_listed(prompt.replace(f"{cycle[0]} first", "")), key=cycle.index))
    numbers = _numbers(prompt)
    ordered = [str(n) for n in sorted(numbers, reverse=down)] if numbers else sorted(_listed(prompt))
    assert len(set(ordered)) == len(ordered)
    return ", ".join(ordered)


def _filtering(prompt: str) -> str:
    than = re.search(r"(greater|less) than (\d+)", prompt)
    if than:
        limit, given = int(than[2]), _numbers(prompt.replace(than[0], ""))
        return "; ".join(str(n) for n in given if (n > limit if than[1] == "greater" else n < limit))
    initial = re.search(r"(?:begin|start|beginning) with (\w)\b", prompt)
    if initial:
        return "; ".join(word for word in _listed(prompt) if word.startswith(initial[1]))
    group = next(group for group in GROUPS if f" {group}" in prompt)
    return "; ".join(word for word in _listed(prompt) if word in GROUPS[group])


def _string_edits(prompt: str) -> str:
    question, text = re.split(r"(?<=[:?]) ", prompt)[-2:]
    if re.search("each word|every word", question):
        return " ".join(word.capitalize() for word in text.split())
    for mark, sign in (("hyphens", "-"), ("underscores", "_"), ("slashes", "/")):
        if mark in question:
            return text.replace(" ", sign)
    if re.search("capital|upper", question):
        return text.upper()
    return text.split()[0 if "first" in question else -1]


def _counting(prompt: str) -> str:
    entries = re.findall(r"(\d)\. \w+", prompt)
    if entries:
        assert entries == [str(index + 1) for index in range(len(entries))]
        return NUMBER_WORDS[len(entries)]
    words = _listed(prompt)
    wanted = re.search(r'"(\w+)"|are (\w+)\?', prompt)
    return NUMBER_WORDS[words.count(wanted[1] or wanted[2]) if wanted else len(words)]


def _logic(prompt: str) -> str:
    numbers = re.search(r"(\d+) ([<>]) (\d+)", prompt)
    if numbers:
        difference = int(numbers[1]) - int(numbers[3])
        return str(difference < 0 if numbers[2] == "<" else difference > 0).upper()
    if "light" in prompt:
        states = re.findall(r"(?:light|one) is (on|off)\b", prompt)[:2]
        need = "off" if "are off" in prompt else "on"
        return str((any if "at least" in prompt else all)(state == need for state in states)).upper()
    if "club" in prompt:
        # the rule decides on the object that all members own, and only on that one
        rule = re.search(r"owns? an? (\w+)\.", prompt)
        claim = re.findall(r"(owns|does not own) an? (\w+)\.", prompt)[-1]
        assert rule and claim[1] == rule[1]
        return str(claim[0] == "owns").upper()
    *facts, last = re.findall(r"(\w+) is (\w+) than (\w+)", prompt)
    facts = facts if len(facts) == 2 else [*facts, last]
    people: set[str] = {name for first, _, second in facts for name in (first, second)}
    order = next(p for p in itertools.permutations(people) if all(p.index(a) < p.index(b) for a, _, b in facts))
    if extreme := re.search(r"the (\w+)est\b", prompt):
        return order[0 if last[1].startswith(extreme[1]) else 2]
    return str(order.index(last[0]) < order.index(last[2])).upper()


def _table_lookup(prompt: str) -> str:
    lines = prompt.split("\n")
    question = lines.pop(0 if lines[0][-1] in ".?" else -1)
    rows = [[cell.strip() for cell in re.split(r"[|,]", line.strip("| "))] for line in lines]
    asked = re.findall(r"[\w$:]+", question)
    (column,) = [index for index, name in enumerate(rows[0]) if index and name in asked]
    found = [row for row in rows[1:] if row[0] in asked]
    if found:
        return found[0][column]
    (row,) = [row for row in rows[1:] if row[column] in asked]
    return row[0]


def _json_extraction(prompt: str) -> str:
    text = re.search(r"\{.*\}", prompt)
    assert text
    value = json.loads(text[0])
    keys = re.findall(r'"(\w+)"', prompt.replace(text[0], ""))
    if len(keys) == 2 and not isinstance(value.get(keys[0]), dict):
        keys.reverse()  # the inner key was named first
    for key in keys:
        value = value[key]
    return json.dumps(value)


def _code_output(prompt: str) -> str:
    code = "\n".join(line for line in prompt.split("\n") if "Python" not in line)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue().removesuffix("\n")


def _sequences(prompt: str) -> str:
    run = re.search(r"(?:[\w-]+(?: \d+)?, ){2,}[\w-]+(?: \d+)?", prompt)
    assert run
    terms = run[0].split(", ")
    if terms[-1].isdigit():
        terms[0] = terms[0].split()[-1]
        (step,) = {int(b) - int(a) for a, b in itertools.pairwise(terms)}
        return str(int(terms[-1]) + step)
    if all(len(term) == 1 for term in terms):
        assert {ord(b) - ord(a) for a, b in itertools.pairwise(terms)} == {1}
        return chr(ord(terms[-1]) + 1)
    label = re.fullmatch(r"(\D+)(\d+)", terms[-1])
    if label:
        assert terms == [f"{label[1]}{int(label[2]) + i}" for i in range(1 - len(terms), 1)]
        return f"{label[1]}{int(label[2]) + 1}"
    period = next(p for p in (2, 3) if all(a == b for a, b in zip(terms, terms[p:], strict=False)))
    assert len(terms) >= 2 * period
    return terms[-period]


SOLVERS: dict[str, Callable[[str], str]] = {
    "arithmetic": _arithmetic,
    "units": _units,
    "dates": _dates,
    "sorting": _sorting,
    "filtering": _filtering,
    "string_edits": _string_edits,
    "counting": _counting,
    "logic": _logic,
    "table_lookup": _table_lookup,
    "json_extraction": _json_extraction,
    "code_output": _code_output,
    "sequences": _sequences,
}


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_answer_is_right(category: str, drawn: dict[tuple[str, str], list[Item]]) -> None:
    for split in SPLITS:
        for row in drawn[category, split]:
            assert SOLVERS[category](row.prompt) == row.answer, row


# ---- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "answer", "same"),
    [
        ("12", "12", True),
        (" 12.\n", "12", True),
        ("12..", "12", False),
        ("a,  b,\n c", "a, b, c", True),
        ("true", "TRUE", False),
        ("The answer is 12", "12", False),
        ("", "12", False),
        ('"Paris"', '"Paris"', True),
        ("Paris", '"Paris"', False),
    ],
)
def test_exact_match(output: str, answer: str, same: bool) -> None:
    assert exact_match(output, answer) is same


FOUND = [
    ("The answer is 12.", "12"), ("The answer is 12, I think", "12"), ("(12)", "12"), ("12%", "12"), ("$12", "12"),
    ("2+10=12", "12"), ("1, 000", "1"), ("-5", "-5"), ("on 2024-01-05.", "2024-01-05"), ("a cat.", "cat"),
    ("It is **TRUE**", "TRUE"), ('the value is "Paris"', '"Paris"'), ("red,  green", "red, green"), ("", ""),
]  # fmt: skip
NOT_FOUND = [
    ("312", "12"), ("120", "12"), ("12.5", "12"), ("0.12", "12"), (".12", "12"), ("1,000", "1"), ("1,000", "000"),
    ("-5", "5"), ("\u22125", "5"), ("10-5", "-5"), ("3/4", "4"), ("12:30", "12"), ("2024-01-05", "05"),
    ("2024-01-05", "2024"), ("cats", "cat"), ("Cat", "cat"), ("", "12"), ("12", ""),
]  # fmt: skip


@pytest.mark.parametrize(("output", "answer"), FOUND)
def test_contained(output: str, answer: str) -> None:
    assert contained(output, answer)


@pytest.mark.parametrize(("output", "answer"), NOT_FOUND)
def test_not_contained(output: str, answer: str) -> None:
    assert not contained(output, answer)


def test_answers_match_themselves(drawn: dict[tuple[str, str], list[Item]]) -> None:
    for rows in drawn.values():
        for row in rows[:50]:
            assert exact_match(f" {row.answer}.\n", row.answer)
            assert contained(f"The result is {row.answer}.", row.answer)
