"""Rows come out right from every form and file, and what is wrong in a file is told all at once, with its place."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from fedloom.data.keys import KeyMap
from fedloom.data.named import Alpaca, CodeAlpaca, Dolly, FedCodeAlpaca, Gsm8k, Mbxp
from fedloom.data.rows import Row, Turn
from fedloom.data.sources import FileSource, HubSource, Source, TaskSource
from fedloom.parts import Record
from fedloom.types import DataError

ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3", "category": "maths"},
    {"instruction": "Greet.", "input": "", "output": "Hello", "category": "talk"},
]
TURNS = [
    (Turn("user", "Add.\n\n1 2", "1 2"), Turn("assistant", "3")),
    (Turn("user", "Greet."), Turn("assistant", "Hello")),
]


class Holder(Record):
    source: Source


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return path
    if kind == "csv":
        with path.with_suffix(".tmp").open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0].keys())
            writer.writeheader()
            writer.writerows(records)
        lines = path.with_suffix(".tmp").read_text()
    text = json.dumps(records) if kind == "json" else lines
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path: Path, **keys: str) -> list[Row]:
    return FileSource(path=path, keys=KeyMap(**keys)).rows(0)


def refused(path: Path, **keys: str) -> str:
    with pytest.raises(DataError) as error:
        read(path, **keys)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.json.gz", "a.jsonl.gz", "a.csv.gz"])
def test_every_kind_of_file_gives_the_same_turns(tmp_path: Path, name: str) -> None:
    rows = read(write(tmp_path / name, ALPACA))
    assert [row.turns for row in rows] == TURNS
    assert [row.fields for row in rows] == [{"category": "maths"}, {"category": "talk"}]
    assert [row.id for row in rows] == (["a:2", "a:3"] if "csv" in name else ["a:1", "a:2"])


def test_forms_are_recognised(tmp_path: Path) -> None:
    pair = {"prompt": "Hi", "completion": "Hello"}
    chat = {
        "messages": [{"role": "system", "content": "S"}, *({"role": r, "content": r} for r in ("user", "assistant"))]
    }
    shared = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "S"}
    assert read(write(tmp_path / "pair.jsonl", [pair]))[0].turns == (Turn("user", "Hi"), Turn("assistant", "Hello"))
    assert [turn.role for turn in read(write(tmp_path / "chat.jsonl", [chat]))[0].turns] == [
        "system",
        "user",
        "assistant",
    ]
    expected = (Turn("system", "S"), Turn("user", "Hi"), Turn("assistant", "Hello"))
    assert read(write(tmp_path / "shared.jsonl", [shared]))[0].turns == expected


@pytest.mark.parametrize("given", [{"input": None}, {"input": ""}, {"input": " \n"}, {}])
def test_a_missing_input_leaves_no_trace(tmp_path: Path, given: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "Greet.", "output": "Hello", **given}, ALPACA[0]])
    assert [row.turns for row in read(path)] == [TURNS[1], TURNS[0]]


def test_byte_order_marks_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "completion": "c"}\r\n \r\n{"prompt": "q", "completion": "c"}\r\n')
    assert [row.id for row in read(path)] == ["a:1", "a:3"]


def test_columns_are_mapped_by_keys(tmp_path: Path) -> None:
    record = {"question": "1+1", "answer": 2, "topic": "maths", "nr": 7, "level": 3, "hint": None, "tags": ["a"]}
    path = write(tmp_path / "a.jsonl", [record])
    row = read(path, prompt="question", completion="answer", category="topic", id="nr")[0]
    assert row == Row(
        "7", (Turn("user", "1+1"), Turn("assistant", "2")), {"topic": "maths", "category": "maths", "level": "3"}
    )


def test_a_category_is_mapped_on_a_recognised_form(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c", "lang": "en"}])
    assert read(path, category="lang")[0].fields == {"lang": "en", "category": "en"}


def test_keys_that_contradict_are_refused() -> None:
    with pytest.raises(ValidationError, match="go together"):
        KeyMap(prompt="question")
    with pytest.raises(ValidationError, match="not all three"):
        KeyMap(prompt="q", completion="a", messages="m")


def test_all_problems_of_a_file_are_told_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = {"instruction": "a", "output": "b"}
    records = [good, {"instruction": "a", "outptu": "b"}, {**good, "output": None}, {**good, "output": " "}, [1], good]
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join([*lines[:2], "", "nope", *lines[2:], json.dumps({**good, "input": ["x"]})]))
    message = refused(path)
    assert "bad.jsonl: 6 problems" in message
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        f"line {n}" for n in (2, 4, 5, 6, 7, 9)
    ]
    for part in (
        "line 2: no field 'output'; did you mean 'outptu'? (has: instruction, outptu)",
        "line 4: not JSON",
        "line 5: field 'output' is null",
        "line 6: no answer: field 'output' is empty",
        "line 7: expected an object {...}, got a list",
        "line 9: field 'input' is a list, expected text",
    ):
        assert part in message


def test_problems_are_capped(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("nope\n" * 25)
    message = refused(path)
    assert "25 problems" in message
    assert len(message.splitlines()) == 12
    assert message.endswith("... and 15 more")


def test_dialogues_are_checked(tmp_path: Path) -> None:
    def chat(*messages: tuple[str, object]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": content} for role, content in messages]}

    records = [
        chat(("user", "a")),
        chat(("user", "a"), ("assistant", "")),
        chat(("user", "a"), ("tool", "b")),
        chat(("user", None), ("assistant", "b")),
        {"messages": "a"},
    ]
    message = refused(write(tmp_path / "a.jsonl", records))
    for part in (
        "line 1: no answer: the dialogue has no turn of the assistant",
        "line 2: no answer: message 2 of the assistant is empty",
        "line 3: message 2: role 'tool' is not one of system, user",
        "line 4: message 1: expected text",
        "line 5: expected a list of {role, content}",
    ):
        assert part in message


def test_an_unknown_form_names_fields_and_the_next_step(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "a.jsonl", [{"instructon": "a", "answer": "b"}]))
    assert "instructon, answer" in message
    assert "'instructon'; did you mean 'instruction'?" in message
    assert "data.source.keys=" in message


def test_ids_must_be_unique(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c", "n": n} for n in (1, 2, 1)])
    assert "id '1' is used 2 times" in refused(path, id="n")


def test_broken_files_are_named_plainly(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "p", "completion": "c"}\n' * 99)
    files = {
        "empty.jsonl": (b"", "the file is empty"),
        "empty.json": (b"[]", "the file is empty"),
        "cut.jsonl.gz": (whole[:-12], "truncated"),
        "noise.jsonl.gz": (b"not gzip at all", "damaged or no gzip"),
        "flip.jsonl.gz": (whole[:30] + b"\0\0\0\0" + whole[34:], "damaged or no gzip"),
        "latin.jsonl": (b'{"prompt": "x"}\n{"prompt": "\xe9"}', "line 2: not UTF-8"),
        "lines.json": (b'{"a": 1}\n{"a": 2}', "named .jsonl"),
        "object.json": (b'{"a": 1}', "expected a list of objects"),
        "list.json": (b'[{"prompt": "p", "completion": "c"}, 3]', "item 2: expected an object {...}, got a number"),
        "short.csv": (b"prompt,completion\nhi,there\nhi\n", "line 3: more or fewer cells than the 2 of the header"),
        "noise.parquet": (b"PAR1 no", "damaged or no parquet"),
        "data.xls": (b"x", "unknown kind of data file"),
        "half.jsonl": (b'{"prompt": "\\ud800", "completion": "c"}', "line 1: 'utf-8' codec"),
    }
    for name, (content, expected) in files.items():
        (tmp_path / name).write_bytes(content)
        message = refused(tmp_path / name)
        assert expected in message, name
        assert name in message
    assert "no such file; did you mean 'empty.jsonl'?" in refused(tmp_path / "emty.jsonl")
    assert "a folder" in refused(tmp_path)


def test_names_outside_the_registry_are_files_or_hub_ids(tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_text("x")
    assert Holder.model_validate({"source": "data/a.jsonl"}).source == FileSource(path=Path("data/a.jsonl"))
    assert Holder.model_validate({"source": str(odd)}).source == FileSource(path=odd)
    assert Holder.model_validate({"source": "openai/gsm8k"}).source == HubSource(id="openai/gsm8k")
    keys = {"prompt": "question", "completion": "answer"}
    mapped = Holder.model_validate({"source": {"name": "a.csv", "keys": keys}})
    assert mapped.source == FileSource(path=Path("a.csv"), keys=KeyMap(**keys))
    assert Holder.model_validate(mapped.model_dump(mode="json")) == mapped
    with pytest.raises(ValidationError, match="did you mean 'gsm8k'"):
        Holder.model_validate({"source": "gsm8"})


def test_a_hub_that_cannot_be_reached_names_every_other_way() -> None:
    with pytest.raises(DataError) as error:
        HubSource(id="owner/absent").rows(0)
    for part in ("owner/absent", "HF_HOME", "HF_ENDPOINT", "data.source=FILE", "data.source=tasks", "HF_HUB_OFFLINE=1"):
        assert part in str(error.value)


def test_a_hub_data_set_becomes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[object] = []

    def load(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.extend([*args, kwargs])
        return datasets.Dataset.from_list(ALPACA)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = HubSource(id="owner/name", subset="main", split="test").rows(0)
    assert [row.turns for row in rows] == TURNS
    assert [row.id for row in rows] == ["owner/name:1", "owner/name:2"]
    assert asked == ["owner/name", "main", {"split": "test", "revision": None}]


def test_tasks_are_drawn_from_the_seed() -> None:
    source = TaskSource(rows_per_category=3, categories=("units", "dates"))
    rows = source.rows(5)
    assert Counter(row.fields["category"] for row in rows) == {"units": 3, "dates": 3}
    assert rows == source.rows(5) != source.rows(6)
    assert "2 categories x 3 rows" in source.describe()
    with pytest.raises(ValidationError, match="did you mean 'units'"):
        TaskSource(categories=("unitz",))
    with pytest.raises(ValidationError, match="each once"):
        TaskSource(categories=("units", "units"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    for folder in ("gsm8k", "code", "instruct"):
        (tmp_path / folder).mkdir()
    return tmp_path


GSM8K = [{"question": "2+2?", "answer": "2+2 = <<2+2=4>>4\n#### 4"}]


def test_gsm8k_options(home: Path) -> None:
    write(home / "gsm8k" / "gsm8k_train.jsonl", GSM8K)
    assert Gsm8k().rows(0)[0].turns[1].text == "2+2 = <<2+2=4>>4\n#### 4"
    changed = Gsm8k(marker="The answer is ", calculator=False).rows(0)[0]
    assert changed.turns[1].text == "2+2 = 4\nThe answer is 4"
    assert changed.id == "gsm8k_train:1"


def test_named_sets_prefer_an_explicit_file_then_the_data_home(home: Path) -> None:
    write(home / "gsm8k" / "gsm8k_train.jsonl", GSM8K)
    other = write(home / "other.jsonl", [{"question": "q", "answer": "a"}])
    assert Gsm8k(path=other).rows(0)[0].turns[0].text == "q"
    assert str(other) in Gsm8k(path=other).describe()
    assert "gsm8k_train.jsonl" in Gsm8k().describe()
    assert "hub data set openai/gsm8k (test, subset main)" in Gsm8k(split="test").describe()
    with pytest.raises(DataError, match=r"gsm8k/gsm8k_test\.jsonl"):
        Gsm8k(split="test").rows(0)
    with pytest.raises(DataError, match="line 1: no field 'answer'"):
        Gsm8k(path=write(home / "bad.jsonl", [{"question": "q"}])).rows(0)


def test_a_stand_in_says_so_and_yields_to_the_real_set(home: Path) -> None:
    write(home / "instruct" / "alpaca_en_demo.json", ALPACA[:1])
    assert "stand-in for alpaca" in Alpaca().describe()
    assert len(Alpaca().rows(0)) == 1
    write(home / "instruct" / "alpaca_data.json", ALPACA)
    assert "stand-in" not in Alpaca().describe()
    assert len(Alpaca().rows(0)) == 2
    assert "stand-in" not in Alpaca(path=home / "instruct" / "alpaca_en_demo.json").describe()


def test_fed_codealpaca_takes_the_language_as_category(home: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no copy found.*\$FEDLOOM_DATA/code/rosetta_alpaca\.json.*d269da.*mbxp"):
        FedCodeAlpaca().rows(0)
    assert "no copy found" in FedCodeAlpaca().describe()
    languages = ("Python", "X86-64 Assembly")
    records = [{"instruction": "Sort.", "input": language, "output": "sort()"} for language in languages]
    write(home / "code" / "rosetta_alpaca.json", records)
    rows = FedCodeAlpaca().rows(0)
    assert [row.fields for row in rows] == [{"language": "Python", "category": "Python"}]
    assert rows[0].turns[0] == Turn("user", "Sort.\n\nPython", "Python")
    assert len(FedCodeAlpaca(drop=()).rows(0)) == 2
    with pytest.raises(DataError, match="every record was left out"):
        FedCodeAlpaca(drop=languages).rows(0)


def test_mbxp_joins_the_code_and_leaves_the_test_tasks_out(home: Path) -> None:
    shared = {"description": "Add.", "language": "ruby", "prompt": "\n\ndef add\n", "canonical_solution": " 1\nend\n"}
    records = [{"task_id": f"MBRBP/{n}", "test": "t", **shared} for n in (510, 511)]
    write(home / "code" / "mbxp_9lang_solved.jsonl.gz", records)
    assert [row.id for row in Mbxp(above=0).rows(0)] == ["MBRBP/510", "MBRBP/511"]
    (row,) = Mbxp().rows(0)
    assert row.turns == (Turn("user", "Add.\n\nruby", "ruby"), Turn("assistant", "def add\n 1\nend"))
    assert row.fields == {"language": "ruby", "category": "ruby", "task": "511"}
    with pytest.raises(DataError, match="line 1: no field 'code'"):
        Mbxp(path=write(home / "bad.jsonl", [{"task_id": "MBRBP/600", "description": "x"}])).rows(0)


@pytest.mark.data
def test_real_sets_have_their_known_sizes(data_home: Path) -> None:
    assert len(Gsm8k().rows(0)) == 7473
    assert len(Gsm8k(split="test").rows(0)) == 1319
    assert not any("<<" in row.turns[1].text for row in Gsm8k(calculator=False).rows(0))
    dolly = Counter(row.fields["category"] for row in Dolly().rows(0))
    assert (sum(dolly.values()), dolly["open_qa"], dolly["creative_writing"]) == (13507, 3354, 635)
    mbxp = Counter(row.fields["language"] for row in Mbxp().rows(0))
    assert (sum(mbxp.values()), mbxp["python"], mbxp["csharp"]) == (3203, 405, 294)
    assert len(Alpaca().rows(0)) == 999
    assert "stand-in" in Alpaca().describe()
    assert "hub" in CodeAlpaca().describe()


@pytest.mark.data
def test_no_prompt_of_the_real_sets_says_none(data_home: Path) -> None:
    for source in (Gsm8k(), Dolly(), Alpaca(), Mbxp()):
        assert not any(row.turns[0].text.endswith("\n\nNone") for row in source.rows(0)), source
