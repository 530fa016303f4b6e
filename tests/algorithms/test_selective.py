"""Layer selection: FedAvg where every layer is chosen, the masks that the objective asks for, and what is sent."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.by_hand import drive
from tests.bare import bare_server
from tests.helpers import adapter, lines, run, same, tree
from tests.tiny import tiny_model, tiny_model_folder
from torch import Tensor
from torch.nn import functional

import fedloom
from fedloom import recipe as recipes
from fedloom import tensors
from fedloom.algorithms import Client
from fedloom.algorithms.layer_rules import (
    Asked,
    Both,
    Bottom,
    Full,
    GradientNorm,
    LayerRule,
    Random,
    Top,
    agreed,
    layer_of,
    layers_of,
    objective,
)
from fedloom.algorithms.selective import Selective
from fedloom.assets import prepare
from fedloom.checkpoint import Checkpoints
from fedloom.runtime.engine import Engine
from fedloom.tracking import Sink
from fedloom.types import Bundle, ClientUpdate, Fitted, Gradient, Message, RecipeError, ServerState
from fedloom.wire import codec
from fedloom.world import World

SHALLOW = {"name": "selective", "budget": 1}


def _asked(budgets: list[int], scores: Any, layers: int = 5) -> Asked:
    scores = torch.as_tensor(scores, dtype=torch.float64)
    return Asked(budgets, layers, scores, torch.Generator().manual_seed(0))


def _chosen(masks: Tensor) -> list[set[int]]:
    return [{i for i, on in enumerate(row) if on} for row in masks.tolist()]


# rules


def test_rules_of_place() -> None:
    asked = _asked([1, 2, 3, 9], [])
    assert _chosen(Top().masks(asked)) == [{4}, {3, 4}, {2, 3, 4}, {0, 1, 2, 3, 4}]
    assert _chosen(Bottom().masks(asked)) == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3, 4}]
    assert _chosen(Both().masks(asked)) == [{4}, {0, 4}, {0, 3, 4}, {0, 1, 2, 3, 4}]
    assert _chosen(Full().masks(asked)) == [set(range(5))] * 4


def test_random_layers_differ_from_client_to_client_and_fill_the_budget() -> None:
    found = _chosen(Random().masks(_asked([3] * 40, [], layers=6)))
    assert {len(one) for one in found} == {3}
    assert len({tuple(sorted(one)) for one in found}) > 5
    assert set().union(*found) == set(range(6))


def _naive(scores: Tensor, masks: Tensor, price: float) -> float:
    """The paper's objective, term by term."""
    clients, layers = scores.shape
    total = 0.0
    for k, layer in itertools.product(range(clients), range(layers)):
        total += float(masks[k, layer]) * float(scores[k, layer])
    for k, j, layer in itertools.product(range(clients), range(clients), range(layers)):
        if j != k:
            total -= price / 2 * abs(int(masks[k, layer]) - int(masks[j, layer]))
    return total


@pytest.mark.parametrize("price", [0.0, 0.05, 0.2, 1.0, 100.0])
@pytest.mark.parametrize("budgets", [[2, 2, 2], [1, 2, 3]])
def test_no_client_could_change_its_mask_to_the_good(price: float, budgets: list[int]) -> None:
    """Against every other mask of every client; with equal budgets the ends of lambda are the best of all."""
    stream = torch.Generator().manual_seed(3)
    each = [[[i in c for i in range(4)] for c in itertools.combinations(range(4), budget)] for budget in budgets]
    for _ in range(5):
        scores = torch.rand(3, 4, generator=stream, dtype=torch.float64)
        found = agreed(scores, budgets, price)
        value = _naive(scores, found, price)
        assert found.sum(1).tolist() == budgets
        assert objective(scores, found, price) == pytest.approx(value, rel=1e-12, abs=1e-9)
        for k, masks in enumerate(each):
            for mask in masks:
                other = found.clone()
                other[k] = torch.tensor(mask)
                assert _naive(scores, other, price) <= value + 1e-12
        if price in (0.0, 100.0) and len(set(budgets)) == 1:
            best = max(_naive(scores, torch.tensor(masks), price) for masks in itertools.product(*each))
            assert value == pytest.approx(best)


