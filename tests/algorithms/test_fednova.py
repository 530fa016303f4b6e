"""FedNova: steps that differ, momentum, equality with FedAvg, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.quadratics import Curve, federate, one_round
from tests.bare import bare_server
from tests.helpers import adapter, run

import fedloom
from fedloom import recipe as recipes
from fedloom import tensors
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fednova import FedNova
from fedloom.runtime.engine import Engine
from fedloom.server.optim import FedAvgM
from fedloom.types import Message, RecipeError
from fedloom.wire import codec

SGD = {"optimizer": "sgd", "lr": 0.1}


def _round(algorithm: Any, curves: dict[str, Curve], **server: Any) -> tuple[float, Any]:
    """Return the weight after one round from 0, and the updates."""
    state = algorithm.init({"w": torch.zeros(1, dtype=torch.float64)})
    after, updates = one_round(algorithm, bare_server(tuple(curves), **server), state, curves, {})
    return float(after.params["w"]), updates


def test_effective_steps_of_five_and_one_are_three() -> None:
    """On constant gradients -1 and -2, every client moves eta tau_k g_k, and the server 3 eta (g_1 + g_2) / 2."""
    curves = {"a": Curve(1e-9, 1e9, steps=5), "b": Curve(1e-9, 2e9, steps=1)}
    w, updates = _round(FedNova(), curves)
    assert [float(u.message.groups["normaliser"].tensors["l1"]) for u in updates] == [5.0, 1.0]
    assert w == pytest.approx(3 * 0.1 * 1.5, rel=1e-6)
    assert _round(FedAvg(), curves)[0] == pytest.approx(0.1 * (5 * 1 + 1 * 2) / 2, rel=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_normaliser_is_what_a_constant_gradient_is_multiplied_by(momentum: float, steps: int) -> None:
    """A slope of nearly 0 far from its minimum is a gradient of -1: the weight moves eta ||a||_1."""
    moved = Curve(1e-9, 1e9, steps, momentum=momentum).answer(_fit())
    assert FedNova(momentum=momentum).accumulated(steps) == pytest.approx(float(moved.params["w"]) / 0.1, rel=1e-6)


def test_uneven_weights_and_steps_are_the_equations() -> None:
    curves = {"a": Curve(1, 3, 4, rows=3), "b": Curve(2, -1, 2, rows=1)}
    w, _ = _round(FedNova(), curves)
    moves = {n: c.target * (1 - (1 - 0.1 * c.slope) ** c.steps) for n, c in curves.items()}
    share = {"a": 0.75, "b": 0.25}
    effective = sum(share[n] * c.steps for n, c in curves.items())
    assert w == pytest.approx(effective * sum(share[n] * moves[n] / c.steps for n, c in curves.items()), rel=1e-12)


def test_unequal_steps_no_longer_draw_the_fixed_point() -> None:
    """One client takes ten steps and one takes one, both small: FedAvg ends near the first, FedNova between both."""
    curves = {"a": Curve(1, 0, steps=10, lr=1e-4), "b": Curve(1, 1, steps=1, lr=1e-4)}
    server = bare_server(tuple(curves), lr=100)
    nova = float(federate(FedNova(), server, curves, 300).params["w"])
    plain = float(federate(FedAvg(), server, curves, 300).params["w"])
    assert nova == pytest.approx(0.5, abs=1e-3)
    assert plain == pytest.approx(1 / 11, abs=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_equal_steps_are_fedavg(momentum: float, tiny_folder: Path, tmp_path: Path) -> None:
    trainer = {**SGD, "optimizer": {"name": "sgd", "momentum": momentum}, "steps": 3}
    changes = {"model": {"dtype": "fp64"}, "trainer": trainer}
    plain = run(tiny_folder, tmp_path / "a", **changes)
    nova = run(tiny_folder, tmp_path / "b", algorithm={"name": "fednova", "momentum": momentum}, **changes)
    a, b = adapter(plain), adapter(nova)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=1e-14)


def test_one_client_is_fedavg_whatever_its_steps() -> None:
    curves = {"a": Curve(1, 3, 7)}
    assert _round(FedNova(), curves)[0] == pytest.approx(_round(FedAvg(), curves)[0], rel=1e-14)


def test_a_server_optimiser_goes_on_top() -> None:
    curves = {"a": Curve(1, 3, 4), "b": Curve(2, -1, 2)}
    w, _ = _round(FedNova(), curves, optimizer=FedAvgM(), lr=0.5)
    assert w == pytest.approx(0.5 * _round(FedNova(), curves)[0], rel=1e-14)


def test_the_order_of_clients_does_not_matter() -> None:
    curves = {"a": Curve(1, 3, 4, rows=3), "b": Curve(2, -1, 2), "c": Curve(5, 2, 1, rows=2)}
    there, back = _round(FedNova(), curves)[0], _round(FedNova(), dict(reversed(curves.items())))[0]
    assert there == pytest.approx(back, abs=1e-15)


def test_two_rounds_of_epochs_resume_and_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    """Five categories in three clients: their steps differ."""
    data = {"partition": {"name": "dirichlet", "alpha": 0.4, "key": "category"}}
    changes = {"algorithm": "fednova", "trainer": {**SGD, "steps": None, "epochs": 1, "batch": 1}, "data": data}
    sent: list[Message] = []
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(Engine, "train", _noting(sent))
        whole = run(tiny_folder, tmp_path / "a", **changes)
    size = tensors.nbytes(adapter(whole))
    assert [_payload(message) for message in sent] == [size + 8] * 6
    assert len({float(m.groups["normaliser"].tensors["l1"]) for m in sent}) > 1
    run(tiny_folder, tmp_path / "b", **changes, rounds=1)
    assert fedloom.resume(tmp_path / "b", ["rounds=2"]).summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_the_aggregation_error_sees_what_clients_trained(tiny_folder: Path, tmp_path: Path) -> None:
    """With one client the new product is its own, although its change travels divided by three."""
    from tests.helpers import lines

    one = {"data": {"clients": 1, "partition": "iid"}, "model": {"dtype": "fp64"}, "trainer": {**SGD, "steps": 3}}
    found = lines(run(tiny_folder, tmp_path / "a", algorithm="fednova", **one).folder / "metrics.jsonl")
    errors = [line["value"] for line in found if line["name"] == "aggregation_error"]
    assert len(errors) == 2
    assert max(errors) < 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"optimizer": "adamw"}}, r"adaptive optimiser's is no fixed sum.*set trainer\.optimizer=sgd"),
        (
            {"trainer": {"optimizer": {"name": "sgd", "momentum": 0.9}}},
            r"momentum=0\.9: algorithm=fednova normalises for a momentum of 0; set algorithm\.momentum=0\.9",
        ),
        ({"trainer": {"optimizer": "sgd", "decay": 0.5}}, r"set trainer\.decay=1"),
    ],
)
def test_what_it_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load({"algorithm": "fednova", **changes})


def _fit() -> Any:
    from fedloom.types import Fit

    return Fit({"w": torch.zeros(1, dtype=torch.float64)})


def _payload(message: Message) -> int:
    return sum(tensors.nbytes(bundle.tensors) for bundle in message.groups.values())


def _noting(sent: list[Message]) -> Any:
    """Return an Engine.train that keeps what clients send."""
    real = Engine.train

    def train(self: Any, round_: int, errands: Any) -> Any:
        replies = real(self, round_, errands)
        sent.extend(Message(codec.decode(reply.message)) for reply in replies)
        return replies

    return train
