"""The allocator: which is found, that a command is started again with it once and as it was, and the switch."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner

from fedloom import allocator, doctor
from fedloom.allocator import GUARD, NAMES, PRELOADS, SWITCH, Preload
from fedloom.cli.main import app, main
from fedloom.types import RecipeError

SCRIPT = Path(sysconfig.get_path("scripts")) / "fedloom"
LIBRARY = allocator.choose()
installed = pytest.mark.skipif(
    LIBRARY is None or not SCRIPT.is_file(),
    reason="needs the fedloom command and an allocator library on Linux: apt-get install libtcmalloc-minimal4",
)
glibc = pytest.mark.skipif(allocator.found() not in ("glibc", "glibc tuned"), reason="needs glibc's malloc in force")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts as a plain process on plain glibc would, and may not replace the process of the tests."""
    for name in (SWITCH, GUARD, "LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "_raised", set())
    monkeypatch.setattr(os, "execve", lambda *words: pytest.fail("the process of the tests was replaced"))


class Started(Exception):
    """What was to be started in place of this process."""


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As if this process were the command's own on Linux with tcmalloc there, and glibc in force."""

    def execve(path: str, words: list[str], environment: dict[str, str]) -> NoReturn:
        raise Started(path, words, environment)

    _started_as(monkeypatch, ["python3", "/env/bin/fedloom", "run", "demo"], file="/env/bin/fedloom")
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(allocator, "found", lambda: "glibc")
    monkeypatch.setattr(allocator, "tune", lambda: True)
    library = tmp_path / "libtcmalloc_minimal.so.4"
    there = {"tcmalloc": (PRELOADS[0], library), "auto": (PRELOADS[0], library)}
    monkeypatch.setattr(allocator, "choose", lambda name="auto": there.get(name))
    return library


def _started_as(monkeypatch: pytest.MonkeyPatch, words: list[str], file: str, module: str = "") -> None:
    of = ModuleType("__main__")
    of.__file__, of.__spec__ = file, SimpleNamespace(name=module) if module else None  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "__main__", of)
    monkeypatch.setattr(sys, "orig_argv", words)


def _ensured() -> tuple[list[str], dict[str, str]] | None:
    """Return what `ensure` starts, or None."""
    try:
        allocator.ensure()
    except Started as start:
        path, words, environment = start.args
        assert path == words[0] == sys.executable
        return words[1:], environment
    return None


# --- starting again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "file", "module"),
    [
        (["/env/bin/python3", "/env/bin/fedloom", "run", "x y", ""], "/env/bin/fedloom", ""),
        (["python", "-X", "utf8", "-m", "fedloom", "list"], "/src/fedloom/__main__.py", "fedloom.__main__"),
        (["python", "-I", "-m", "fedloom.cli.main", "list"], "/src/fedloom/cli/main.py", "fedloom.cli.main"),
    ],
)
def test_a_command_is_started_again_as_it_was(
    monkeypatch: pytest.MonkeyPatch, own: Path, words: list[str], file: str, module: str
) -> None:
    _started_as(monkeypatch, words, file, module)
    started = _ensured()
    assert started is not None
    assert started[0] == words[1:]
    assert started[1] == {**os.environ, "LD_PRELOAD": str(own), GUARD: "1"}


@pytest.mark.parametrize(
    ("file", "module"),
    [("/env/bin/pytest", ""), ("/pytest/__main__.py", "pytest.__main__"), ("", ""), ("/src/fedloomy.py", "fedloomy")],
)
def test_a_process_of_somebody_else_is_never_replaced(
    monkeypatch: pytest.MonkeyPatch, own: Path, file: str, module: str
) -> None:
    _started_as(monkeypatch, ["python", "x"], file, module)
    assert _ensured() is None


def test_it_is_started_again_once(monkeypatch: pytest.MonkeyPatch, own: Path) -> None:
    started = _ensured()
    assert started is not None
    monkeypatch.setenv(GUARD, started[1][GUARD])  # the library was not taken: glibc is still in force
    assert _ensured() is None
    assert GUARD not in os.environ, "the programs that the command starts are not to be judged by it"
    monkeypatch.setenv(GUARD, started[1][GUARD])
    monkeypatch.setenv(SWITCH, "tcmalloc")
    with pytest.raises(RecipeError, match=r"libtcmalloc_minimal\.so\.4 could not be preloaded"):
        allocator.ensure()


def test_what_is_preloaded_stays_and_goes_first(monkeypatch: pytest.MonkeyPatch, own: Path) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/opt/libother.so")
    started = _ensured()
    assert started is not None
    assert started[1]["LD_PRELOAD"] == f"/opt/libother.so:{own}"
    monkeypatch.setattr(allocator, "found", lambda: "mimalloc")
    assert _ensured() is None
    monkeypatch.setenv(SWITCH, "tcmalloc")
    with pytest.raises(RecipeError, match="FEDLOOM_ALLOCATOR=tcmalloc, but LD_PRELOAD brings mimalloc"):
        allocator.ensure()