def test_lambda_of_zero_is_each_clients_own_largest_and_a_large_one_the_same_masks() -> None:
    scores = torch.eye(4, 6, dtype=torch.float64) + 0.01 * torch.arange(6, dtype=torch.float64)
    budgets = [2] * 4
    own = _chosen(GradientNorm(lam=0).masks(_asked(budgets, scores, 6)))
    assert own == [{0, 5}, {1, 5}, {2, 5}, {3, 5}]
    common = _chosen(GradientNorm(lam=1000).masks(_asked(budgets, scores, 6)))
    assert len({tuple(sorted(one)) for one in common}) == 1
    top = set(torch.argsort(scores.sum(0), descending=True)[:2].tolist())
    assert common[0] == top


def test_names_of_layers() -> None:
    assert layer_of("model.layers.12.self_attn.q_proj.lora_A") == 12
    assert layer_of("transformer.h.3.attn.c_attn.lora_B") == 3
    assert layer_of("model.embed_tokens.weight") is None
    assert layer_of("model.layers.1.mlp.slot2.lora_A") == 1
    assert layers_of({"model.layers.10.a": torch.zeros(1), "model.layers.2.a": torch.zeros(1)}) == [2, 10]


# averaging


def _update(name: str, weight: float, **values: Tensor) -> ClientUpdate:
    return ClientUpdate(name, weight, Message({"params": Bundle(values)}))


def test_each_layer_is_the_mean_of_those_that_sent_it() -> None:
    algorithm, server = Selective(rule=Top()), bare_server(("a", "b", "c", "d"))
    params = {f"layers.{i}.w": torch.full((3,), float(i), dtype=torch.float64) for i in range(4)}
    params["norm.w"] = torch.zeros(3, dtype=torch.float64)
    change = lambda value: torch.full((3,), value, dtype=torch.float64)
    updates = [
        _update("a", 1.0, **{"layers.0.w": change(1.0), "layers.1.w": change(2.0), "norm.w": change(3.0)}),
        _update("b", 3.0, **{"layers.1.w": change(4.0), "norm.w": change(7.0)}),
        _update("c", 6.0, **{"layers.2.w": change(-5.0), "norm.w": change(0.5)}),
        _update("d", 2.0, **{"layers.1.w": change(-1.0), "norm.w": change(0.0)}),
    ]
    state = ServerState(0, params)
    combined = drive(algorithm.combine(server, state, updates))
    after = drive(algorithm.step(server, state, combined))
    told = {name: float(t[0]) for name, t in tensors.sub(after.params, params).items()}
    expected = {"layers.0.w": 1.0, "layers.1.w": (2 + 3 * 4 - 2 * 1) / 6, "layers.2.w": -5.0, "layers.3.w": 0.0}
    expected["norm.w"] = (3 + 3 * 7 + 6 * 0.5) / 12
    assert told == pytest.approx(expected, abs=1e-14)
    assert torch.equal(after.params["layers.3.w"], params["layers.3.w"])


@pytest.mark.parametrize("chosen", [{0}, {1, 3}, set(range(4))])
def test_what_a_client_trains_and_sends(chosen: set[int]) -> None:
    """The chosen layers and what lies outside all layers; nothing else moves while it trains."""
    start = {f"layers.{i}.w": torch.zeros(3) for i in range(4)} | {"norm.w": torch.zeros(3)}
    named = {f"layers.{i}.w" for i in chosen} | {"norm.w"}
    mask = torch.tensor([i in chosen for i in range(4)]).to(torch.uint8)
    message = Message({"params": Bundle(start), "masks": Bundle({"layers": mask})})

    def answer(effect: Any) -> Any:
        if isinstance(effect, Gradient):
            return {name: t + 2.0 for name, t in effect.params.items()}
        assert {name for name in start if effect.trainable(name)} == named
        return Fitted({name: t + 1.0 for name, t in start.items()}, 1, 0.1, 1, 1, (0.5,))

    client = Client("a", 0, {}, 1, 1.0, start, lambda round_: start)
    update, memory = drive(Selective().train(client, message), answer)
    assert set(update.message.groups["params"].tensors) == named
    assert update.message.groups["scores"].tensors["layers"].tolist() == pytest.approx([12**0.5] * 4)
    assert memory == {}


