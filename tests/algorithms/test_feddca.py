"""FedDCA: FedAvg without public rows, greedy coverage, rows given once and to one client, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import adapter, lines, run, same, tree
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast

import fedloom
from fedloom import recipe as recipes
from fedloom.algorithms import coverage
from fedloom.algorithms.pairs import packed, unpacked
from fedloom.checkpoint import Checkpoints, MemoryStore
from fedloom.client.embedder import embedded
from fedloom.runtime.engine import Engine
from fedloom.types import Bundle, Message, Pair, RecipeError
from fedloom.wire import codec

PUBLIC = {"public": 6, "source": {"rows_per_category": 8}}
GIVES = {"name": "feddca", "centres": 2, "retrieve": 2}


def _points(seed: int, *sizes: int) -> list[Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return [coverage.units(torch.randn(size, 5, generator=stream)) for size in sizes]


# coverage


def _naive(domain: Tensor, points: Tensor) -> float:
    return sum(max(float(d @ p) for p in points) if len(points) else -1.0 for d in domain) / len(domain)


@given(st.integers(0, 10_000), st.lists(st.integers(1, 5), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_greedy_steps_are_the_best_ones_and_never_gain_more(seed: int, sizes: list[int]) -> None:
    candidates = _points(seed, *sizes)
    chosen, gains = coverage.one_each(candidates)
    assert [0 <= i < size for i, size in zip(chosen, sizes, strict=True)] == [True] * len(sizes)
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(gains))
    domain, left, taken = torch.cat(candidates), dict(enumerate(candidates)), []
    for gain in gains:
        before = _naive(domain, torch.stack(taken) if taken else torch.zeros(0, 5))
        best = {
            (owner, i): _naive(domain, torch.stack([*taken, point])) - before
            for owner, own in left.items()
            for i, point in enumerate(own)
        }
        assert gain == pytest.approx(max(best.values()), abs=1e-5)
        owner = next(o for o in left if best[o, chosen[o]] > max(best.values()) - 1e-6)
        taken.append(left.pop(owner)[chosen[owner]])
    assert coverage.covered(domain, torch.stack(taken)) == pytest.approx(sum(gains) - 1, abs=1e-5)


def test_clients_of_one_kind_send_different_centres_where_that_covers_more() -> None:
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    both = torch.cat([east, north])
    chosen, _ = coverage.one_each([both, both])
    assert sorted(chosen) == [0, 1]


def test_centres_are_those_of_clear_clusters() -> None:
    stream = torch.Generator().manual_seed(1)
    directions = torch.eye(4)[:3]
    points = torch.cat([10 * one + 0.05 * torch.randn(20, 4, generator=stream) for one in directions])
    points = points[torch.randperm(60, generator=stream)]
    found = coverage.centres(points, 3)
    assert torch.allclose((found @ directions.mT).amax(0), torch.ones(3), atol=1e-3)
    assert torch.allclose(found.norm(dim=1), torch.ones(3))


def test_few_points_are_their_own_centres() -> None:
    (points,) = _points(0, 2)
    found = coverage.centres(points, 5)
    assert torch.allclose(found[torch.argsort(found[:, 0])], points[torch.argsort(points[:, 0])], atol=1e-6)


def test_nearest_rows_go_to_one_client_each() -> None:
    stock = coverage.units(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.5, 0.5]]))
    east = torch.tensor([1.0, 0.0])
    assert coverage.nearest_each([east, east], stock, 2) == [[0, 1], [3, 2]]
    assert coverage.nearest_each([east, east], stock, 3) == [[0, 1, 3], [2]]


# runs


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Message]]]:
    """What goes up and down in the rounds, and before the first, as it is encoded."""
    seen: dict[str, list[Message]] = {"up": [], "down": [], "enrol": []}
    real = Engine.train

    def watched(self: Engine, round_: int, errands: Any, *more: Any) -> Any:
        seen["down"] += [Message(codec.decode(one.message)) for one in errands]
        replies = real(self, round_, errands, *more)
        seen["up"] += [Message(codec.decode(one.message)) for one in replies]
        return replies

    monkeypatch.setattr(Engine, "train", watched)
    whole = Engine.admit

    def admitted(self: Engine, state: Any, clients: Any) -> Any:
        algorithm = self.stage.algorithm
        seen["enrol"] += [self.drive(algorithm.enrol(self.client(name, 0)), name, 0) for name in clients]
        return whole(self, state, clients)

    monkeypatch.setattr(Engine, "admit", admitted)
    yield seen


def test_no_public_rows_are_fedavg_bit_for_bit(tiny_folder: Path, tmp_path: Path) -> None:
    plain = run(tiny_folder, tmp_path / "a", data=PUBLIC)
    none = run(tiny_folder, tmp_path / "b", data=PUBLIC, algorithm={"name": "feddca", "retrieve": 0})
    assert same(adapter(plain), adapter(none))
    assert plain.summary["bytes_up"] == none.summary["bytes_up"]
    assert plain.summary["bytes_down"] == none.summary["bytes_down"]


def test_rows_are_given_once(tiny_folder: Path, tmp_path: Path, sent: dict[str, list[Message]]) -> None:
    result = run(tiny_folder, tmp_path / "r", data=PUBLIC, algorithm=GIVES, rounds=3, sampler={"count": 2})
    first = [message for message in sent["down"] if "given" in message.groups]
    assert len(sent["down"]) == 6
    took_part = {line["client"] for line in lines(result.folder / "metrics.jsonl") if line["name"] == "loss"} - {None}
    assert len(first) == len(took_part)
    given_ = [pair for message in first for pair in unpacked(message.groups["given"])]
    assert len(given_) == len(set(given_)) == 2 * len(first)
    split = json.loads((result.folder / "split.json").read_text())
    assert len(split["public"]) == 6
    kept = MemoryStore(result.folder / "memories")
    kept.restore(3)
    assert {pair for name in took_part for pair in unpacked(kept.load(name)["given"])} == set(given_)


def test_what_is_sent_and_what_is_not(tiny_folder: Path, tmp_path: Path, sent: dict[str, list[Message]]) -> None:
    """Centres of 4 bytes a number go up before round 0; the clients' texts never do."""
    result = run(tiny_folder, tmp_path / "r", data=PUBLIC, algorithm=GIVES)
    for message in sent["enrol"]:
        (centres,) = message.groups["centres"].tensors.values()
        assert centres.shape == (2, 32)
        assert centres.dtype == torch.float32
    assert len(sent["enrol"]) == 3
    for message in [*sent["up"], *sent["enrol"]]:
        assert not any(bundle.texts for bundle in message.groups.values())
    assert {tuple(message.groups) for message in sent["up"]} == {("params",)}
    once = sum(len(codec.encode(message.groups)) for message in sent["enrol"])
    rounds = sum(len(codec.encode(message.groups)) for message in sent["up"])
    assert result.summary["bytes_up"] == once + rounds


