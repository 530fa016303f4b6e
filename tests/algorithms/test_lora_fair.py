"""LoRA-FAIR: the closed form against its normal equations, the paper's distance against naive dense arithmetic."""

from __future__ import annotations

import pytest
import torch
from tests.algorithms.by_hand import LAYERS, Federation, adapter, close, federation, names, ranks, size, wander
from torch import Tensor

from fedloom.algorithms import Algorithm
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.lorafair import LoraFair, LoraFairSgd
from fedloom.types import Fit, Tensors

SIZES = {"a": 2, "b": 3, "c": 5}
RANK = 3


def begun(algorithm: Algorithm, sizes: dict[str, int] = SIZES) -> Federation:
    return federation(algorithm, sizes, ranks(RANK), adapter(RANK))


def dense(found: Federation, module: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean A and B of what the clients trained, and W = sum_k p_k B_k A_k."""
    total = sum(found.examples.values())
    shares = {name: found.examples[name] / total for name in found.ended}
    a = sum(p * found.ended[n][f"{module}.lora_A"] for n, p in shares.items())
    b = sum(p * found.ended[n][f"{module}.lora_B"] for n, p in shares.items())
    w = sum(p * found.ended[n][f"{module}.lora_B"] @ found.ended[n][f"{module}.lora_A"] for n, p in shares.items())
    return a, b, w  # type: ignore[return-value]


def corrected(found: Federation, module: str) -> Tensor:
    return found.state.params[f"{module}.lora_B"]


@pytest.mark.parametrize("penalty", [0.0, 0.01, 1.0])
def test_the_closed_form_is_the_minimum(penalty: float) -> None:
    found = begun(LoraFair(penalty=penalty))
    found.round()
    for module in LAYERS:
        a, b, w = dense(found, module)
        d = corrected(found, module) - b
        torch.testing.assert_close(found.state.params[f"{module}.lora_A"], a, rtol=0, atol=1e-12)
        # where the gradient of 1/2 ||W - (B + D) A||^2 + lambda/2 ||D||^2 is zero
        slope = ((b + d) @ a - w) @ a.T + penalty * d
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)
        assert d.norm() > 1e-3
        assert (w - (b + d) @ a).norm() < (w - b @ a).norm()


def test_without_penalty_it_is_a_projection_on_the_rows_of_a() -> None:
    found = begun(LoraFair(penalty=0.0))
    found.round()
    for module in LAYERS:
        a, _, w = dense(found, module)
        torch.testing.assert_close(corrected(found, module) @ a, w @ torch.linalg.pinv(a) @ a, rtol=0, atol=1e-12)


def test_without_penalty_a_may_lack_rank() -> None:
    def repeated(name: str, round_: int, effect: Fit) -> Tensors:
        """Let all rows of A be equal."""
        ended = wander(name, round_, effect)
        return {key: t[:1].expand_as(t) if key.endswith("lora_A") else t for key, t in ended.items()}

    found = begun(LoraFair(penalty=0.0))
    found.round(repeated)
    for module in LAYERS:
        a, _, w = dense(found, module)
        torch.testing.assert_close(corrected(found, module) @ a, w @ torch.linalg.pinv(a) @ a, rtol=0, atol=1e-9)


@pytest.mark.parametrize("algorithm", [LoraFair(penalty=1e15), LoraFairSgd(penalty=1e6)])
def test_a_penalty_without_bound_is_fedavg(algorithm: Algorithm) -> None:
    fair, plain = begun(algorithm), begun(FedAvg())
    for _ in range(2):
        fair.round()
        plain.round()
    close(fair.state.params, plain.state.params)


@pytest.mark.parametrize("algorithm", [LoraFair(), LoraFair(penalty=0.0), LoraFairSgd()])
def test_one_client_is_local_training(algorithm: Algorithm) -> None:
    fair, plain = begun(algorithm, {"a": 4}), begun(FedAvg(), {"a": 4})
    for _ in range(3):
        fair.round()
        plain.round()
        close(fair.state.params, fair.ended["a"])
    close(fair.state.params, plain.state.params)


@pytest.mark.parametrize("algorithm", [LoraFair(), LoraFair(penalty=0.0), LoraFairSgd(penalty=1e-9)])
def test_equal_a_needs_no_correction(algorithm: Algorithm) -> None:
    def b_alone(name: str, round_: int, effect: Fit) -> Tensors:
        ended = wander(name, round_, effect)
        return {key: effect.start[key] if key.endswith("lora_A") else t for key, t in ended.items()}

    found = begun(algorithm)
    found.round(b_alone)
    for module in LAYERS:
        _, b, _ = dense(found, module)
        torch.testing.assert_close(corrected(found, module), b, rtol=0, atol=1e-12)


def test_the_order_of_the_clients_does_not_matter() -> None:
    for algorithm in (LoraFair(), LoraFairSgd()):
        one, other = begun(algorithm), begun(algorithm)
        for _ in range(2):
            one.round()
            other.round(cohort=["c", "a", "b"])
        close(one.state.params, other.state.params)


def objective(b: Tensor, d: Tensor, a: Tensor, w: Tensor, penalty: float) -> Tensor:
    """Return 1 - cos(W, (B + D) A) + lambda ||D||, from dense matrices."""
    product = (b + d) @ a
    return 1 - (w * product).sum() / (w.norm() * product.norm()) + penalty * d.norm()


@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_the_papers_form_takes_the_steps_of_dense_arithmetic(penalty: float) -> None:
    algorithm = LoraFairSgd(penalty=penalty, steps=7, lr=0.3)
    found = begun(algorithm)
    found.round()
    for module in LAYERS:
        a, b, w = dense(found, module)
        rate = 0.3 * float((b @ a).square().sum()) / float(torch.linalg.matrix_norm(a @ a.T, ord=2))
        d, values = torch.zeros_like(b), [float(objective(b, torch.zeros_like(b), a, w, penalty))]
        for _ in range(7):
            d = d.detach().requires_grad_()
            (slope,) = torch.autograd.grad(objective(b, d, a, w, 0.0), d)
            d = (d - rate * slope).detach()
            d = d * max(0.0, 1 - rate * penalty / float(d.norm()))
            values.append(float(objective(b, d, a, w, penalty)))
        torch.testing.assert_close(corrected(found, module), b + d, rtol=0, atol=1e-12)
        assert values == sorted(values, reverse=True)
        assert values[-1] < values[0]


def test_the_papers_form_ends_where_the_slope_is_the_penalty() -> None:
    penalty = 1e-3
    found = begun(LoraFairSgd(penalty=penalty, steps=3000))
    found.round()
    for module in LAYERS:
        a, b, w = dense(found, module)
        d = (corrected(found, module) - b).requires_grad_()
        (slope,) = torch.autograd.grad(objective(b, d, a, w, penalty), d)
        assert d.norm() > 1e-3
        assert slope.norm() < 1e-3 * penalty


def test_no_correction_where_there_is_no_product() -> None:
    found = begun(LoraFairSgd())
    found.round(lambda name, round_, effect: effect.start)
    assert not any(corrected(found, module).any() for module in LAYERS)


@pytest.mark.parametrize("algorithm", [LoraFair(), LoraFairSgd()])
def test_messages_are_fedavgs(algorithm: Algorithm) -> None:
    fair, plain = begun(algorithm), begun(FedAvg())
    fair.round()
    plain.round()
    for name in SIZES:
        assert size(fair.down[name]) == size(plain.down[name])
        assert names(fair.down[name]) == names(plain.down[name])
    total = sum(8 * RANK * (d_out + d_in) for d_out, d_in in LAYERS.values())
    assert all(size(update.message) == total for update in fair.updates)
