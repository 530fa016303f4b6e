"""The sandbox under attack: canaries only, and everything in limits that a failure could not hurt either."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

import psutil
import pytest

from fedloom.evaluate import probe
from fedloom.evaluate.sandbox import Bubblewrap, Job, Outcome, Unconfined, bubblewrap
from fedloom.evaluate.watch import MIB, Limits

FOUND = probe.sandbox()
PYTHON = probe.interpreter()
needed = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))
SHORT = Limits(seconds=10, cpu_seconds=1)


def run(code: str, limits: Limits = SHORT, stdin: str = "", sandbox: Bubblewrap | None = None) -> Outcome:
    assert isinstance(FOUND, Bubblewrap)
    assert isinstance(PYTHON, probe.Interpreter)
    command = (PYTHON.path, "-I", "{job}/program.py")
    return (sandbox or FOUND).run(Job({"program.py": code}, command, stdin, limits, PYTHON.trees))


@needed
def test_a_harmless_program_runs() -> None:
    outcome = run("import sys; print(int(sys.stdin.read()) * 2); sys.exit(3)", stdin="21")
    assert (outcome.ended, outcome.status, outcome.output) == ("done", 3, "42\n")


@needed
def test_a_fork_bomb_is_held_and_leaves_nothing() -> None:
    before = {one.pid for one in psutil.process_iter()}
    outcome = run("import os\nwhile True:\n try:\n  os.fork()\n except OSError: pass", Limits(seconds=2, cpu_seconds=5))
    assert outcome.ended in ("time", "processes")
    until = time.monotonic() + 5
    name = "/job/program.py"
    while time.monotonic() < until:
        left = [
            p for p in psutil.process_iter(["cmdline"]) if p.pid not in before and name in (p.info["cmdline"] or [])
        ]
        if not left:
            break
        time.sleep(0.05)
    assert not left
    forked = run("import os\nn = 0\ntry:\n while n < 99:\n  if os.fork() == 0: os.read(0, 1); os._exit(0)\n  n += 1\n"
                 "except OSError: print(n)")  # fmt: skip
    assert int(forked.output) <= SHORT.processes


@needed
def test_ten_gigabytes_are_refused() -> None:
    assert "MemoryError" in run("x = bytearray(10 * 2**30)").output


@needed
def test_memory_beyond_a_processs_own_limit_is_watched() -> None:
    """Without a limit of the address space, as for languages that reserve more than they use; in several processes."""
    code = "import os, time\nfor _ in range(3):\n if os.fork() == 0: break\nx = b'1' * (90 * 2**20)\ntime.sleep(30)"
    limits = Limits(seconds=30, cpu_seconds=10, address_space=None, resident_bytes=200 * MIB)
    began = time.monotonic()
    assert run(code, limits).ended == "memory"
    assert time.monotonic() - began < 20


@needed
def test_memory_that_no_process_maps_is_refused() -> None:
    code = """
import ctypes, os
library = ctypes.CDLL(None, use_errno=True)
print(library.shmget(0, 2**28, 0o1600), ctypes.get_errno())
try:
    os.memfd_create("hidden")
except OSError as error:
    print(error.errno)
"""
    assert run(code).output.split() == ["-1", "1", "1"]


@needed
def test_an_endless_loop_ends() -> None:
    assert run("while True: pass").ended == "time"
    assert run("import time; time.sleep(99)", Limits(seconds=0.5)).ended == "time"
    assert run("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
               Limits(seconds=2.5, cpu_seconds=1)).ended == "time"  # fmt: skip


@needed
def test_no_disk_can_be_filled() -> None:
    code = """
import os
for place in ("/", "/job", "/dev", "/dev/shm", "/usr", "/etc", "/tmp", os.path.expanduser("~")):
    written = 0
    try:
        for i in range(20):
            with open(f"{place}/fill{i}", "wb") as file:
                written += file.write(bytes(16 * 2**20))
    except OSError as error:
        pass
    print(place, written)
try:
    open("/tmp/fill0", "r+b").truncate(2**30)
except OSError as error:
    print("large", error.errno)
"""
    written = dict(line.split() for line in run(code, Limits(cpu_seconds=5)).output.splitlines())
    assert int(written.pop("large")) in (27, 28)
    assert 0 < int(written["/tmp"]) <= 256 * MIB
    assert {place for place, count in written.items() if int(count)} == {"/tmp"}


@needed
def test_the_network_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        port = listener.getsockname()[1]
        told = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")
        assert told.status == 1
        with pytest.raises(BlockingIOError):
            listener.accept()


@needed
def test_host_files_can_be_neither_read_nor_deleted(tmp_path: Path) -> None:
    place = Path("/var/tmp") if os.access("/var/tmp", os.W_OK) else tmp_path
    canary = place / f"fedloom-canary-{os.getpid()}"
    canary.write_text("secret")
    canary.chmod(0o666)
    try:
        code = f"import os, shutil\nfor act in (lambda: print(open({str(canary)!r}).read()), "
        code += f"lambda: os.remove({str(canary)!r}), lambda: shutil.rmtree('/', ignore_errors=True)):\n"
        code += " try: act()\n except OSError as error: print(error.errno)\nprint(os.path.exists('/usr/bin'))"
        assert run(code, Limits(cpu_seconds=5, seconds=60)).output.splitlines() == ["2", "2", "True"]
        assert canary.read_text() == "secret"
    finally:
        canary.unlink(missing_ok=True)


@needed
def test_no_environment_and_no_host_process_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_CANARY", "secret-canary")
    code = """
