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
from fedloom.client.optimizers import AdamW
from fedloom.evaluate.view import RegimeView
from fedloom.types import Bundle, Fit, Losses, RecipeError
from fedloom.world import World

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
            weights = torch.tensor([row[m] / expected[name][m] for row in q], dtype=torch.float64)
            fitted = engine.hands.perform({0: Fit(w, weights=weights)}, [name], 1)[0]
            for key, t in fitted.params.items():
                change = expected[name][m] * (t - w[key])
                means[m][key] = means[m].get(key, 0) + client.examples * change
        total += client.examples
    state = rounds(them, [()], state)
    after = (state.params, state.slots["component1"].tensors)
    for mean, begun, found in zip(means, before, after, strict=True):
        for key in mean:
            torch.testing.assert_close(found[key], begun[key] + mean[key] / total, rtol=0, atol=1e-10)
    for name in them.clients:
        memory = them.memories.load(name)
        assert memory[SHARES].tensors["pi"].tolist() == pytest.approx(expected[name], abs=1e-12)
        largest = state.params if expected[name][0] >= expected[name][1] else state.slots["component1"].tensors
        assert same(dict(algorithm.export(state, memory)["personal"]), dict(largest))
        assert same(dict(engine.at_client(state, name, algorithm.own)), dict(largest))


def _sent(of: World, pi: tuple[float, float]) -> tuple[Any, list[float]]:
    """Return what a client sends in round 0 that begins with some shares, and the shares that it ends with."""
    algorithm, engine, name = of.recipe.algorithm, of.engine, of.clients[0]
    memory = {SHARES: Bundle({"pi": torch.tensor(pi, dtype=torch.float64)})}
    message = algorithm.broadcast(engine.stage.server, algorithm.init(of.assets.initial), name)
    update, after = engine.drive(algorithm.train(engine.client(name, 0, memory), message), name, 0)
    return update, after[SHARES].tensors["pi"].tolist()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_change_is_as_large_as_the_clients_share_in_it(tiny_folder: Path, tmp_path: Path, optimizer: str) -> None:
    """Under AdamW, the shipped recipe's, too, which takes any factor out of gradients."""
    recipe = recipes.load("fedem")
    assert isinstance(recipe.trainer.optimizer, AdamW)
    trainer = {**recipe.trainer.model_dump(), "optimizer": optimizer, "steps": 2, "batch": 2}
    them = world(tiny_folder, tmp_path, algorithm={"name": "fedem", "components": 2}, trainer=trainer)
    norms = []
    for wanted in (0.5, 0.05, 1e-3, 1e-6):
        update, pi = _sent(them, (1 - wanted, wanted))
        assert pi[1] == pytest.approx(wanted, rel=0.5)  # components are still near each other
        norms.append(tensors.norm(update.message.groups["component1"].tensors) / pi[1])
    assert norms == pytest.approx([norms[0]] * len(norms), rel=0.2)
    update, pi = _sent(them, (1.0, 0.0))
    assert pi == [1.0, 0.0]
    assert tensors.norm(update.message.groups["component1"].tensors) == 0.0


def test_one_step_of_plain_sgd_is_the_papers(tiny_folder: Path, tmp_path: Path) -> None:
    sgd = {"optimizer": "sgd", "lr": 0.5, "steps": 1, "clip_norm": None}
    them = world(tiny_folder, tmp_path, algorithm={"name": "fedem", "components": 2}, trainer=sgd)
    engine, name, pi = them.engine, them.clients[0], (0.7, 0.3)
    update, _ = _sent(them, pi)
    algorithm = them.recipe.algorithm
    message = algorithm.broadcast(engine.stage.server, algorithm.init(them.assets.initial), name)
    starts = [message.groups[group].tensors for group in update.changes]
    nll = torch.stack([engine.hands.perform({0: Losses(w)}, [name], 0)[0].tensors["nll"] for w in starts], 1)
    q = torch.softmax(torch.tensor(pi, dtype=torch.float64).log() - nll, 1)
    for m, (group, w) in enumerate(zip(update.changes, starts, strict=True)):
        fitted = engine.hands.perform({0: Fit(w, weights=q[:, m])}, [name], 0)[0]
        for key, change in tensors.sub(fitted.params, w).items():
            torch.testing.assert_close(
                update.message.groups[group].tensors[key], change, rtol=1e-5, atol=1e-8
            )  # weights are float32


def test_all_components_are_clipped_jointly(tiny_folder: Path, tmp_path: Path) -> None:
    clip = [{"name": "clip", "norm": 1e-3}]
    them = world(tiny_folder, tmp_path, algorithm={"name": "fedem", "components": 2}, transforms=clip)
    with watched() as seen:
        rounds(them, [()])
    for passed in seen:
        sizes = [tensors.norm(bundle.tensors) for bundle in passed.up.groups.values()]
        assert math.hypot(*sizes) == pytest.approx(1e-3, rel=1e-9)
        assert min(sizes) > 1e-5


def test_adapted_it_is_measured_as_a_mixture(tiny_folder: Path, tmp_path: Path) -> None:
    them = world(tiny_folder, tmp_path, algorithm={"name": "fedem", "components": 2}, adapt_steps=3)
    state = rounds(them, [()])
    algorithm, engine = them.recipe.algorithm, them.engine
    view = RegimeView(engine, them.assets.federation, them.recipe, state, "federated adapted", "test")
    parts = [state.params, state.slots["component1"].tensors]
    for name, found in view.losses().items():
        nll = torch.stack([engine.hands.perform({0: Losses(w)}, [name], 1)[0].tensors["nll"] for w in parts], 1)
        pi = them.memories.load(name)[SHARES].tensors["pi"]
        for _ in range(3):
            pi = torch.softmax(pi.log() - nll, 1).mean(0)
        test = [engine.hands.perform({0: Losses(w, "test")}, [name], 1)[0].tensors["nll"] for w in parts]
        mixed = -torch.logsumexp(pi.log() - torch.stack(test, 1), 1)
        assert found.scalars["nll"] == pytest.approx(float(mixed.sum()), abs=1e-9)
        one = engine.at_client(state, name, lambda who, message: algorithm.adapt(who, message, 3))
        assert any(one is part or same(dict(one), dict(part)) for part in parts)


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
