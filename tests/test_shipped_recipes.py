"""Every shipped recipe runs for one round on the tiny model; the bundled model once for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import MODEL

import fedloom
from fedloom import recipe as recipes

SMALL = ("rounds=1", "trainer.steps=1", "trainer.batch=1", "runtime.threads=1", "data.max_tokens=2000")


def _tiny(folder: Path) -> dict[str, object]:
    return {"model": {"name": str(folder), **MODEL}, "adapter": {"r": 2}}


def test_demo(tiny_folder: Path, tmp_path: Path) -> None:
    evaluate = ["evaluate.1.items_per_category=1", "evaluate.1.max_new_tokens=2", "data.source.rows_per_category=6"]
    result = fedloom.run("demo", *SMALL, *evaluate, out=tmp_path / "r", **_tiny(tiny_folder))
    assert set(result.metrics) == {"base", "federated", "local", "centralized"}
    assert {"exact_match", "contained", "exact_match_worst10"} <= set(result.metrics["local"]["tasks"])
    samples = [json.loads(x) for x in (result.folder / "samples" / "tasks.jsonl").read_text().splitlines()]
    assert {s["regime"] for s in samples} == {"base", "federated"}
    assert set(samples[0]) == {
        "regime", "round", "client", "id", "prompt_sha256", "prompt", "output", "extracted", "reference", "score",
            "stratum",
    }  # fmt: skip
    assert len(list((result.folder / "regimes" / "local" / "adapters").iterdir())) == 4


@pytest.mark.data
@pytest.mark.parametrize("name", ["fed-gsm8k-3", "fed-dolly-meta", "fed-dolly-lda", "fed-codealpaca-meta"])
def test_published_recipes_in_their_tiny_form(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    changes = [text for text in SMALL if "max_tokens" not in text]
    if name == "fed-gsm8k-3":
        changes += ["evaluate.1.limit=2", "evaluate.1.max_new_tokens=2"]
    files = [f"{name}_tiny"]
    settings = {"data": {"max_tokens": 900}, **_tiny(tiny_folder), "evaluate": []}
    if name == "fed-gsm8k-3":
        del settings["evaluate"]
    settings["adapter"] = {"r": 2, "targets": "all-linear"}
    result = fedloom.run(name, *changes, out=tmp_path / "r", set_files=files, **settings)
    assert result.summary["clients"] == result.recipe.data.clients
    assert result.summary["participations"] == result.recipe.data.clients
    if name == "fed-codealpaca-meta":
        assert "MBXP" in result.summary["source"] or "mbxp" in result.summary["source"]
    if name == "fed-gsm8k-3":
        assert 0.0 <= result.metrics["federated"]["gsm8k"]["numeric"] <= 1.0


PUBLISHED = {
    "fed-alpaca": "stand-in",
    "flowertune-general": "stand-in",
    "flowertune-medical": "pubmedqa",
    "flowertune-code": "mbxp",
}
"""Published recipe -> what its tiny form's source says of itself."""
ROWS: dict[str, list[dict[str, Any]]] = {
    "fed-codesearchnet": [
        {"docstring": f"Add {i}.", "code": f"x + {i}", "language": language}
        for i in range(4000)
        for language in ("go", "java", "javascript", "php", "python", "ruby")
    ],
    "flowertune-finance": [
        {"instruction": "What is the mood?", "input": f"Up {i}", "output": "good"} for i in range(400)
    ],
}
"""Published recipe whose rows cannot be had offline -> rows in their form."""


def _once(name: str, folder: Path, out: Path, *changes: str) -> fedloom.Result:
    """Run a recipe's tiny form for one round of one step on the tiny model."""
    texts = [*(text for text in SMALL if "max_tokens" not in text), *changes]
    settings = {**_tiny(folder), "data": {"max_tokens": 4000}, "adapter": {"r": 2, "targets": "all-linear"}}
    return fedloom.run(name, *texts, out=out, set_files=[f"{name}_tiny"], **settings)