import glob, os
print(sorted(os.environ))
for path in glob.glob("/proc/[0-9]*/environ"):
    print(open(path).read())
print(sum(p.isdigit() for p in os.listdir("/proc")))
"""
    output = run(code).output
    assert "canary" not in output
    assert int(output.splitlines()[-1]) <= 3
    assert "'PATH'" in output


@needed
def test_no_power_is_left_to_gain() -> None:
    code = """
import ctypes, os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(os.getuid() != 0, status["CapEff"].strip(), status["NoNewPrivs"].strip())
print(ctypes.CDLL(None).unshare(0x10000000))
"""
    assert run(code).output.split() == ["True", "0" * 16, "1", "-1"]


@needed
def test_a_flood_of_output_is_cut() -> None:
    outcome = run("while True: print('x' * 10000)", Limits(cpu_seconds=5))
    assert outcome.ended == "output"
    assert len(outcome.output) < 5 * MIB


@needed
def test_who_is_left_behind_is_ended_at_once() -> None:
    began = time.monotonic()
    outcome = run("import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(60)\nprint('parent')")
    assert (outcome.ended, outcome.output) == ("done", "parent\n")
    assert time.monotonic() - began < 9


@needed
def test_what_is_no_sandbox_is_no_verdict() -> None:
    outcome = run("print(1)", sandbox=Bubblewrap("/usr/bin/false", "false"))
    assert (outcome.ended, outcome.status) == ("error", -1)
    assert run("print(1)", sandbox=Bubblewrap("/no/such/bwrap", "none")).ended == "error"
    assert isinstance(PYTHON, probe.Interpreter)
    assert "does not work on this machine" in probe.breach(Bubblewrap("/usr/bin/false", "false"), PYTHON)


@needed
def test_a_tree_that_cannot_be_mounted_is_an_error() -> None:
    assert isinstance(FOUND, Bubblewrap)
    outcome = FOUND.run(Job({}, ("/bin/true",), trees=(Path("/no/such/toolchain"),)))
    assert outcome.ended == "error"
    assert "/no/such/toolchain" in outcome.output


@pytest.mark.skipif(isinstance(PYTHON, str), reason=str(PYTHON))
def test_the_probe_finds_what_a_plain_process_lets_through() -> None:
    assert isinstance(PYTHON, probe.Interpreter)
    told = probe.breach(Unconfined(), PYTHON)
    assert told.startswith("the sandbox did not hold: a trial program read a file of the host")
    assert "connected to the host's network" in told


@needed
@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("--unshare-net", "connected to the host's network"),
        ("--nproc", "processes"),
        ("seccomp", "memory that no limit shows"),
        ("--as", "memory"),
    ],
)
def test_the_probe_finds_a_missing_wall(lost: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloom.evaluate import sandbox

    filters = sandbox._filter()
    monkeypatch.setattr(sandbox, "_filter", lambda: {name: one for name, one in filters.items() if name != lost})
    for name in ("_namespaces", "limited"):
        whole = getattr(sandbox, name)
        less = lambda *a, _whole=whole, **k: [word for word in _whole(*a, **k) if not word.startswith(lost)]
        monkeypatch.setattr(sandbox, name, less)
    assert isinstance(FOUND, Bubblewrap)
    assert isinstance(PYTHON, probe.Interpreter)
    assert told in probe.breach(FOUND, PYTHON)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    bubblewrap.cache_clear()
    try:
        assert "apt-get install bubblewrap" in str(bubblewrap())
    finally:
        bubblewrap.cache_clear()


def test_nothing_runs_plainly_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "sandbox", lambda: "no sandbox")
    assert probe.chosen(False) == "no sandbox"
    assert isinstance(probe.chosen(True), Unconfined)


@pytest.mark.skipif(isinstance(PYTHON, str), reason=str(PYTHON))
def test_a_plain_process_keeps_its_limits_and_takes_its_children_along() -> None:
    assert isinstance(PYTHON, probe.Interpreter)
    for code, ended in (
        ("import time\nopen('mine', 'w').write('x')\nprint(open('mine').read())", "done"),
        ("while True: pass", "time"),
        ("import os, time\nif os.fork() == 0: time.sleep(77.7)\ntime.sleep(77.7)", "time"),
    ):
        limits = Limits(seconds=1.5, cpu_seconds=1)
        outcome = Unconfined().run(Job({"p.py": code}, (PYTHON.path, "{job}/p.py"), "", limits, PYTHON.trees))
        assert outcome.ended == ended
        assert ended != "done" or outcome.output == "x\n"
