"""The doctor: complete, quick, and never an exception, whatever the machine lacks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from fedloom import doctor
from fedloom.doctor import Check
from fedloom.home import BUNDLED, Bundled, data_home, home


def found(name: str, timeout: float = 3.0) -> Check:
    return next(check for check in doctor.checks(timeout) if check.name == name)


def test_everything_is_looked_at_once_and_quickly() -> None:
    start = time.monotonic()
    names = [check.name for check in doctor.checks()]
    assert time.monotonic() - start < 5
    wanted = {"python", "torch", "cores", "cpu bf16", "gpu", "memory", "hub", "smollm2-135m", "cache", "disk", "data"}
    wanted |= {"fedloom", "transformers", "peft", "allocator", "bitsandbytes", "sandbox"}
    assert wanted | {"tensorboard", "wandb", "mlflow", "trackio"} == set(names)
    assert len(names) == len(set(names))


def test_a_probe_that_breaks_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[str]:
        raise RuntimeError("driver is too old")

    monkeypatch.setattr(doctor, "devices", broken)
    assert found("gpu") == Check("gpu", "warn", "could not be looked at: RuntimeError: driver is too old")
    assert found("python").state == "ok"


def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bundled, "file", lambda self: None)
    monkeypatch.setattr(doctor, "_TRACKERS", ("no-such-package",))
    assert found("smollm2-135m").fix == BUNDLED["smollm2-135m"].command
    assert found("no-such-package") == Check(
        "no-such-package", "missing", "not installed", "pip install no-such-package"
    )


def test_gpus_are_said_to_be_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "devices", lambda: ["mps", "cpu"])
    assert found("gpu").state == "warn"
    assert "tested on CPUs only" in found("gpu").detail
    monkeypatch.setattr(doctor, "devices", lambda: ["cpu"])
    assert found("gpu").state == "missing"


def test_an_offline_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ask_hub", lambda timeout: pytest.fail("asked"))
    assert found("hub").fix == "unset HF_HUB_OFFLINE"


@pytest.mark.parametrize(("answer", "state"), [("", "ok"), ("name not known", "missing")])
def test_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch, answer: str, state: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "_ask_hub", lambda timeout: answer)
    assert found("hub").state == state
    assert answer in found("hub").detail


def test_a_hub_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "_ask_hub", lambda timeout: time.sleep(3) or "")
    start = time.monotonic()
    assert "no answer within 0.1 s" in found("hub", 0.1).detail
    assert time.monotonic() - start < 2


def test_an_unreachable_endpoint_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port, where nothing listens
    assert "refused" in doctor._ask_hub(1.0)


def test_folders_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_HOME", str(tmp_path / "a" / "b"))
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    assert (home(), data_home()) == (tmp_path / "a" / "b", tmp_path)
    assert str(home()) in found("cache").detail
    assert not home().exists()
    assert found("data") == Check("data", "ok", str(tmp_path))
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path / "gone"))
    assert found("data").state == "warn"
    monkeypatch.delenv("FEDLOOM_DATA")
    monkeypatch.delenv("FEDLOOM_HOME")
    assert found("data").state == "missing"
    assert (home(), data_home()) == (Path.home() / ".cache" / "fedloom", None)