def test_settings_of_a_user_stay() -> None:
    one = Preload("x", (), "", {"A": "1", "B": "2"})
    assert allocator.environment(one, Path("/x.so"), {"A": "mine"}) == {"A": "mine", "B": "2", "LD_PRELOAD": "/x.so"}


# --- the switch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "starts", "tunes"),
    [
        ("auto", True, False),
        ("", True, False),
        ("tcmalloc", True, False),
        ("off", False, False),
        ("glibc", False, True),
    ],
)
def test_the_switch(monkeypatch: pytest.MonkeyPatch, own: Path, value: str, starts: int, tunes: int) -> None:
    tuned = []
    monkeypatch.setattr(allocator, "tune", lambda: tuned.append(1))
    monkeypatch.setenv(SWITCH, value)
    assert (_ensured() is not None, len(tuned)) == (starts, tunes)


def test_without_a_library_glibc_is_tuned(monkeypatch: pytest.MonkeyPatch, own: Path) -> None:
    tuned = []
    monkeypatch.setattr(allocator, "choose", lambda name="auto": None)
    monkeypatch.setattr(allocator, "tune", lambda: tuned.append(1))
    assert _ensured() is None
    assert tuned


def test_a_missing_library_comes_with_its_command(monkeypatch: pytest.MonkeyPatch, own: Path) -> None:
    monkeypatch.setenv(SWITCH, "jemalloc")
    with pytest.raises(RecipeError, match=r"no library of it .*apt-get install libjemalloc2"):
        allocator.ensure()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RecipeError, match="on Linux only"):
        allocator.ensure()


def test_an_unknown_value_is_an_error_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SWITCH, "tcmaloc")
    monkeypatch.setattr(sys, "argv", ["fedloom", "list"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: FEDLOOM_ALLOCATOR=tcmaloc is not known; allowed: auto, off, glibc, tcmalloc")
    monkeypatch.setattr(sys, "argv", ["fedloom", "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0, "help is there whatever is wrong"


def test_a_call_within_python_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "ensure", lambda: pytest.fail("asked by the app, not by the command"))
    assert CliRunner().invoke(app, ["list", "algorithm"]).exit_code == 0


# --- finding ----------------------------------------------------------------------------------------------------


def _elf(path: Path, machine: bytes | None = None) -> Path:
    """Write the head of a library for this processor, or for another one."""
    head = Path("/proc/self/exe").read_bytes()[:20]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head[:18] + (machine or head[18:]))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="preloads are for Linux")
def test_a_library_is_found_where_a_wheel_or_a_module_puts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(allocator, "PRELOADS", (Preload("mimalloc", ("libmimalloc-of-tests.so",), "", {}),))
    assert allocator.choose() is None
    module = _elf(tmp_path / "module" / "libmimalloc-of-tests.so")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{module.parent}")
    assert allocator.choose() == (allocator.PRELOADS[0], module)
    wheel = _elf(tmp_path / "site" / "cmeel.prefix" / "lib" / "libmimalloc-of-tests.so")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    assert allocator.choose("mimalloc") == (allocator.PRELOADS[0], wheel)
    assert allocator.choose("tcmalloc") is None
    _elf(wheel, struct.pack("<H", 0xF3F3))
    assert allocator.choose() == (allocator.PRELOADS[0], module), "one for another processor is passed over"
    spaced = _elf(tmp_path / "a b" / "cmeel.prefix" / "lib" / "libmimalloc-of-tests.so")
    monkeypatch.setattr(sys, "path", [str(spaced.parents[2]), *sys.path])
    assert allocator.choose() == (allocator.PRELOADS[0], module), "LD_PRELOAD separates paths by blanks"


@glibc
def test_glibc_is_tuned_once_and_not_where_the_switch_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allocator.found() == "glibc"
    monkeypatch.setenv(SWITCH, "off")
    assert not allocator.tune()
    assert allocator.found() == "glibc"
    monkeypatch.delenv(SWITCH)
    assert allocator.tune()
    assert allocator.tune()
    assert allocator.found() == "glibc tuned"
    monkeypatch.setattr(allocator, "_raised", set())
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1000000")
    assert allocator.found() == "glibc tuned"


@glibc
@pytest.mark.parametrize(("call", "faults"), [("tune()", False), ("wanted()", True)])
def test_tuned_glibc_keeps_the_memory(call: str, faults: bool) -> None:
    """In a process of its own: 64 blocks of 40 MB, each cleared by the kernel anew or only the first time."""
    code = "import resource, ctypes\nfrom fedloom import allocator\n" + f"allocator.{call}\n"
    code += "def f():\n    b = ctypes.create_string_buffer(40 << 20); b[::4096] = b[::4096]; del b\n"
    code += "f(); f()\na = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
    code += "for _ in range(8): f()\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - a)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (int(ran.stdout) > 4000) == faults, ran.stdout


def test_the_environment_for_workers(monkeypatch: pytest.MonkeyPatch, own: Path) -> None:
    assert allocator.for_child() == {**os.environ, "LD_PRELOAD": str(own)}
    monkeypatch.setenv(SWITCH, "off")
    assert allocator.for_child() == dict(os.environ)


# --- the real thing ---------------------------------------------------------------------------------------------


def _run(words: list[object], **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, words)], env={**os.environ, **changes}, capture_output=True, text=True, check=False, timeout=120
    )