def test_clients_train_on_both(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = {"steps": None, "epochs": 1, "batch": 1}
    plain = run(tiny_folder, tmp_path / "a", data=PUBLIC, trainer=trainer)
    both = run(tiny_folder, tmp_path / "b", data=PUBLIC, algorithm=GIVES, trainer=trainer)
    # one epoch over two rows more for each of three clients, in each of two rounds
    assert both.summary["samples"] == plain.summary["samples"] + 2 * 3 * 2
    told = [line for line in lines(both.folder / "metrics.jsonl") if line["name"] == "coverage"]
    assert len(told) == 3
    assert -1 <= told[0]["value"] <= 1
    state = Checkpoints(both.folder / "checkpoints", 3).load(2)[0]
    assert state.slots["coverage"].scalars["coverage"] == told[0]["value"]


def test_resumed_is_straight(tiny_folder: Path, tmp_path: Path) -> None:
    small = {"data": PUBLIC, "algorithm": GIVES, "sampler": {"count": 2}}
    straight = run(tiny_folder, tmp_path / "a", rounds=3, **small)
    run(tiny_folder, tmp_path / "b", rounds=1, **small)
    assert same(adapter(straight), adapter(fedloom.resume(tmp_path / "b", ["rounds=3"])))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A folder with a small BERT."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijkl"),
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def test_an_encoder_of_ones_own(
    encoder: Path, tiny_folder: Path, tmp_path: Path, sent: dict[str, list[Message]]
) -> None:
    run(tiny_folder, tmp_path / "r", data=PUBLIC, algorithm={**GIVES, "embedder": str(encoder)})
    assert {tuple(m.groups["centres"].tensors["centres"].shape) for m in sent["enrol"]} == {(2, 16)}


def test_embeddings_do_not_depend_on_the_batch(encoder: Path) -> None:
    texts = ["a b c", "a much longer text than the others " * 9, "d"]
    together = embedded(encoder, texts)
    for text, one in zip(texts, together, strict=True):
        torch.testing.assert_close(embedded(encoder, [text])[0], one, rtol=0, atol=1e-5)


def test_pairs_come_back_as_they_were_packed() -> None:
    pairs = (Pair("a", "b"), Pair("", "ü\n"), Pair("a", "b"))
    assert unpacked(codec.decode(codec.encode({"given": packed(pairs)}))["given"]) == pairs
    assert unpacked(Bundle()) == ()


# refusals


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"gives clients rows of the server, which has none; set data\.public to their number, at least 128"),
        (
            {"public": 100},
            r"algorithm\.retrieve=32 rows for each of 4 clients are 128, and the server has 100.*most 25",
        ),
    ],
)
def test_too_few_public_rows(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load({"algorithm": "feddca", "data": data})
    recipes.load({"algorithm": {"name": "feddca", "retrieve": 0}, "data": data})


def test_a_share_that_gives_too_few_rows(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"retrieve=9 rows for each of 3 clients are 27, and the server has 7"):
        run(tiny_folder, tmp_path / "r", data={**PUBLIC, "public": 0.3}, algorithm={**GIVES, "retrieve": 9})


def test_an_encoder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"algorithm.*holds no config\.json.*set algorithm\.embedder=null"):
        recipes.load(tree(tmp_path, data=PUBLIC, algorithm={**GIVES, "embedder": str(tmp_path / "none")}))