@pytest.mark.data
@pytest.mark.parametrize("name", PUBLISHED)
def test_further_published_recipes_in_their_tiny_form(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    result = _once(name, tiny_folder, tmp_path / "r", "evaluate=[]")
    assert PUBLISHED[name] in result.summary["source"]
    sampler = recipes.load(name).sampler
    clients = [f"client-{i}" for i in range(result.recipe.data.clients)]
    assert result.summary["participations"] == len(sampler.cohort(0, clients, 0))
    assert "stands in" in recipes.shipped()[f"{name}_tiny"].splitlines()[0]


@pytest.mark.parametrize("name", ROWS)
def test_recipes_without_rows_offline_run_on_rows_of_their_form(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    assert recipes.shipped()[f"{name}_tiny"].startswith("# Not run: no rows of ")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    source = f"data.source.path={file}" if name == "fed-codesearchnet" else f"data.source={file}"
    result = _once(name, tiny_folder, tmp_path / "r", source)
    assert result.summary["clients"] == recipes.load(name).data.clients
    assert result.metrics["federated"]["loss"]["loss"] > 0


@pytest.mark.data
@pytest.mark.parametrize("name", ["flowertune-code", "flowertune-medical", "fed-codealpaca-meta"])
def test_no_test_row_is_trained_on(data_home: Path, name: str) -> None:
    rows = recipes.load(name, set_files=[f"{name}_tiny"]).data.source.rows(0)
    if name == "flowertune-medical":
        tests = json.loads((data_home / "pubmedqa" / "test_ground_truth.json").read_text())
        assert len(rows) == 500
        assert not {row.id for row in rows} & tests.keys()
    else:
        assert min(int(row.fields["task"]) for row in rows) > 510


@pytest.mark.parametrize("name", sorted(recipes.shipped()))
def test_every_shipped_recipe_and_override_is_valid(name: str) -> None:
    base = name.removesuffix("_tiny")
    recipes.load(base, set_files=[] if name == base else [name])


@pytest.mark.parametrize(
    ("name", "lr", "lora", "clients", "cohort", "tokens"),
    [
        ("fed-alpaca", 3e-4, (16, 0.05), 3, 3, 1000),
        ("fed-codesearchnet", 1e-3, (16, 0.05), 6, 6, 650),
        ("flowertune-general", 5e-5, (64, 0.075), 20, 2, 512),
        ("flowertune-finance", 5e-5, (64, 0.075), 50, 5, 512),
        ("flowertune-medical", 5e-5, (64, 0.075), 20, 2, 512),
        ("flowertune-code", 5e-5, (64, 0.075), 10, 2, 512),
    ],
)
def test_published_values(
    name: str, lr: float, lora: tuple[float, float], clients: int, cohort: int, tokens: int
) -> None:
    recipe = recipes.load(name)
    assert (recipe.trainer.lr, recipe.data.clients, recipe.data.max_tokens) == (lr, clients, tokens)
    assert (recipe.adapter.alpha, recipe.adapter.dropout) == lora  # type: ignore[attr-defined]
    assert recipe.adapter.targets == ("q_proj", "v_proj")  # type: ignore[attr-defined]
    assert len(recipe.sampler.cohort(0, [str(i) for i in range(clients)], 0)) == cohort
    if name.startswith("flowertune"):
        assert recipe.trainer.lr * recipe.trainer.schedule.factor(10**9, 10**9) == pytest.approx(1e-6)


@pytest.mark.bundled
def test_the_bundled_model_learns_and_peft_loads_it(tmp_path: Path) -> None:
    import peft
    import torch

    from fedloom.client.models import load_model
    from fedloom.client.trainer import Rows
    from fedloom.data.federation import build

    texts = ["rounds=1", "compare=[]", "evaluate=[loss]", "data.source.rows_per_category=8", "runtime.threads=1"]
    texts += ["model.dtype=fp32"]  # sixteen labels: in bf16 their mean differs by 0.03 between attention kernels alone
    result = fedloom.run("demo", *texts, out=tmp_path / "r")
    loss = result.metrics["federated"]["loss"]["loss"]
    assert loss < result.metrics["base"]["loss"]["loss"] - 0.1
    loaded = load_model(result.recipe.model)
    model = peft.PeftModel.from_pretrained(loaded.model, result.adapter)
    split = build(result.recipe.data, loaded.tokenizer, result.recipe.seed, None)
    nll, count = 0.0, 0
    for client in split.clients.values():
        rows = Rows(split.encoded, client.test)
        for i in range(len(rows)):
            labels = torch.where(rows[i].train, rows[i].ids, -100)[None]
            n = int(rows[i].train[1:].sum())
            with torch.no_grad():
                nll += float(model(input_ids=rows[i].ids[None], labels=labels).loss) * n
            count += n
    assert nll / count == pytest.approx(loss, abs=1e-5)
