"""Methods that claim an exact mean of products reach it; FedAvg on the factors does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.helpers import adapter, lines, run, same
from tests.tiny import tiny_model
from torch import Tensor

from fedloom import baselog, factors
from fedloom.checkpoint import Checkpoints
from fedloom.client.peft_files import load_peft
from fedloom.types import RecipeError, ServerState

EXACT = ["flora", "fedex", "flexlora"]
FP64 = {"model": {"dtype": "fp64"}}
WIDE = {"adapter": {"r": 8, "ranks": [2]}}  # 3 clients of rank 2: the mean product has rank 6 at most


def errors(result: Any) -> list[float]:
    """Return the aggregation error of every round."""
    return [line["value"] for line in lines(result.folder / "metrics.jsonl") if line["name"] == "aggregation_error"]


def changes(algorithm: str) -> dict[str, Any]:
    return {**FP64, **(WIDE if algorithm == "flexlora" else {}), "algorithm": algorithm}


@pytest.mark.parametrize("algorithm", EXACT)
def test_the_new_product_is_the_mean_of_the_products(tiny_folder: Path, tmp_path: Path, algorithm: str) -> None:
    found = errors(run(tiny_folder, tmp_path / "a", **changes(algorithm), rounds=3))
    assert len(found) == 3
    assert max(found) < 1e-12


def test_averaged_factors_are_biased(tiny_folder: Path, tmp_path: Path) -> None:
    found = errors(run(tiny_folder, tmp_path / "a", **FP64, rounds=3))
    assert len(found) == 3
    assert min(found) > 1e-3


@pytest.mark.parametrize("algorithm", EXACT)
def test_the_state_holds_what_naive_arithmetic_gives(tiny_folder: Path, tmp_path: Path, algorithm: str) -> None:
    """Two rounds of the whole weights, recomputed with dense products from what every client trained."""
    trained = _watch(algorithm)
    with trained as seen:
        result = run(tiny_folder, tmp_path / "a", **changes(algorithm), checkpoint={"keep": 9})
    checkpoints = Checkpoints(result.folder / "checkpoints", 9)
    total: dict[str, Tensor] = {}
    for round_ in (0, 1):
        sizes = [weight for weight, _ in seen[round_]]
        for module in {name.rpartition(".")[0] for name in seen[round_][0][1]}:
            ideal = sum(
                w / sum(sizes) * _scale(p, module) * p[f"{module}.lora_B"] @ p[f"{module}.lora_A"]
                for w, p in seen[round_]
            )
            state, _ = checkpoints.load(round_ + 1)
            before = total.get(module, torch.zeros_like(ideal))
            after = _whole(result, state, module)
            if algorithm == "flexlora":
                before = torch.zeros_like(ideal)  # each client's product holds the rounds before
            if algorithm == "fedex":
                before = _base(checkpoints.load(round_)[0], module, ideal)
            torch.testing.assert_close(after, before + ideal, rtol=0, atol=1e-12)
            total[module] = after


def test_the_exported_adapter_is_the_state(tiny_folder: Path, tmp_path: Path) -> None:
    """`adapter/` on the untouched base computes what the changed base with the adapter does."""
    result = run(tiny_folder, tmp_path / "a", algorithm="fedex", evaluate=["loss"], **FP64)
    state, _ = Checkpoints(result.folder / "checkpoints", 2).load(2)
    assert state.base
    plain, ours = tiny_model(torch.float64), tiny_model(torch.float64)
    loaded = PeftModel.from_pretrained(plain, result.folder / "adapter").eval()
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        for module in baselog.modules(state.base):
            weights[f"{module}.weight"].add_(_whole(result, state, module))
        ids = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(loaded(ids).logits, ours(ids).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("algorithm", ["flora", "fedex"])
def test_a_resumed_run_has_the_merges(tiny_folder: Path, tmp_path: Path, algorithm: str) -> None:
    import fedloom

    whole = run(tiny_folder, tmp_path / "a", algorithm=algorithm, rounds=4, sampler={"count": 2})
    run(tiny_folder, tmp_path / "b", algorithm=algorithm, rounds=2, sampler={"count": 2})
    longer = fedloom.resume(tmp_path / "b", ["rounds=4"])
    for key in ("adapter_sha256", "metrics", "trained_tokens"):
        assert longer.summary[key] == whole.summary[key], key


@pytest.mark.parametrize("algorithm", ["flora", "fedex"])
def test_a_dense_base_is_written_as_a_model(tiny_folder: Path, tmp_path: Path, algorithm: str) -> None:
    """Once the summed rank is that of a dense matrix, the log is dense and the result is a whole model."""
    from fedloom.reopen import reopen

    result = run(tiny_folder, tmp_path / "a", algorithm=algorithm, rounds=8, evaluate=["loss"], adapter={"r": 4})
    state, _ = Checkpoints(result.folder / "checkpoints", 2).load(8)
    assert state.base[0].whole
    assert not (result.folder / "adapter").exists()
    opened, merged = reopen(result.folder), tiny_model()
    merged.load_state_dict(type(merged).from_pretrained(result.folder / "merged").state_dict())
    ids = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, opened.loaded.model(ids).logits, rtol=0, atol=1e-4)


def test_an_absent_client_catches_up(tiny_folder: Path, tmp_path: Path) -> None:
    """Whoever follows its own messages alone holds the server's base log, bit for bit, however often it was absent."""
    from fedloom.runtime.engine import Engine
    from fedloom.types import Message
    from fedloom.wire import codec

    logs: dict[str, Any] = {}
    real = Engine.train

    def watched(self: Any, round_: int, errands: Any) -> Any:
        for errand in errands:
            message = Message(codec.decode(errand.message)) if errand.message else Message()
            logs[errand.client] = baselog.received(logs.get(errand.client, ()), message)
            state_log = self.stage.bench.attached._log
            assert len(logs[errand.client]) == len(state_log)
            for mine, theirs in zip(logs[errand.client], state_log, strict=True):
                assert (mine.round, mine.whole) == (theirs.round, theirs.whole)
                assert same(mine.tensors, theirs.tensors)
        return real(self, round_, errands)

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(Engine, "train", watched)
        run(
            tiny_folder,
            tmp_path / "a",
            algorithm="flora",
            rounds=9,
            sampler={"count": 2},
            adapter={"r": 4},
            evaluate=[],
        )
    assert len(logs) == 3


