"""The federation: one assignment for all splits, everything a function of the seed, and a split that can be checked."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.tiny import tiny_tokenizer

from fedloom.data.federation import Data, Drift, Federation, build, drift, split_table
from fedloom.data.partition import Partitioner
from fedloom.data.rows import Row, Turn
from fedloom.data.sources import Source
from fedloom.data.splits import Splits, _counts
from fedloom.types import DataError


class Grid(Source):
    """`tasks` x `categories` rows: each task occurs once in each category."""

    tasks: int = 20
    categories: str = "abcd"

    def rows(self, seed: int) -> list[Row]:
        return [
            Row(f"{c}{t}", (Turn("user", f"{c} {t}"), Turn("assistant", "x" * t)), {"category": c, "task": str(t)})
            for c in self.categories
            for t in range(1, self.tasks + 1)
        ]

    def describe(self) -> str:
        return "grid"


def federate(seed: int = 0, cache: Path | None = None, **keys: object) -> Federation:
    return build(Data.model_validate({"source": Grid(), "template": "plain", **keys}), tiny_tokenizer(), seed, cache)


def every(federation: Federation) -> list[int]:
    return [int(i) for data in federation.clients.values() for i in data.all]


def test_the_defaults_of_a_recipe() -> None:
    data = Data()
    names = (data.source.part_name, data.template.part_name, data.partition.part_name)
    assert (names, data.clients, data.max_tokens) == (("tasks", "chat", "iid"), 4, 512)
    assert Data.model_validate(data.model_dump(mode="json")) == data
    assert Data.model_validate({"partition": "by", "public": 0.1, "source": "a/b"}).public == 0.1


@pytest.mark.parametrize("partition", ["iid", "by", "quantity", "natural", {"name": "dirichlet", "alpha": 1}])
def test_all_rows_are_owned_once_and_named_in_the_split(partition: object) -> None:
    federation = federate(partition=partition, public=7)
    assert sorted([*every(federation), *federation.public.tolist()]) == list(range(80))
    assert len(federation.public) == 7
    table = split_table(federation)
    names = [name for client in federation.clients for part in table[client].values() for name in part]
    assert sorted([*names, *table["public"]]) == sorted(row.id for row in federation.rows)


def test_one_assignment_serves_train_validation_and_test() -> None:
    federation = federate(partition="by", splits={"train": 0.5, "validation": 0.25, "test": 0.25})
    for client, data in federation.clients.items():
        kinds = [
            {federation.rows[i].fields["category"] for i in part} for part in (data.train, data.validation, data.test)
        ]
        assert kinds == [kinds[0]] * 3, client
        assert len(kinds[0]) == 1
        assert (len(data.train), len(data.validation), len(data.test)) == (10, 5, 5)


def test_everything_depends_on_the_seed_alone(tmp_path: Path) -> None:
    keys = {"partition": "quantity", "public": 0.1, "unseen": 0.3}
    one, two, other = federate(**keys), federate(cache=tmp_path, **keys), federate(seed=1, **keys)
    assert split_table(one) == split_table(two) == split_table(federate(cache=tmp_path, **keys))
    assert one.unseen == two.unseen
    assert one.split_hash != other.split_hash


def test_the_hash_can_be_recomputed_from_the_file() -> None:
    table = json.loads(json.dumps(split_table(federate())))
    written = table.pop("hash")
    assert written == hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    assert set(table) == {f"client-{i}" for i in range(1, 5)}


def test_indices_point_into_the_rows_that_were_kept() -> None:
    federation = federate(max_tokens=35)
    assert federation.left.too_long > 0
    assert len(federation.rows) == len(federation.encoded) == 80 - federation.left.total
    tokenizer = tiny_tokenizer()
    for i, row in enumerate(federation.rows):
        example = federation.encoded.example(i)
        assert tokenizer.decode(example.ids[example.train]) == f"{row.turns[1].text}<|im_end|>"
    assert federation.source == "grid"


def test_the_system_prompt_reaches_every_row() -> None:
    encoded = federate(system="Be kind.").encoded
    assert all(tiny_tokenizer().decode(encoded.example(i).ids).startswith("Be kind.\n\n") for i in range(len(encoded)))


def test_a_group_is_in_one_split_at_all_clients() -> None:
    federation = federate(
        partition="natural", splits={"train": 0.6, "validation": 0.2, "test": 0.2, "group": "task"}, public=10
    )
    places: dict[str, set[str]] = {}
    for client in federation.clients.values():
        for name, part in (("train", client.train), ("validation", client.validation), ("test", client.test)):
            for i in part:
                places.setdefault(federation.rows[i].fields["task"], set()).add(name)
    for i in federation.public:
        places.setdefault(federation.rows[i].fields["task"], set()).add("public")
    assert len(places) == 20
    assert all(len(place) == 1 for place in places.values())
    assert len(federation.public) == 8  # two whole groups of four
    assert {place for one in places.values() for place in one} == {"train", "validation", "test", "public"}


def test_a_group_that_leaves_a_client_without_training_rows_is_an_error() -> None:
    with pytest.raises(
        DataError, match=r"data\.splits\.group=category: none of the 20 rows of client-\d falls into train"
    ):
        federate(partition="by", splits={"group": "category"})
    with pytest.raises(DataError, match=r"data\.splits\.group: no row has a field 'tasc'; did you mean 'task'"):
        federate(splits={"group": "tasc"})


def test_unseen_clients_are_a_share_and_keep_their_data() -> None:
    federation = federate(clients=10, unseen=0.6)
    assert len(federation.unseen) == 6
    assert list(federation.unseen) == sorted(federation.unseen)
    assert set(federation.unseen) < set(federation.clients)
    assert federate().unseen == ()
    with pytest.raises(DataError, match="keeps 1 of 1 clients out"):
        federate(clients=1, unseen=0.1)


def test_public_rows_must_leave_some_for_clients() -> None:
    with pytest.raises(DataError, match=r"data\.public=80"):
        federate(public=80)
    assert len(federate(public=0.25).public) == 20
    assert len(federate().public) == 0


@given(n=st.integers(1, 200), weights=st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20)))
def test_counts_are_complete_and_no_positive_share_is_empty(n: int, weights: tuple[int, int, int]) -> None:
    shares = [weight / sum(weights) for weight in weights]
    counts = _counts(n, shares)
    assert sum(counts) == n
    assert min(counts) >= 0
    assert counts[0] >= 1
    if n >= 3:
        assert all((count > 0) == (share > 0) for count, share in zip(counts, shares, strict=True))
    if n >= 60:
        assert all(abs(count - n * share) <= 1 for count, share in zip(counts, shares, strict=True))


def test_shares_sum_to_one() -> None:
    assert Splits(train=0.89, validation=0.1, test=0.01).shares == (0.89, 0.1, 0.01)
    assert Splits(train=1, validation=0, test=0).shares == (1, 0, 0)
    for wrong in ({"train": 0.5}, {"train": 0.0, "validation": 0.5, "test": 0.5}, {"train": 1.2, "validation": -0.2}):
        with pytest.raises(ValidationError):
            Splits.model_validate(wrong)


class Faulty(Partitioner):
    parts: dict[str, list[int]]

    def split(self, rows: Sequence[Row], clients: int, generator: np.random.Generator) -> dict[str, list[int]]:
        return self.parts


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"a": list(range(80)), "b": []}, r"(?s)1 of 2 clients have no rows.*lower data\.clients"),
        ({"a": list(range(80)), "b": [1]}, "not disjoint and complete"),
        ({"a": list(range(79))}, "not disjoint and complete"),
        ({"hash": list(range(80))}, "no client may be named 'hash'"),
    ],
)
def test_a_partitioner_is_held_to_its_contract(parts: dict[str, list[int]], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        federate(partition=Faulty(parts=parts))


def test_drift_is_the_divergence_in_bits() -> None:
    federation = federate(source=Grid(categories="ab"), partition="by", clients=2)
    first, second = drift(federation, "category")
    mixed = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert first.divergence == pytest.approx(mixed - 0.5)  # H((p + q) / 2) - (H(p) + H(q)) / 2; H(q) = 1 bit
    assert (first.client, first.rows, first.categories) == ("client-1", 20, {"a": 20})
    assert second.categories == {"b": 20}
    lengths = [federation.encoded.length(i) for i in federation.clients["client-1"].all]
    assert first.tokens == pytest.approx(tuple(np.quantile(lengths, [0.05, 0.5, 0.95])))
    (alone,) = drift(federate(clients=1), "category")
    assert alone.divergence == pytest.approx(0, abs=1e-12)
    assert isinstance(alone, Drift)
    with pytest.raises(DataError, match="'topic'"):
        drift(federation, "topic")


@pytest.mark.data
def test_dolly_by_category_trains_and_tests_each_client_on_its_own(data_home: Path) -> None:
    data = Data.model_validate(
        {"source": "dolly-15k", "partition": "by", "clients": 8, "template": "plain", "max_tokens": 900}
    )
    federation = build(data, tiny_tokenizer(), 0, None)
    owned = drift(federation, "category")
    assert [len(one.categories) for one in owned] == [1] * 8
    assert sum(one.rows for one in owned) == 13507 - federation.left.total == len(federation.rows)
    assert all(len(client.validation) and len(client.test) for client in federation.clients.values())


@pytest.mark.data
def test_mbxp_by_language_shares_no_task_between_splits(data_home: Path) -> None:
    keys = {"source": "mbxp", "partition": {"name": "natural", "key": "language"}, "splits": {"group": "task"}}
    federation = build(
        Data.model_validate({**keys, "template": "plain", "max_tokens": 1500}), tiny_tokenizer(), 0, None
    )
    assert {"cpp", "csharp", "java", "python"} < set(federation.clients)
    assert len(federation.clients) == 9
    tasks = [
        {federation.rows[i].fields["task"] for c in federation.clients.values() for i in getattr(c, name)}
        for name in ("train", "validation", "test")
    ]
    assert not (tasks[0] & tasks[1] or tasks[0] & tasks[2] or tasks[1] & tasks[2])