# runs


@pytest.mark.parametrize(("rule", "dtype"), [("gradient-norm", "fp32"), ("rgn", "fp64"), ("random", "fp32")])
def test_all_layers_are_fedavg_bit_for_bit(tiny_folder: Path, tmp_path: Path, rule: str, dtype: str) -> None:
    plain = run(tiny_folder, tmp_path / "a", model={"dtype": dtype})
    chosen = {"name": "selective", "budget": 2, "rule": rule}
    assert same(adapter(plain), adapter(run(tiny_folder, tmp_path / "b", model={"dtype": dtype}, algorithm=chosen)))


def test_full_is_fedavg_whatever_the_budget(tiny_folder: Path, tmp_path: Path) -> None:
    plain = run(tiny_folder, tmp_path / "a")
    full = run(tiny_folder, tmp_path / "b", algorithm={**SHALLOW, "rule": "full"})
    assert same(adapter(plain), adapter(full))


@pytest.mark.parametrize(("rule", "moved"), [("top", 1), ("bottom", 0)])
def test_only_chosen_layers_move(tiny_folder: Path, tmp_path: Path, rule: str, moved: int) -> None:
    run(tiny_folder, tmp_path / "a", algorithm={**SHALLOW, "rule": rule}, checkpoint={"keep": 9})
    saved = Checkpoints(tmp_path / "a" / "checkpoints", 3)
    before, after = saved.load(0)[0].params, saved.load(2)[0].params
    for name, t in after.items():
        if layer_of(name) != moved:
            assert torch.equal(t, before[name]), name
    assert any(not torch.equal(t, before[name]) for name, t in after.items())


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """All updates of the rounds, as the engine gets them from the algorithm."""
    seen: list[Message] = []
    real = Engine.train

    def watched(self: Engine, *about: Any) -> Any:
        replies = real(self, *about)
        seen.extend(Message(codec.decode(one.message)) for one in replies)
        return replies

    monkeypatch.setattr(Engine, "train", watched)
    return seen


def test_what_goes_up(tmp_path: Path, sent: list[Message]) -> None:
    folder = tiny_model_folder(tmp_path / "model", layers=5)
    algorithm = {"name": "selective", "budget": [1, 2, 3], "rule": {"name": "gradient-norm", "lam": 0}}
    run(folder, tmp_path / "r", algorithm=algorithm, checkpoint={"keep": 9})
    start = Checkpoints(tmp_path / "r" / "checkpoints", 3).load(0)[0].params
    layer = tensors.nbytes({n: t for n, t in start.items() if layer_of(n) == 0})
    for i, message in enumerate(sent):
        params = message.groups["params"].tensors
        chosen = {layer_of(name) for name in params}
        assert len(chosen) == i % 3 + 1
        assert tensors.nbytes(params) == layer * len(chosen)
        assert message.groups["scores"].tensors["layers"].numel() == 5
        assert sum(tensors.nbytes(b.tensors) for b in message.groups.values()) == layer * len(chosen) + 4 * 5


def test_clients_choose_by_the_norms_of_their_gradients(tmp_path: Path) -> None:
    """The scores of every client after a run are the norms of a gradient taken by plain autograd."""
    folder = tiny_model_folder(tmp_path / "model", layers=3)
    algorithm = {**SHALLOW, "examples": 2, "rule": {"name": "gradient-norm", "lam": 0}}
    run(folder, tmp_path / "r", rounds=1, algorithm=algorithm, model={"dtype": "fp64"})
    state = Checkpoints(tmp_path / "r" / "checkpoints", 3).load(1)[0]
    scores, masks = state.slots["scores"].tensors, state.slots["masks"].tensors
    assert set(scores) == set(masks) == {"client-1", "client-2", "client-3"}
    metrics = lines(tmp_path / "r" / "metrics.jsonl")
    assert [m["value"] for m in metrics if m["name"] == "layers"] == [1.0] * 3
    for name, score in scores.items():
        # before the first step B is zero, and so is the gradient of A: the norms are those of B alone
        assert float(score.min()) > 0
        assert masks[name].tolist() == [int(i == int(score.argmax())) for i in range(3)]


