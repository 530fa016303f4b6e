"""LoRA-SB and Fed-SB: a core between frozen orthonormal factors; exact, r^2 numbers a matrix on the wire."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.algorithms.quadratics import drive
from tests.bare import bare_server
from tests.helpers import adapter, lines, run, same, tree
from tests.messages import payload, watched
from tests.tiny import tiny_model
from torch import Tensor

import fedloom
from fedloom import recipe as recipes
from fedloom.algorithms.fedsb import FedSb
from fedloom.assets import prepare
from fedloom.checkpoint import Checkpoints
from fedloom.client.adapters import Lora
from fedloom.client.lora_sb import LoraSb, frozen, plain
from fedloom.client.peft_files import load_peft
from fedloom.reopen import reopen
from fedloom.tracking import Sink
from fedloom.types import DataError, Gradient, ModelError, RecipeError, ServerState
from fedloom.world import set_stage

FP64 = {"model": {"dtype": "fp64"}}
SB: dict[str, Any] = {"algorithm": "fed-sb", "adapter": {"name": "lora-sb", "r": 4}, "data": {"public": 6}}
RANDOM: dict[str, Any] = {"algorithm": {"name": "fed-sb", "start": "random"}, "adapter": {"name": "lora-sb", "r": 4}}
IDS = torch.arange(3, 43).view(2, 20)


def states(result: Any, *rounds: int) -> list[ServerState]:
    return [Checkpoints(result.folder / "checkpoints", 99).load(round_)[0] for round_ in rounds]


def bare(gradients: dict[str, Tensor], algorithm: FedSb, r: int) -> ServerState:
    """Return the prepared state of modules whose full gradients are given; answers `Gradient` from them."""
    params = {}
    for module, g in gradients.items():
        params[f"{module}.lora_A"] = torch.eye(r, g.shape[1], dtype=g.dtype)
        params[f"{module}.lora_B"] = torch.eye(len(g), r, dtype=g.dtype)
        params[f"{module}.lora_R"] = torch.zeros(r, r, dtype=g.dtype)

    def answer(effect: Gradient) -> dict[str, Tensor]:
        found = {}
        for module, g in gradients.items():
            a, b = effect.params[f"{module}.lora_A"], effect.params[f"{module}.lora_B"]
            found[f"{module}.lora_A"], found[f"{module}.lora_B"] = b.mT @ g, g @ a.mT
        return found

    state: ServerState = drive(algorithm.prepare(bare_server(("a",)), ServerState(0, params)), answer)
    return state


def test_the_start_is_the_svd_of_the_gradient() -> None:
    stream = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(d, 20, generator=stream, dtype=torch.float64)).Q for d in (40, 30))
    s = 2.0 ** -torch.arange(20, dtype=torch.float64)
    g = u @ torch.diag(s) @ v.mT
    params = bare({"m": g}, FedSb(first_step=0.01, power=3), 4).params
    change = plain(params)["m.lora_B"] @ plain(params)["m.lora_A"]
    best = u[:, :4] @ torch.diag(s[:4]) @ v[:, :4].mT
    torch.testing.assert_close(change, -0.01 * (40 * 30) ** 0.5 * best / best.norm(), rtol=0, atol=1e-10)
    assert float(change.square().mean().sqrt()) == pytest.approx(0.01)
    still = frozen(params)
    for basis in (still["m.lora_A"].mT, still["m.lora_B"]):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_gradient_of_zero_and_a_step_of_zero_start_at_the_base() -> None:
    for g, algorithm in ((torch.zeros(9, 7), FedSb()), (torch.ones(9, 7), FedSb(first_step=0))):
        params = bare({"m": g}, algorithm, 3).params
        assert not params["m.lora_R"].any()
        torch.testing.assert_close(params["m.lora_A"] @ params["m.lora_A"].mT, torch.eye(3), rtol=0, atol=1e-6)


def test_prepare_finds_the_gradient_of_the_resident_weights(tiny_folder: Path, tmp_path: Path) -> None:
    """Against autograd on the whole weights, over the server's rows; the loss on them falls."""
    recipe = recipes.load(tree(tiny_folder, **{**FP64, **SB, "algorithm": {"name": "fed-sb", "power": 2}})).resolved()
    assets = prepare(recipe, Sink())
    from fedloom.checkpoint import MemoryStore
    from fedloom.runtime.engine import Engine

    stage, _ = set_stage(recipe, assets, MemoryStore(tmp_path / "m"), Sink())
    engine, algorithm = Engine(stage), recipe.algorithm
    state = engine.drive(algorithm.prepare(stage.server, algorithm.init(assets.initial)), None, 0)

    plain_model, rows = tiny_model(torch.float64), engine.hands.rows(None, "train")
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for i in range(len(rows)):
        labels = torch.where(rows[i].train, rows[i].ids, -100)[None]
        n = int(rows[i].train[1:].sum())
        total, count = total + plain_model(input_ids=rows[i].ids[None], labels=labels).loss * n, count + n
    loss = total / count
    loss.backward()
    weights = dict(plain_model.named_parameters())
    for module in assets.attached.layers:
        g = weights[f"{module}.weight"].grad
        u, s, vh = torch.linalg.svd(g)
        best = u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
        change = plain(state.params)[f"{module}.lora_B"] @ plain(state.params)[f"{module}.lora_A"]
        expected = -1e-4 * g.numel() ** 0.5 * best / best.norm()
        # transformers computes norms and losses in float32
        assert float((change - expected).norm() / expected.norm()) < 0.02, module
        weights[f"{module}.weight"].data.add_(change)
    from fedloom.client import fit

    after = fit.score(stage.bench, rows, state.params).scalars
    assert after["nll"] / after["tokens"] < loss.item() - 1e-3


