"""Options of the verbs, statuses, and real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.helpers import run as run_recipe
from tests.helpers import tree
from typer.testing import CliRunner, Result

from fedloom.algorithms import Algorithm
from fedloom.cli.main import app, main
from fedloom.types import FedloomError

COMMAND = [sys.executable, "-c", "from fedloom.cli.main import main; main()"]


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words: object) -> str:
    """Return the message of a command that must fail with status 2."""
    error = call(*words).exception
    assert isinstance(error, FedloomError), error
    assert error.exit_status == 2
    return str(error)


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds."""
    tasks = {"name": "tasks", "items_per_category": 2, "categories": ["units"], "max_new_tokens": 2}
    return run_recipe(tiny_folder, tmp_path_factory.mktemp("runs") / "r", evaluate=["loss", tasks]).folder


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_eval_measures_the_adapter_that_is_named(folder: Path) -> None:
    before = listing(folder)
    told = json.loads((folder / "summary.json").read_text())["metrics"]
    found = json.loads(call("eval", folder, "--json").stdout)
    assert found.keys() == {"base", "federated"}
    assert found["federated"]["loss"] == pytest.approx(told["federated"]["loss"])
    named = json.loads(call("eval", folder, "--adapter", folder / "adapter", "--json").stdout)
    assert named == {"base": found["base"], "adapter": found["federated"]}
    first = json.loads(call("eval", folder, "--checkpoint", 1, "--json", "evaluate=[loss]").stdout)
    assert first["federated"].keys() == {"loss"}
    assert first["federated"] != found["federated"]
    assert listing(folder) == before


def test_eval_tells_the_number_of_items(folder: Path) -> None:
    shown = call("eval", folder).stdout
    assert "tasks exact match: 2 items, 95 % intervals (Wilson): base 0.0 to" in " ".join(shown.split())


