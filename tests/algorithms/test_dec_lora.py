"""Dec-LoRA: gossip between neighbours; complete graphs are FedAvg, mixing keeps the mean and contracts the rest."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.algorithms.quadratics import drive
from tests.bare import bare_server
from tests.helpers import adapter, lines, run, same
from tests.messages import payload, watched
from torch import Tensor

import fedloom
from fedloom import graphs, seeds
from fedloom.algorithms import Client
from fedloom.algorithms.declora import DecLora
from fedloom.checkpoint import Checkpoints, MemoryStore
from fedloom.graphs import Complete, ErdosRenyi, Graph, Ring
from fedloom.types import Fit, Fitted, Memory, RecipeError, ServerState

FP64 = {"model": {"dtype": "fp64"}}
SGD = {"trainer": {"optimizer": "sgd", "lr": 0.5, "clip_norm": None}}
FOUR = {"data": {"clients": 4, "partition": "iid"}}
EVERY = [Ring(), Complete(), ErdosRenyi(p=0.7)]


def dec(graph: Any = "ring") -> dict[str, Any]:
    return {"algorithm": {"name": "dec-lora", "graph": graph}}


def stream() -> torch.Generator:
    return seeds.generator(0, 0, None, "graph")


def gossip(graph: Graph, starts: Tensor, rounds: int) -> tuple[ServerState, list[dict[str, Memory]], Any]:
    """Run clients that take no step from a row of `starts` each; return the state, the memories of every round."""
    algorithm, names = DecLora(graph=graph), [f"c{i}" for i in range(len(starts))]
    server = bare_server(names)
    state = algorithm.init({"w": torch.zeros_like(starts[0])})
    memories: dict[str, Memory] = {name: {} for name in names}
    history = []
    for round_ in range(rounds):
        updates = []
        for i, name in enumerate(names):
            client = Client(name, round_, memories[name], 1, 1.0, state.params, lambda round_: {})
            # in round 0 everybody is moved to its start, as by local steps
            answer = lambda e, i=i, r=round_: Fitted({"w": starts[i]} if r == 0 else e.start, 1, 1.0, 1, 1, (0.0,))
            update, memories[name] = drive(algorithm.train(client, algorithm.broadcast(server, state, name)), answer)
            updates.append(update)
        state = drive(algorithm.step(server, state, drive(algorithm.combine(server, state, updates), None)), None)
        history.append(dict(memories))
    return state, history, algorithm


def spread(history: dict[str, Memory]) -> Tensor:
    rows = torch.stack([memory["adapter"].tensors["w"] for memory in history.values()])
    return rows - rows.mean(0)


@pytest.mark.parametrize("graph", EVERY, ids=lambda g: g.part_name)
@pytest.mark.parametrize("clients", [2, 3, 6, 9])
def test_metropolis_weights(graph: Graph, clients: int) -> None:
    edges = graph.edges(clients, stream())
    q = graphs.metropolis(edges)
    ones = torch.ones(clients, dtype=torch.float64)
    torch.testing.assert_close(q.sum(0), ones, rtol=0, atol=1e-15)
    torch.testing.assert_close(q.sum(1), ones, rtol=0, atol=1e-15)
    assert torch.equal(q, q.mT)
    assert bool((q >= 0).all())
    degrees = edges.sum(1).tolist()
    for i in range(clients):
        for j in range(clients):
            if i != j:
                expected = 1 / (1 + max(degrees[i], degrees[j])) if edges[i, j] else 0.0
                assert float(q[i, j]) == pytest.approx(expected, abs=1e-15)


def test_graphs() -> None:
    assert Ring().edges(5, stream()).sum(1).tolist() == [2] * 5
    assert Ring().edges(2, stream()).sum(1).tolist() == [1, 1]
    assert Ring().edges(1, stream()).sum().item() == 0
    assert Complete().edges(4, stream()).sum(1).tolist() == [3] * 4
    torch.testing.assert_close(graphs.metropolis(Complete().edges(4, stream())), torch.full((4, 4), 0.25).double())
    some = ErdosRenyi(p=0.3).edges(60, stream())
    assert torch.equal(some, ErdosRenyi(p=0.3).edges(60, stream()))
    assert torch.equal(some, some.mT)
    assert not some.diagonal().any()
    assert float(some.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(ErdosRenyi(p=1).edges(5, stream()), Complete().edges(5, stream()))


def test_what_is_reached() -> None:
    path = torch.zeros(5, 5, dtype=torch.bool)
    for i, j in ((0, 4), (4, 2), (1, 3)):
        path[i, j] = path[j, i] = True
    assert graphs.components(path).tolist() == [0, 1, 0, 1, 0]
    assert graphs.lonely(path, list("abcde")) == ["b", "d"]
    assert graphs.lonely(Ring().edges(40, stream()), [""] * 40) == []


@pytest.mark.parametrize("graph", EVERY, ids=lambda g: g.part_name)
def test_mixing_is_a_product_with_q_and_keeps_the_mean(graph: Graph) -> None:
    starts = torch.randn(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    q = graphs.metropolis(graph.edges(7, bare_server(()).stream(0, "graph")))
    state, history, algorithm = gossip(graph, starts, 3)
    found = torch.stack([memory["adapter"].tensors["w"] for memory in history[-1].values()])
    torch.testing.assert_close(found, q @ q @ starts, rtol=0, atol=1e-14)
    torch.testing.assert_close(algorithm.export(state)["shared"]["w"], starts.mean(0), rtol=0, atol=1e-14)
    own = [algorithm.export(state, memory)["local"]["w"] for memory in history[-1].values()]
    torch.testing.assert_close(torch.stack(own), q @ q @ q @ starts, rtol=0, atol=1e-14)
    apart = float(spread(history[-1]).square().sum())
    assert state.slots["consensus"].scalars["distance"] == pytest.approx(apart, rel=1e-9)


def test_the_consensus_error_of_a_ring_contracts_by_the_second_eigenvalue() -> None:
    q = graphs.metropolis(Ring().edges(8, stream()))
    values, vectors = torch.linalg.eigh(q)
    second = vectors[:, 6:7]  # of the largest eigenvalue but 1
    assert float(values[7]) == pytest.approx(1)
    assert float(values[6]) == pytest.approx((1 + 2 * torch.cos(torch.tensor(2 * torch.pi / 8)).item()) / 3)
    _, history, _ = gossip(Ring(), 5 + second, 6)
    sizes = [float(spread(one).norm()) for one in history]
    for before, after in pairwise(sizes):
        assert after / before == pytest.approx(float(values[6].abs()), rel=1e-9)
    any_start = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    largest = float(values[:7].abs().max())
    sizes = [float(spread(one).norm()) for one in gossip(Ring(), any_start, 6)[1]]
    assert all(after <= largest * before + 1e-12 for before, after in pairwise(sizes))


def test_equal_neighbours_change_nothing() -> None:
    """Bit for bit, so a client without neighbours, or before anybody has sent, is one that trains alone."""
    start = torch.randn(1, 4, generator=torch.Generator().manual_seed(1)) * 0.1
    _, history, _ = gossip(Ring(), start.repeat(5, 1), 4)
    assert all(torch.equal(memory["adapter"].tensors["w"], start[0]) for memory in history[-1].values())


def test_no_neighbours_is_local_training(tiny_folder: Path, tmp_path: Path) -> None:
    """Q = I, which a connected graph has with one client only."""
    one = {"data": {"clients": 1, "partition": "iid"}, "rounds": 3}
    alone = run(tiny_folder, tmp_path / "a", algorithm="local", **one)
    gossiped = run(tiny_folder, tmp_path / "b", **dec(), **one)
    place = Path("adapters/client-1/local/adapter_model.safetensors")
    assert same(load_file(alone.folder / place), load_file(gossiped.folder / place))
    assert same(load_file(alone.folder / place), adapter(gossiped))
    assert gossiped.metrics["federated"]["loss"] == alone.metrics["local"]["loss"]


def test_a_complete_graph_is_fedavg(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {**FP64, **SGD, **FOUR, "rounds": 3}
    plain = run(tiny_folder, tmp_path / "a", algorithm={"name": "fedavg", "weighting": "uniform"}, **changes)
    gossiped = run(tiny_folder, tmp_path / "b", **dec("complete"), **changes)
    mixed = gossiped.folder / "adapters" / "client-2" / "local" / "adapter_model.safetensors"
    for name, t in adapter(plain).items():
        torch.testing.assert_close(adapter(gossiped)[name], t, rtol=0, atol=1e-10)
        torch.testing.assert_close(load_file(mixed)[name], t, rtol=0, atol=1e-10)
    for key, value in plain.metrics["federated"]["loss"].items():
        assert gossiped.metrics["federated"]["loss"][key] == pytest.approx(value, abs=1e-9), key
    ring = run(tiny_folder, tmp_path / "c", **dec(), **changes)
    assert not all(torch.allclose(adapter(ring)[n], t, rtol=0, atol=1e-10) for n, t in adapter(plain).items())


@pytest.mark.parametrize(("graph", "degree"), [("ring", 2), ("complete", 4)])
def test_what_travels(tiny_folder: Path, tmp_path: Path, graph: str, degree: int) -> None:
    changes = {**dec(graph), "data": {"clients": 5, "partition": "iid"}}
    with watched() as seen:
        result = run(tiny_folder, tmp_path / "a", **changes, rounds=3)
    size = 4 * result.summary["trainable_parameters"]
    for passed in seen:
        assert payload(passed.up) == size
        assert payload(passed.down) == (degree * size if passed.round else 0)
        near = list(passed.down.groups["peers"].texts.values())
        assert len(near) == degree
        assert passed.client not in near
    metrics = lines(result.folder / "metrics.jsonl")
    moved = [line["value"] for line in metrics if line["name"] == "neighbour_distance"]
    assert len(moved) == 15
    assert moved[:5] == [0.0] * 5
    assert min(moved[5:]) > 0


def test_every_client_has_its_own_mixture_in_the_end(tiny_folder: Path, tmp_path: Path) -> None:
    result = run(tiny_folder, tmp_path / "a", **FP64, **FOUR, **dec())
    state, _ = Checkpoints(result.folder / "checkpoints", 9).load(2)
    q = graphs.metropolis(Ring().edges(4, stream()))
    store = MemoryStore(result.folder / "memories")
    store.look_at(2)
    for i in range(4):
        name = f"client-{i + 1}"
        own = load_file(result.folder / "adapters" / name / "local" / "adapter_model.safetensors")
        kept = store.load(name)["adapter"].tensors
        assert same(dict(kept), dict(state.slots[f"peer:{name}"].tensors))
        for key, t in kept.items():
            expected = sum(q[i, j] * state.slots[f"peer:client-{j + 1}"].tensors[key] for j in range(4))
            saved = f"base_model.model.{key}.weight"
            torch.testing.assert_close(own[saved], expected, rtol=0, atol=1e-14)
            assert t.dtype == torch.float64


@pytest.mark.parametrize("graph", ["ring", {"name": "erdos-renyi", "p": 0.8}])
def test_a_resumed_run_is_the_straight_one(tiny_folder: Path, tmp_path: Path, graph: Any) -> None:
    whole = run(tiny_folder, tmp_path / "a", **FOUR, **dec(graph), rounds=3)
    run(tiny_folder, tmp_path / "b", **FOUR, **dec(graph), rounds=1)
    longer = fedloom.resume(tmp_path / "b", ["rounds=3"])
    for key in ("adapter_sha256", "metrics", "trained_tokens"):
        assert longer.summary[key] == whole.summary[key], key


def test_a_rejected_clients_last_adapter_stands(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that fails in the first round counts as where everybody started."""
    from dataclasses import replace

    from fedloom.runtime import effects

    real = effects.fit.fit

    def broken(bench: Any, jobs: Any) -> Any:
        bad = lambda job: job.round == 0 and job.client == "client-2"
        return [
            replace(one, losses=(float("nan"),)) if bad(job) else one
            for job, one in zip(jobs, real(bench, jobs), strict=True)
        ]

    monkeypatch.setattr(effects.fit, "fit", broken)
    with watched() as seen:
        result = run(tiny_folder, tmp_path / "a", **dec())
    assert result.summary["rejected"] == 1
    second = {p.client: p.down.groups["peers"] for p in seen if p.round == 1}
    lone = next(i for i, name in second["client-1"].texts.items() if name == "client-2").partition(".")[0]
    assert not any(name.startswith(f"{lone}.") for name in second["client-1"].tensors)