@installed
@pytest.mark.parametrize("form", [[SCRIPT], [sys.executable, "-m", "fedloom.cli.main"]], ids=["script", "module"])
def test_the_command_runs_on_the_library(form: list[object]) -> None:
    assert LIBRARY is not None
    ran = _run([*form, "doctor"], COLUMNS="300")
    assert ran.returncode == 0, ran.stderr
    row = next(line for line in ran.stdout.splitlines() if line.split()[:1] == ["allocator"])
    assert row.split()[1:3] == ["ok", LIBRARY[0].name]


@installed
def test_the_switch_keeps_the_library_out() -> None:
    told = _run([SCRIPT, "doctor"], COLUMNS="300", FEDLOOM_ALLOCATOR="off").stdout
    row = next(line for line in told.splitlines() if line.split()[:1] == ["allocator"])
    assert "FEDLOOM_ALLOCATOR=off" in row
    assert row.split()[1] == "note"


@installed
@pytest.mark.parametrize(("words", "status"), [(["show", "no-such"], 2), (["no-such-verb"], 2), (["-h"], 0)])
def test_the_exit_status_is_kept(words: list[str], status: int) -> None:
    ran = _run([SCRIPT, *words])
    assert ran.returncode == status, ran.stderr
    assert "Traceback" not in ran.stderr


@installed
def test_the_process_stays_the_same_and_reads_its_input(tmp_path: Path) -> None:
    """The library is in the maps of the very process that was started, which waits for its standard input."""
    assert LIBRARY is not None
    script = tmp_path / "fedloom"
    script.write_text("import sys\nfrom fedloom import allocator\nallocator.ensure()\nprint(sys.stdin.readline())\n")
    process = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        maps, until = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
        while LIBRARY[1].resolve().name not in maps.read_text() and time.monotonic() < until:
            time.sleep(0.02)
        assert LIBRARY[1].resolve().name in maps.read_text()
        out, _ = process.communicate("hello\n", timeout=60)
        assert (out.strip(), process.returncode) == ("hello", 0)
    finally:
        process.kill()


@installed
def test_signals_reach_the_command(tmp_path: Path) -> None:
    script = tmp_path / "fedloom"
    script.write_text(
        "from fedloom import allocator\nallocator.ensure()\nprint(flush=True)\nimport time\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()


# --- the doctor's row -------------------------------------------------------------------------------------------


def _row(monkeypatch: pytest.MonkeyPatch, found: str, choice: Any) -> doctor.Check:
    monkeypatch.setattr(allocator, "found", lambda: found)
    monkeypatch.setattr(allocator, "choose", lambda name="auto": choice)
    monkeypatch.setattr(sys, "platform", "linux")
    return doctor._check("allocator", doctor._allocator)


def test_the_doctor_tells_what_is_in_force_and_what_would_be_better(monkeypatch: pytest.MonkeyPatch) -> None:
    there = (PRELOADS[1], Path("/lib/libjemalloc.so.2"))
    assert _row(monkeypatch, NAMES[0], there).state == "ok"
    missing = _row(monkeypatch, "glibc tuned", None)
    assert missing.state == "missing"
    assert missing.detail.startswith("glibc tuned (FEDLOOM_ALLOCATOR=auto)")
    assert missing.fix == "apt-get install libtcmalloc-minimal4, or pip install --no-deps cmeel-mimalloc"
    here = _row(monkeypatch, "glibc", there)
    assert (here.state, here.fix.rpartition(" ")[2]) == ("warn", "LD_PRELOAD=/lib/libjemalloc.so.2")
    assert "export MALLOC_CONF=" in here.fix
    monkeypatch.setenv(SWITCH, "off")
    assert _row(monkeypatch, "glibc", there).fix == "unset FEDLOOM_ALLOCATOR"
    assert "docs/performance.md" in _row(monkeypatch, "glibc", there).detail
