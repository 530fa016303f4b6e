"""CodeSearchNet and PubMedQA: their columns, their halves and shares, and what is wrong with them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.named import CodeSearchNet, PubMedQa
from fedloom.data.rows import Turn
from fedloom.types import DataError

QUESTION = {
    "QUESTION": "Does it?",
    "CONTEXTS": ["We looked.", "It did."],
    "LONG_ANSWER": "It does.",
    "final_decision": "yes",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    for folder in ("code", "pubmedqa"):
        (tmp_path / folder).mkdir()
    return tmp_path


def pubmed(home: Path, questions: Any, tests: Any) -> None:
    with gzip.open(home / "pubmedqa" / "ori_pqal.json.gz", "wt") as file:
        json.dump(questions, file)
    (home / "pubmedqa" / "test_ground_truth.json").write_text(json.dumps(tests))


def test_code_search_net_under_both_sets_of_names(home: Path) -> None:
    ours = {"docstring": "Add.", "code": "a + b", "language": "go", "url": "x"}
    theirs = {
        "func_documentation_string": "Add.",
        "func_code_string": "a + b",
        "language": "go",
        "repository_name": "r",
    }
    for record in (ours, theirs):
        file = home / "rows.jsonl"
        file.write_text(json.dumps(record) + "\n")
        (row,) = CodeSearchNet(path=file).rows(0)
        assert row.turns == (Turn("user", "Add.\n\ngo", "go"), Turn("assistant", "a + b"))
        assert row.fields == {"language": "go", "category": "go"}
    file.write_text(json.dumps({"docstring": "Add.", "language": "go"}) + "\n")
    with pytest.raises(DataError, match="line 1: field 'code' is null"):
        CodeSearchNet(path=file).rows(0)
    with pytest.raises(DataError, match=r"\$FEDLOOM_DATA/code/code_search_net\.jsonl\.gz"):
        CodeSearchNet().rows(0)


def test_a_share_is_drawn_by_the_seed(home: Path) -> None:
    lines = [json.dumps({"docstring": f"{i}", "code": "x", "language": "go"}) for i in range(200)]
    (home / "rows.jsonl").write_text("\n".join(lines))
    source = CodeSearchNet(path=home / "rows.jsonl", share=0.05)
    drawn = [row.id for row in source.rows(1)]
    assert len(drawn) == 10
    assert drawn == [row.id for row in source.rows(1)] != [row.id for row in source.rows(2)]
    every = [row.id for row in CodeSearchNet(path=home / "rows.jsonl").rows(1)]
    assert drawn == [name for name in every if name in drawn]


def test_pubmedqa_keeps_the_halves_apart(home: Path) -> None:
    pubmed(home, {str(i): {**QUESTION, "QUESTION": f"Does {i}?"} for i in range(6)}, {"1": "yes", "4": "no"})
    assert [row.id for row in PubMedQa().rows(0)] == ["0", "2", "3", "5"]
    assert [row.id for row in PubMedQa(split="test").rows(0)] == ["1", "4"]
    row = PubMedQa().rows(0)[0]
    assert row.turns == (
        Turn("user", "Does 0?\n\nWe looked.\nIt did.", "We looked.\nIt did."),
        Turn("assistant", "yes"),
    )
    assert row.fields["category"] == "yes"
    assert PubMedQa(answer="conclusion").rows(0)[0].turns[1].text == "It does."


def test_pubmedqa_without_its_list_of_tests_is_refused(home: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no copy found.*test_ground_truth\.json are in github"):
        PubMedQa().rows(0)
    pubmed(home, {"1": {**QUESTION, "LONG_ANSWER": None}}, {})
    with pytest.raises(DataError, match="item 1: field 'answer' is null"):
        PubMedQa(answer="conclusion").rows(0)
    tests = home / "pubmedqa" / "test_ground_truth.json"
    tests.write_text("[1]")
    with pytest.raises(DataError, match="expected an object with PubMed ids"):
        PubMedQa().rows(0)
    tests.unlink()
    with pytest.raises(DataError, match="the list of test ids cannot be read"):
        PubMedQa().rows(0)


@pytest.mark.data
def test_pubmedqa_for_real(data_home: Path) -> None:
    train, test = PubMedQa().rows(0), PubMedQa(split="test").rows(0)
    gold = json.loads((data_home / "pubmedqa" / "test_ground_truth.json").read_text())
    assert (len(train), len(test)) == (500, 500)
    assert {row.id: row.fields["decision"] for row in test} == gold
    assert not {row.id for row in train} & gold.keys()
