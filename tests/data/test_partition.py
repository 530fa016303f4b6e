"""Partitions are disjoint and complete, leave no client empty, follow the generator alone, and have the right shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedloom.data.partition import By, Dirichlet, Iid, Natural, Partitioner, Quantity
from fedloom.data.rows import Row
from fedloom.types import DataError


def rows(*categories: str) -> list[Row]:
    return [Row(str(i), (), {"category": category}) for i, category in enumerate(categories)]


def split(part: Partitioner, of: list[Row], clients: int, seed: int = 0) -> dict[str, list[int]]:
    return part.split(of, clients, np.random.default_rng(seed))


def sizes(parts: dict[str, list[int]]) -> list[int]:
    return [len(part) for part in parts.values()]


def categories(parts: dict[str, list[int]], of: list[Row]) -> list[set[str]]:
    return [{of[i].fields["category"] for i in part} for part in parts.values()]


@settings(deadline=None, max_examples=60)
@given(
    part=st.sampled_from([Iid(), By(), Quantity(), Quantity(exponent=3), Dirichlet(alpha=5), Natural()]),
    names=st.lists(st.sampled_from("abcde"), min_size=1, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_every_partition_is_disjoint_complete_without_empty_clients_and_repeatable(
    part: Partitioner, names: list[str], share: float, seed: int
) -> None:
    of = rows(*names)
    clients = max(1, round(share * (len(of) // 4 if isinstance(part, Dirichlet) else len(of))))
    try:
        parts = split(part, of, clients, seed)
    except DataError:
        assert isinstance(part, Dirichlet)
        return
    assert sorted(i for owned in parts.values() for i in owned) == list(range(len(of)))
    assert min(sizes(parts)) >= 1
    assert len(parts) == (len(set(names)) if isinstance(part, Natural) else clients)
    assert parts == split(part, of, clients, seed)
    assert list(parts) == list(split(part, of, clients, seed))


def test_names_have_one_width_and_client_order() -> None:
    assert list(split(Iid(), rows(*"ab"), 2)) == ["client-1", "client-2"]
    names = list(split(Iid(), rows(*"ab" * 60), 100))
    assert (names[0], names[-1]) == ("client-001", "client-100")
    assert names == sorted(names)


def test_iid_is_even_and_mixed() -> None:
    of = rows(*["a"] * 500, *["b"] * 500)
    parts = split(Iid(), of, 3)
    assert sizes(parts) == [334, 333, 333]
    assert all(100 < sum(i < 500 for i in part) < 234 for part in parts.values())
    assert parts != split(Iid(), of, 3, seed=1)


def test_by_gives_each_client_one_category() -> None:
    of = rows(*"bacbacb")
    assert categories(split(By(), of, 3), of) == [{"a"}, {"b"}, {"c"}]


def test_by_merges_the_largest_categories_into_the_smallest_clients() -> None:
    of = rows(*"a" * 4, *"b" * 5, *"c" * 7, *"d" * 10)
    parts = split(By(), of, 2)
    assert categories(parts, of) == [{"a", "d"}, {"b", "c"}]
    assert sizes(parts) == [14, 12]


def test_by_cuts_categories_in_proportion_to_their_size() -> None:
    of = rows(*"a" * 60, *"b" * 30, *"c" * 10)
    parts = split(By(), of, 10)
    assert [next(iter(one)) for one in categories(parts, of)] == [*"aaaaaa", *"bbb", "c"]
    assert sizes(parts) == [10] * 10
    assert all(len(one) == 1 for one in categories(parts, of))
    everyone = split(By(), rows(*"aaab"), 4)
    assert sizes(everyone) == [1] * 4


def test_quantity_follows_the_power_law() -> None:
    of = rows(*"a" * 10_000)
    got = sizes(split(Quantity(exponent=1), of, 4))
    wanted = 10_000 * np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (1 + 1 / 2 + 1 / 3 + 1 / 4)
    assert np.abs(np.array(got) - wanted).max() < 3
    assert sizes(split(Quantity(exponent=0), of, 4)) == [2500] * 4
    assert min(sizes(split(Quantity(exponent=9), of, 100))) == 1


def test_dirichlet_is_skewed_for_small_alpha_and_even_for_large() -> None:
    of = rows(*"abcd" * 500)

    def largest(alpha: float) -> float:
        parts = split(Dirichlet(alpha=alpha), of, 5)
        counts = np.array(
            [[sum(of[i].fields["category"] == c for i in part) for c in "abcd"] for part in parts.values()]
        )
        return float((counts.max(axis=0) / counts.sum(axis=0)).mean())

    assert largest(1e4) < 0.22
    assert largest(0.05) > 0.7


def test_dirichlet_draws_anew_until_no_client_is_empty() -> None:
    of = rows(*"ab" * 20)
    for seed in range(20):
        assert min(sizes(split(Dirichlet(alpha=0.5), of, 6, seed))) >= 1
    with pytest.raises(DataError, match=r"data\.partition\.alpha=0\.001.*100 draws.*raise alpha, lower data\.clients"):
        split(Dirichlet(alpha=0.001), of, 30)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_alpha_is_positive(alpha: float) -> None:
    with pytest.raises(ValidationError):
        Dirichlet(alpha=alpha)


def test_natural_clients_bear_safe_unique_names() -> None:
    of = rows("C++", "c#", "C", "../etc", "a b", "a/b", "hash", "", "日本")
    parts = split(Natural(), of, 1)
    owners = {of[part[0]].fields["category"]: name for name, part in parts.items()}
    assert owners["C++"] == "C++"
    assert {owners["C"], owners["c#"]} == {"C", "c-2"}
    assert owners["../etc"] == "etc"
    assert {owners["a b"], owners["a/b"]} == {"a-b", "a-b-2"}
    assert owners["hash"] == "hash-2"
    assert {owners[""], owners["日本"]} == {"client", "client-2"}
    assert list(parts.values()) == [[i] for i in sorted(range(len(of)), key=lambda i: of[i].fields["category"])]


@pytest.mark.parametrize("part", [Iid(), By(), Quantity(), Dirichlet()], ids=lambda part: part.part_name)
def test_more_clients_than_rows_is_an_error(part: Partitioner) -> None:
    with pytest.raises(DataError, match=r"data\.clients=5: there are only 3 rows"):
        split(part, rows(*"abc"), 5)


def test_an_unknown_key_names_the_keys_that_rows_have() -> None:
    with pytest.raises(
        DataError, match=r"data\.partition\.key.*'categry'; did you mean 'category'\?; the rows have: category"
    ):
        split(By(key="categry"), rows(*"abc"), 2)
    with pytest.raises(DataError, match="no fields at all"):
        split(Natural(), [Row("r", ())], 1)
    with pytest.raises(DataError, match=r"(?s)1 of 2 rows have no field 'category'.*row bare"):
        split(Dirichlet(), [*rows("a"), Row("bare", (), {"other": "x"})], 1)