def test_clients_that_never_trained_get_the_mean(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"data": {"clients": 5, "partition": "iid", "unseen": 0.2}, **dec()}
    with watched() as seen:
        result = run(tiny_folder, tmp_path / "a", **changes)
    stage = seen[0].engine.stage
    (stranger,) = set(stage.clients) - set(stage.server.clients)
    state, _ = Checkpoints(result.folder / "checkpoints", 9).load(2)
    groups = result.recipe.algorithm.broadcast(stage.server, state, stranger).groups
    assert same(dict(groups["mean"].tensors), dict(result.recipe.algorithm.export(state)["shared"]))
    assert result.metrics["unseen"]["loss"]["loss"] > 0


def test_the_effect_asks_for_all_names() -> None:
    client = Client("a", 0, {}, 1, 1.0, {"w": torch.ones(2)}, lambda round_: {})
    algorithm = DecLora()
    effect = next(algorithm.train(client, algorithm.broadcast(bare_server(("a", "b")), ServerState(0, {}), "a")))
    assert isinstance(effect, Fit)
    assert effect.trainable is None
    assert torch.equal(effect.start["w"], torch.ones(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dec({"name": "erdos-renyi", "p": 0.01}), r"not connected, client-1 cannot reach .*raise algorithm.graph.p"),
        ({**dec(), "sampler": {"fraction": 0.5}}, "sampler=uniform leaves clients out.*without fraction and count"),
        ({**dec(), "server": {"optimizer": "fedavgm"}}, "there is no server"),
        (dec("star"), "no graph named 'star'"),
        (dec({"name": "erdos-renyi", "p": 0}), "greater than 0"),
        ({**dec(), "adapter": {"name": "lora", "ranks": [1, 2]}}, "one rank at all clients"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_folder: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(tiny_folder, tmp_path / "a", **changes)
    assert not (tmp_path / "a").exists()


def test_a_torn_graph_is_refused_where_the_clients_are_known_later(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"data": {"partition": {"name": "natural", "key": "category"}}, **dec({"name": "erdos-renyi", "p": 0.01})}
    with pytest.raises(RecipeError, match=r"not connected, .* cannot reach .*algorithm.graph.p"):
        run(tiny_folder, tmp_path / "a", **changes)