def test_eval_refuses(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes((folder / "recipe.yaml").read_bytes())
    assert "holds no adapter" in refused("eval", tmp_path)
    assert "adapter_model.safetensors" in refused("eval", folder, "--adapter", tmp_path)
    assert "leave out one" in refused("eval", folder, "--adapter", tmp_path, "--checkpoint", "best")
    assert "is no run folder, so nothing says what to measure" in refused("eval", tmp_path / "nowhere")


def test_personal_adapters_are_measured_and_exported(tiny_folder: Path, tmp_path: Path) -> None:
    run = run_recipe(tiny_folder, tmp_path / "r", algorithm="local", evaluate=["loss"], rounds=1)
    told = run.summary["metrics"]["local"]["loss"]["loss"]
    assert json.loads(call("eval", run.folder, "--json").stdout)["local"]["loss"]["loss"] == pytest.approx(told)
    assert "--client" in refused("chat", run.folder, "--prompt", "x")
    out = tmp_path / "one"
    assert call("export", run.folder, "--client", "client-2", "--out", out).exit_code == 0
    kept = run.folder / "adapters" / "client-2" / "local" / "adapter_model.safetensors"
    assert (out / "adapter_model.safetensors").read_bytes() == kept.read_bytes()


def test_chat_with_an_adapter_folder_equals_chat_with_the_run(folder: Path, tiny_folder: Path) -> None:
    ask = ("--prompt", "Hello there", "--max-new-tokens", 8)
    answer = call("chat", folder, *ask).stdout
    assert call("chat", folder, "--adapter", folder / "adapter", *ask).stdout == answer
    assert call("chat", tiny_folder, "--adapter", folder / "adapter", *ask).stdout == answer
    assert call("chat", tiny_folder, *ask).stdout != answer
    assert "leave them out" in refused("chat", tiny_folder, "--checkpoint", "best", *ask)
    assert "adapter_model.safetensors" in refused("chat", tiny_folder, "--adapter", tiny_folder, *ask)


def test_chat_keeps_the_dialogue(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []

    def answer(model: object, tokenizer: object, prompt: str, *knobs: object) -> Iterator[str]:
        prompts.append(prompt)
        return iter(["It ", "is."])

    monkeypatch.setattr("fedloom.client.generate.sample", answer)
    words = ["chat", str(folder), "--system", "Be kind."]
    told = CliRunner().invoke(app, words, input="One?\n\nTwo?\n")
    assert told.stdout == "It is.\nIt is.\n"
    said = "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n"
        for role, text in (("system", "Be kind."), ("user", "One?"), ("assistant", "It is."), ("user", "Two?"))
    )
    assert prompts[1] == f"{said}<|im_start|>assistant\n"


def test_a_dialogue_ends_with_the_input(folder: Path) -> None:
    ended = CliRunner().invoke(app, ["chat", str(folder)], input="")
    assert (ended.exit_code, ended.stdout) == (0, "")


def test_the_merged_export_is_a_plain_model(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert call("export", folder, "--to", "merged", "--out", out).exit_code == 0
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: ")
    assert "| federated | loss | loss |" in card
    ask = ("--prompt", "Hello there", "--max-new-tokens", 8)
    assert call("chat", out, *ask).stdout == call("chat", folder, *ask).stdout


def test_upload_without_a_network(folder: Path, tmp_path: Path) -> None:
    told = refused("export", folder, "--to", "hub", "--repo", "me/x", "--out", tmp_path / "up")
    assert f"hf upload me/x {tmp_path / 'up'}" in told
    assert (tmp_path / "up" / "adapter_model.safetensors").is_file()


def test_resume_takes_no_option_that_it_would_ignore(folder: Path) -> None:
    for words in (["--out", "x"], ["--overwrite"], ["--set-file", "demo_tiny"]):
        assert words[0] in refused("run", "--resume", folder, *words)


def test_import_registers_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "from fedloom.algorithms.fedavg import FedAvg\nclass Mine(FedAvg, name='mine-of-a-test'):\n    'Mine.'\n"
    Path("mine_of_a_test.py").write_text(code)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        assert "mine-of-a-test" in call("list", "algorithm", "--import", "mine_of_a_test").stdout
    finally:
        Algorithm.known.pop("mine-of-a-test", None)
    assert "no_such" in refused("list", "--import", "no_such")


def test_data_without_categories_tells_counts(tiny_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Say {i}", "output": str(i)}) + "\n" for i in range(60)))
    path = tmp_path / "r.yaml"
    changes = {
        "source": str(rows),
        "clients": 25,
        "partition": {"name": "iid"},
        "splits": {"train": 1, "validation": 0, "test": 0},
    }
    path.write_text(yaml.safe_dump({**tree(tiny_folder), "data": changes}))
    told = call("data", path).stdout
    assert "20 of 25 clients; training rows: 2 to 3, median 2" in told
    assert "drift" not in told
    assert "colour" in refused("data", path, "--key", "colour")


def test_data_tells_the_shares_in_words_where_there_is_no_terminal(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree(tiny_folder)))
    assert "sorting 100 %" in call("data", path).stdout


def test_doctor_fails_where_nothing_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import fedloom.doctor

    found = [fedloom.doctor.Check("torch", "missing", "not installed"), fedloom.doctor.Check("gpu", "missing", "none")]
    monkeypatch.setattr(fedloom.doctor, "checks", lambda: found)
    ran = call("doctor")
    assert ran.exit_code == 2
    assert "nothing can run without torch" in ran.stderr
    monkeypatch.setattr(fedloom.doctor, "checks", lambda: found[1:])
    assert call("doctor").exit_code == 0


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['fedloom', 'run', '--help']\nfrom fedloom.cli.main import main\n"
    code += "try:\n    main()\nfinally:\n    print([name for name in ('torch', 'transformers') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_an_error_in_a_process_of_its_own(tmp_path: Path) -> None:
    ran = subprocess.run([*COMMAND, "run", "demoo"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: recipe 'demoo'")
    assert "Traceback" not in ran.stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fedloom", "run", "demoo", "--debug"])
    with pytest.raises(FedloomError, match="demoo"):
        main()


def test_ctrl_c_saves_the_state_and_tells_how_to_go_on(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree(tiny_folder, rounds=10_000, evaluate=[])))
    process = subprocess.Popen(
        [*COMMAND, "run", str(path), "--out", "r"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "r" / "checkpoints" / "2").exists() and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Go on with: fedloom run --resume r" in told
    assert "Traceback" not in told
    done = json.loads((tmp_path / "r" / "checkpoints" / "latest" / "state.json").read_text())["round"]
    (tmp_path / "r" / "recipe.yaml").write_text(
        (tmp_path / "r" / "recipe.yaml").read_text().replace("rounds: 10000", f"rounds: {done + 1}")
    )
    assert call("run", "--resume", tmp_path / "r").exit_code == 0
