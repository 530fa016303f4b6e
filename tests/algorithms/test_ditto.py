"""Ditto: FedAvg's global branch, a personal one between local training and the global adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.algorithms.bowls import Bowl, Federation, near
from tests.algorithms.worlds import rounds, world
from tests.helpers import same

from fedloom.algorithms.ditto import OWN, Ditto
from fedloom.algorithms.fedavg import FedAvg


def test_without_a_pull_it_is_local_training_beside_fedavg(tiny_folder: Path, tmp_path: Path) -> None:
    cohorts = [(), ("client-1", "client-3"), ()]
    plain = rounds(world(tiny_folder, tmp_path / "a"), cohorts)
    alone = world(tiny_folder, tmp_path / "b", algorithm="local")
    rounds(alone, cohorts)
    for lam in (0, 5):
        both = world(tiny_folder, tmp_path / str(lam), algorithm={"name": "ditto", "lam": lam})
        state = rounds(both, cohorts)
        assert same(dict(state.params), dict(plain.params))
        for name in both.clients:
            local = dict(alone.memories.load(name)["adapter"].tensors)
            assert same(dict(both.memories.load(name)[OWN].tensors), local) == (lam == 0)


@pytest.mark.parametrize("lam", [0.5, 8.0])
def test_many_personal_steps_find_the_point_between(lam: float) -> None:
    """v = (a c + lambda w) / (a + lambda), with w as it was received."""
    bowls = {"a": Bowl(2.0, 1.0, rows=3), "b": Bowl(0.5, -4.0)}
    them, plain = Federation(Ditto(lam=lam, personal_steps=400), bowls), Federation(FedAvg(), bowls)
    for _ in range(3):
        received = float(them.state.params["w"][0])
        them.round()
        plain.round()
        for name, bowl in bowls.items():
            point = (bowl.slope * bowl.target + lam * received) / (bowl.slope + lam)
            assert near(them.memories[name][OWN].tensors, point)
            assert near(them.own(name), point)
    assert same(dict(them.state.params), dict(plain.state.params))
    assert them.updates[0].metrics["steps"] == 3 + 400
    assert them.updates[0].weight == 3


def test_a_client_that_never_trained_uses_the_global_adapter() -> None:
    them = Federation(Ditto(), {"a": Bowl(1.0, 1.0), "b": Bowl(1.0, 3.0)})
    them.round(["a"])
    assert them.own("b") is them.state.params
    assert them.algorithm.export(them.state, {})["personal"] is them.state.params