def test_flexlora_keeps_a_lone_clients_product(tiny_folder: Path, tmp_path: Path) -> None:
    """With one client the aggregation changes the factors, not their product."""
    one = {"data": {"clients": 1, "partition": "iid"}, "rounds": 1, **FP64}
    plain = run(tiny_folder, tmp_path / "a", **one)
    flex = run(tiny_folder, tmp_path / "b", algorithm="flexlora", **one)
    a, b = (factors.pairs(_live(r), lambda rank: 2.0) for r in (plain, flex))
    for module in a:
        torch.testing.assert_close(a[module].product(), b[module].product(), rtol=0, atol=1e-12)
    assert not same(adapter(plain), adapter(flex))


def test_what_would_be_lost_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="begins every round with a fresh adapter, so the given one would be lost"):
        run(tiny_folder, tmp_path / "a", algorithm="flora", init=str(tmp_path))
    clip = [{"name": "clip", "norm": 1.0}]
    with pytest.raises(RecipeError, match="transforms act on changes, but with algorithm=dec-lora"):
        run(tiny_folder, tmp_path / "b", algorithm="dec-lora", transforms=clip)


def _watch(algorithm: str) -> Any:
    """Note every client's (weight, trained adapter) as it left the trainer, round by round."""
    from contextlib import contextmanager

    from fedloom.client import fit
    from fedloom.runtime import effects

    @contextmanager
    def watching() -> Any:
        seen: dict[int, list[Any]] = {}
        real = fit.fit

        def noted(bench: Any, jobs: Any) -> Any:
            done = real(bench, jobs)
            for job, fitted in zip(jobs, done, strict=True):
                seen.setdefault(job.round, []).append((float(len(job.rows)), fitted.params))
            return done

        with pytest.MonkeyPatch().context() as patch:
            patch.setattr(effects.fit, "fit", noted)
            yield seen

    return watching()


def _scale(params: Any, module: str) -> float:
    return 4 / len(params[f"{module}.lora_A"])  # the recipe's alpha is 4


def _base(state: ServerState, module: str, like: Tensor) -> Tensor:
    found = baselog.delta(state.base, module)
    return torch.zeros_like(like) if found is None else found


def _whole(result: Any, state: ServerState, module: str) -> Tensor:
    """Return the base's change and the adapter's product of one module."""
    (params,) = result.recipe.algorithm.export(state).values()
    product = _scale(params, module) * params[f"{module}.lora_B"] @ params[f"{module}.lora_A"]
    return _base(state, module, product) + product


def _live(result: Any) -> dict[str, Tensor]:
    return load_peft(result.folder / "adapter")