@pytest.mark.parametrize("changes", [SB, RANDOM])
def test_exact(tiny_folder: Path, tmp_path: Path, changes: Any) -> None:
    with watched() as seen:
        result = run(tiny_folder, tmp_path / "a", **FP64, **changes, checkpoint={"keep": 99})
    error = [line["value"] for line in lines(result.folder / "metrics.jsonl") if line["name"] == "aggregation_error"]
    assert len(error) == 2
    assert max(error) < 1e-12
    one, two = states(result, 1, 2)
    assert same(frozen(one.params), frozen(two.params))
    clients = seen[0].engine.stage.clients
    passed = [p for p in seen if p.round == 1]
    sizes = [len(clients[p.client].train) for p in passed]
    for module in seen[0].engine.stage.bench.attached.layers:
        a, b = two.params[f"{module}.lora_A"], two.params[f"{module}.lora_B"]
        ended = [one.params[f"{module}.lora_R"] + p.up.groups["params"].tensors[f"{module}.lora_R"] for p in passed]
        ideal = sum(n / sum(sizes) * b @ core @ a for n, core in zip(sizes, ended, strict=True))
        found = plain(two.params)[f"{module}.lora_B"] @ plain(two.params)[f"{module}.lora_A"]
        torch.testing.assert_close(found, ideal, rtol=0, atol=1e-12)
        assert int(torch.linalg.matrix_rank(found)) <= 4
        eye = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(b.mT @ b, eye, rtol=0, atol=1e-12)
        torch.testing.assert_close(a @ a.mT, eye, rtol=0, atol=1e-12)


def test_only_r_travels_once_a_client_has_a_and_b(tiny_folder: Path, tmp_path: Path) -> None:
    with watched() as seen:
        run(tiny_folder, tmp_path / "a", **SB, rounds=4, sampler={"count": 2}, evaluate=["loss"])
    layers = seen[0].engine.stage.bench.attached.layers.values()
    cores = 4 * 16 * len(layers)
    once = sum(4 * 4 * (layer.d_in + layer.d_out) for layer in layers)
    known = set()
    for passed in seen:
        assert payload(passed.up) == cores
        assert all(name.endswith("lora_R") for group in passed.up.groups.values() for name in group.tensors)
        assert payload(passed.down) == cores + (0 if passed.client in known else once)
        known.add(passed.client)
    assert len(known) == 3 < len(seen)


def test_random_factors_are_never_sent(tiny_folder: Path, tmp_path: Path) -> None:
    with watched() as seen:
        run(tiny_folder, tmp_path / "a", **RANDOM)
    assert {payload(message) for p in seen for message in (p.up, p.down)} == {4 * 16 * 14}