def test_scores_are_those_of_autograd(tmp_path: Path) -> None:
    """Where B is zero, so is the gradient of A, and that of B is s G A^T with G that of the dense weight."""
    folder = tiny_model_folder(tmp_path / "model", layers=3)
    recipe = recipes.load(tree(folder, algorithm={**SHALLOW, "examples": 2}, model={"dtype": "fp64"})).resolved()
    world = World(recipe, tmp_path, prepare(recipe, Sink()), Sink())
    told = world.engine.drive(recipe.algorithm.enrol(world.engine.client("client-2", 0)), "client-2", 0)
    found = told.groups["scores"].tensors["layers"].tolist()
    plain, rows, start = tiny_model(torch.float64, layers=3), world.rows("client-2"), world.assets.initial
    total, count = 0, 0
    for example in (rows[0], rows[1]):
        logits, labels = plain(example.ids[None]).logits[0, :-1], example.train[1:]
        total = total + functional.cross_entropy(logits[labels], example.ids[1:][labels], reduction="sum")
        count += int(labels.sum())
    (total / count).backward()
    squares = [0.0] * 3
    for module, weight in plain.named_modules():
        if (a := start.get(f"{module}.lora_A")) is not None:
            gradient = 2.0 * weight.weight.grad @ a.T  # alpha / r = 2
            squares[layer_of(f"{module}.")] += float(gradient.square().sum())
    assert found == pytest.approx([value**0.5 for value in squares], rel=1e-5)


def test_resumed_is_straight(tiny_folder: Path, tmp_path: Path) -> None:
    algorithm = {**SHALLOW, "rule": "rgn"}
    straight = run(tiny_folder, tmp_path / "a", rounds=3, algorithm=algorithm)
    run(tiny_folder, tmp_path / "b", rounds=1, algorithm=algorithm)
    again = fedloom.resume(tmp_path / "b", ["rounds=3"])
    assert same(adapter(straight), adapter(again))


@pytest.mark.parametrize("name", ["dora", "ia3", "full"])
def test_adapters_with_layers(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    small = {"name": name, "r": 2, "alpha": 4} if "ora" in name else {"name": name}
    changed = {**tree(tiny_folder), "adapter": small, "algorithm": {**SHALLOW, "rule": "gradient-norm"}}
    fedloom.run(changed, out=tmp_path / "r")
    saved = Checkpoints(tmp_path / "r" / "checkpoints", 3).load(2)[0]
    assert {int(mask.sum()) for mask in saved.slots["masks"].tensors.values()} == {1}


# refusals


@pytest.mark.parametrize("name", ["prompt-tuning", "prefix-tuning", "p-tuning"])
def test_adapters_without_layers_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"algorithm=selective chooses among the layers .*adapter={name}"):
        recipes.load({"algorithm": "selective", "adapter": name})


def test_names_without_layers_are_refused() -> None:
    (problem,) = Selective().check(["embed.weight"])
    assert re.search(r"nothing that the adapter trains has one \(the first: embed\.weight\); set adapter=lora", problem)
    assert not list(Selective().check(["embed.weight", "layers.0.weight"]))


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"budget": 0}, "algorithm.*greater than 0"),
        ({"budget": [2, 0]}, "algorithm.*greater than 0"),
        ({"rule": "tops"}, "no layerrule named 'tops'; did you mean 'top'"),
        ({"rule": {"name": "rgn", "lam": -1}}, "greater than or equal to 0"),
        ({"rule": {"name": "top", "lam": 1}}, "no key 'lam' here"),
    ],
)
def test_bad_settings(algorithm: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load({"algorithm": {"name": "selective", **algorithm}})


def test_robust_rules_are_refused() -> None:
    with pytest.raises(RecipeError, match="algorithm=selective combines updates itself"):
        recipes.load({"algorithm": "selective", "server": {"aggregator": "median"}})


def test_every_rule_is_of_the_family() -> None:
    assert set(LayerRule.known) == {"top", "bottom", "both", "random", "full", "gradient-norm", "rgn"}
