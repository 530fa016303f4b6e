"""FedEM: one component is FedAvg, shares and responsibilities, what is measured, what travels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.by_hand import drive
from tests.algorithms.worlds import rounds, world
from tests.helpers import same, tree
from tests.messages import payload, watched

from fedloom import recipe as recipes
from fedloom import tensors
from fedloom.algorithms.fedem import SHARES, FedEm
from fedloom.types import Fit, Losses, RecipeError

COHORTS = [(), ("client-1", "client-3"), ()]


def test_one_component_is_fedavg(tiny_folder: Path, tmp_path: Path) -> None:
    plain = rounds(world(tiny_folder, tmp_path / "a"), COHORTS)
    one = world(tiny_folder, tmp_path / "b", algorithm={"name": "fedem", "components": 1})
    state = rounds(one, COHORTS)
    assert same(dict(state.params), dict(plain.params))
    assert same(dict(one.recipe.algorithm.export(state)["shared"]), dict(plain.params))


def test_a_naive_second_implementation(tiny_folder: Path, tmp_path: Path) -> None:
    """Both steps of every client from the losses of its rows, and the components' means by themselves."""
    them = world(tiny_folder, tmp_path, algorithm={"name": "fedem", "components": 2})
    algorithm, engine = them.recipe.algorithm, them.engine
    state = rounds(them, [()])
    before = [state.params, state.slots["component1"].tensors]
    means: list[dict[str, Any]] = [{}, {}]
    total, expected = 0, {}
    for name in them.clients:
        client = engine.client(name, state.round)
        nll = [engine.hands.perform({0: Losses(w)}, [name], 1)[0].tensors["nll"].tolist() for w in before]
        pi = client.memory[SHARES].tensors["pi"].tolist()
        q = []
        for row in zip(*nll, strict=True):
            most = min(row)
            joint = [p * math.exp(most - one) for p, one in zip(pi, row, strict=True)]
            q.append([one / sum(joint) for one in joint])
        expected[name] = [sum(row[m] for row in q) / len(q) for m in range(2)]
        for m, w in enumerate(before):
            weights = torch.tensor([row[m] for row in q], dtype=torch.float64)
            fitted = engine.hands.perform({0: Fit(w, weights=weights)}, [name], 1)[0]
            for key, t in fitted.params.items():
                means[m][key] = means[m].get(key, 0) + client.examples * t
        total += client.examples
    state = rounds(them, [()], state)
    for mean, found in zip(means, (state.params, state.slots["component1"].tensors), strict=True):
        for key in mean:
            torch.testing.assert_close(found[key], mean[key] / total, rtol=0, atol=1e-10)
    for name in them.clients:
        memory = them.memories.load(name)
        assert memory[SHARES].tensors["pi"].tolist() == pytest.approx(expected[name], abs=1e-12)
        largest = state.params if expected[name][0] >= expected[name][1] else state.slots["component1"].tensors
        assert same(dict(algorithm.export(state, memory)["personal"]), dict(largest))
        assert same(dict(engine.at_client(state, name, algorithm.own)), dict(largest))


def test_what_is_measured_is_the_mixtures_likelihood(tiny_folder: Path, tmp_path: Path) -> None:
    them = world(tiny_folder, tmp_path, algorithm={"name": "fedem", "components": 2})
    state = rounds(them, [(), ()])
    name = them.clients[0]
    pi = them.memories.load(name)[SHARES].tensors["pi"].tolist()
    parts = [state.params, state.slots["component1"].tensors]
    each = [them.engine.hands.perform({0: Losses(w, "test")}, [name], 2)[0].tensors for w in parts]
    found = them.engine.evaluate(state, name, "test").scalars
    rows = list(zip(*(one["nll"].tolist() for one in each), strict=True))
    naive = 0.0
    for row in rows:
        low = min(row)
        naive += low - math.log(sum(p * math.exp(low - one) for p, one in zip(pi, row, strict=True)))
    assert found["nll"] == pytest.approx(naive, abs=1e-9)
    assert found["examples"] == len(rows)
    assert found["tokens"] == float(each[0]["tokens"].sum())
    assert found["bytes"] == float(each[0]["bytes"].sum())
    # no mixture is worse than its best part by more than -log of that part's share
    assert naive <= min(float(one["nll"].sum()) - len(rows) * math.log(p) for p, one in zip(pi, each, strict=True))


def test_what_travels_and_unseen_clients(tiny_folder: Path, tmp_path: Path) -> None:
    them = world(tiny_folder, tmp_path, algorithm={"name": "fedem", "components": 3}, data={"unseen": 0.34})
    with watched() as seen:
        state = rounds(them, [(), ()])
    size = tensors.nbytes(them.assets.initial)
    for passed in seen:
        for message in (passed.up, passed.down):
            assert set(message.groups) == {"params", "component1", "component2"}
            assert payload(message) == 3 * size
            assert all(set(bundle.tensors) == set(them.assets.initial) for bundle in message.groups.values())
    first = seen[0].down.groups  # apart from the beginning
    assert not same(dict(first["params"].tensors), dict(first["component1"].tensors))
    assert not same(dict(first["component1"].tensors), dict(first["component2"].tensors))
    (stranger,) = them.assets.federation.unseen
    algorithm, engine = them.recipe.algorithm, them.engine
    assert same(dict(engine.at_client(state, stranger, algorithm.own)), dict(state.params))
    parts = [state.params, *(state.slots[f"component{m}"].tensors for m in (1, 2))]
    nll = [engine.hands.perform({0: Losses(w)}, [stranger], 2)[0].tensors["nll"] for w in parts]
    responsible = torch.softmax(-torch.stack(nll, 1), 1).mean(0)
    adapted = engine.at_client(state, stranger, lambda client, message: algorithm.adapt(client, message, 1))
    assert same(dict(adapted), dict(parts[int(responsible.argmax())]))


def test_an_adapter_without_chance_is_refused() -> None:
    from tests.bare import bare_server

    start = {"w": torch.ones(2)}
    server = bare_server(("a", "b"), draw=lambda round_: start)
    algorithm = FedEm()
    with pytest.raises(RecipeError, match=r"algorithm.components=3: .* stay equal; set adapter=lora"):
        algorithm.broadcast(server, algorithm.init(start), "a")


def test_the_e_step_asks_for_no_training() -> None:
    from fedloom.algorithms import Client
    from fedloom.types import Bundle, Message

    client = Client("a", 0, {}, 2, 2.0, {}, lambda _: {})
    message = Message({name: Bundle({"w": torch.zeros(1)}) for name in ("params", "component1", "component2")})
    asked: list[Any] = []
    answers = iter([[1.0, 9.0], [2.0, 2.0], [3.0, 3.0]])

    def answer(effect: Any) -> Any:
        asked.append(effect)
        return Bundle({"nll": torch.tensor(next(answers), dtype=torch.float64)})

    adapted = drive(FedEm().adapt(client, message, 50), answer)
    assert all(isinstance(effect, Losses) for effect in asked)
    # the likeliest shares of 0 and 1 are 0.21 and 0.79, and none of 2
    assert adapted is message.groups["component1"].tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "/nowhere"}, "all components of algorithm=fedem would begin with that adapter"),
        ({"algorithm": {"name": "fedem", "components": 0}}, "greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load(tree(tiny_folder, **{"algorithm": "fedem", **changes}))