def test_a_rejected_client_is_told_again(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lost its memory of the round, so it has to have A and B once more."""
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
        result = run(tiny_folder, tmp_path / "a", **SB)
    assert result.summary["rejected"] == 1
    assert {p.client for p in seen if p.round == 1 and "frozen" in p.down.groups} == {"client-2"}


@pytest.mark.parametrize("changes", [SB, RANDOM])
def test_a_resumed_run_is_the_straight_one(tiny_folder: Path, tmp_path: Path, changes: Any) -> None:
    more = {**changes, "server": {"optimizer": "fedadam", "lr": 0.01}} if changes is SB else changes
    whole = run(tiny_folder, tmp_path / "a", **more, rounds=3, sampler={"count": 2})
    run(tiny_folder, tmp_path / "b", **more, rounds=1, sampler={"count": 2})
    longer = fedloom.resume(tmp_path / "b", ["rounds=3"])
    for key in ("adapter_sha256", "metrics", "trained_tokens"):
        assert longer.summary[key] == whole.summary[key], key


def test_one_client_is_local_training(tiny_folder: Path, tmp_path: Path) -> None:
    """With full participation of one client the mean is its own R: the same as one round of twice the steps."""
    one = {**FP64, **RANDOM, "data": {"clients": 1, "partition": "iid"}}
    plain_sgd = {"optimizer": "sgd", "clip_norm": None, "lr": 0.5}
    twice = run(tiny_folder, tmp_path / "a", **one, rounds=2, trainer={**plain_sgd, "steps": 2})
    once = run(tiny_folder, tmp_path / "b", **one, rounds=1, trainer={**plain_sgd, "steps": 4})
    for name, t in adapter(twice).items():
        torch.testing.assert_close(t, adapter(once)[name], rtol=0, atol=1e-12)


def test_the_fast_path_is_the_reference_path(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {**FP64, **RANDOM, "evaluate": []}
    fast = adapter(run(tiny_folder, tmp_path / "a", **changes))
    reference = adapter(run(tiny_folder, tmp_path / "b", **changes, runtime={"reference": True}))
    for name, t in fast.items():
        torch.testing.assert_close(t, reference[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("reference", [False, True])
def test_gradients_of_all_three_by_the_chain_rule(reference: bool) -> None:
    """The layer with a core is the LoRA layer with B R in place of B."""
    ours, theirs = (tiny_model(torch.float64).requires_grad_(False) for _ in range(2))
    sb, lora = LoraSb(r=3).attach(ours, reference), Lora(r=3, alpha=3).attach(theirs, reference)
    stream = torch.Generator().manual_seed(1)
    params = {n: torch.randn(s, generator=stream, dtype=torch.float64) * 0.3 for n, s in sb.shapes().items()}
    mine, other = sb.load([params]), lora.load([plain(params)])
    outs = [model(input_ids=IDS).logits for model in (ours, theirs)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)
    for stack, out in zip((mine, other), outs, strict=True):
        stack.backward(out.square().mean())
    got, expected = (dict(zip(stack.moving, stack.grads(0), strict=True)) for stack in (mine, other))
    for module in sb.layers:
        b, core = params[f"{module}.lora_B"], params[f"{module}.lora_R"]
        through = expected[f"{module}.lora_B"]
        torch.testing.assert_close(got[f"{module}.lora_A"], expected[f"{module}.lora_A"], rtol=0, atol=1e-12)
        torch.testing.assert_close(got[f"{module}.lora_R"], b.mT @ through, rtol=0, atol=1e-12)
        torch.testing.assert_close(got[f"{module}.lora_B"], through @ core.mT, rtol=0, atol=1e-12)


def test_several_clients_and_plain_pairs_in_the_layers() -> None:
    model = tiny_model(torch.float64)
    attached = LoraSb(r=3).attach(model)
    stream = torch.Generator().manual_seed(2)
    one, two = (
        {n: torch.randn(s, generator=stream, dtype=torch.float64) * 0.3 for n, s in attached.shapes().items()}
        for _ in range(2)
    )

    def logits(clients: list[Any], ids: Tensor) -> Tensor:
        attached.load(clients)
        return model(input_ids=ids).logits.detach()

    both = logits([one, two], torch.cat([IDS, IDS]))
    torch.testing.assert_close(both[:2], logits([one], IDS), rtol=0, atol=1e-12)
    torch.testing.assert_close(both[2:], logits([plain(two)], IDS), rtol=0, atol=1e-12)
    merged = tiny_model(torch.float64)
    merged.load_state_dict(attached.merged(model, one))
    torch.testing.assert_close(merged(input_ids=IDS).logits, both[:2], rtol=0, atol=1e-12)


def test_the_exported_adapter_is_a_plain_one(tiny_folder: Path, tmp_path: Path) -> None:
    result = run(tiny_folder, tmp_path / "a", **FP64, **SB)
    (state,) = states(result, 2)
    assert same(load_peft(result.adapter), {n: t.contiguous() for n, t in plain(state.params).items()})
    theirs = peft.PeftModel.from_pretrained(tiny_model(torch.float64), result.adapter, autocast_adapter_dtype=False)
    merged = copy.deepcopy(theirs).merge_and_unload().state_dict()
    base = tiny_model(torch.float64).state_dict()
    ours = tiny_model(torch.float64)
    attached = LoraSb(r=4).attach(ours)
    attached.load([state.params])
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=0, atol=1e-12)
    for module in attached.layers:
        a, b, core = (state.params[f"{module}.lora_{x}"] for x in "ABR")
        expected = base[f"{module}.weight"] + b @ core @ a
        torch.testing.assert_close(merged[f"{module}.weight"], expected, rtol=0, atol=1e-12)
    for opened in (reopen(result.folder), reopen(result.folder, "latest")):
        with torch.no_grad():
            torch.testing.assert_close(opened.loaded.model(IDS).logits, ours(IDS).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["median", "foolsgold", "krum"])
def test_robust_rules_see_r_alone(tiny_folder: Path, tmp_path: Path, rule: str) -> None:
    changes = {**RANDOM, "data": {"clients": 5, "partition": "iid"}, "server": {"aggregator": rule}}
    result = run(tiny_folder, tmp_path / "a", **changes, checkpoint={"keep": 9}, evaluate=[])
    zero, two = states(result, 0, 2)
    assert same(frozen(zero.params), frozen(two.params))
    assert all(two.params[name].any() for name in two.params)


def test_what_is_counted_as_trainable(tiny_folder: Path, tmp_path: Path) -> None:
    result = run(tiny_folder, tmp_path / "a", **RANDOM, rounds=1, evaluate=[])
    assert result.summary["trainable_parameters"] == 14 * 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "fed-sb", "data": {"public": 6}}, "fed-sb trains R of B R A alone.*set adapter=lora-sb"),
        ({**SB, "algorithm": "fedavg"}, "frozen factors, which algorithm=fedavg would send.*algorithm=fed-sb, or"),
        ({**SB, "algorithm": "flexlora"}, "works on LoRA factors, which adapter=lora-sb has not"),
        ({**SB, "data": {"public": None}}, "set data.public.*algorithm.start=random"),
        (
            {**SB, "server": {"aggregator": {"name": "krum", "distance": "product"}}},
            "is what distances of R are already.*distance=factors",
        ),
        ({**SB, "init": "somewhere"}, "makes its own factors; remove init"),
        ({**SB, "compare": ["local"]}, "compare: local would train the factors.*compare=\\[\\]"),
        ({**SB, "algorithm": {"name": "fed-sb", "examples": 0}}, "algorithm.examples"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_folder: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(tiny_folder, tmp_path / "a", **changes)


def test_too_many_directions_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter.r=17: .*k_proj is 16 x 32.*at most 16.*lower adapter.r"):
        run(tiny_folder, tmp_path / "a", **{**SB, "adapter": {"name": "lora-sb", "r": 17}})


def test_no_public_rows_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"server has no rows to take a gradient on; raise data.public"):
        run(tiny_folder, tmp_path / "a", **{**SB, "data": {"public": 0.001}})
