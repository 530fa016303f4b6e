"""Choosing a sandbox by trying it: a real program attacks canaries, and the sandbox must hold."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fedloom.evaluate.sandbox import Bubblewrap, Job, Outcome, Sandbox, Unconfined, bubblewrap, verdict_token
from fedloom.evaluate.watch import Limits

_LIMITS = Limits(processes=12)
_ATTACK = """
import json, os, socket, sys
canary, port, token = sys.stdin.read().split()
found = {"ran": True}
def attempt(name, action):
    try:
        found[name] = action()
    except BaseException as error:
        found[name] = None
def connect():
    socket.create_connection(("127.0.0.1", int(port)), 1).close()
    return True
def fork():
    children = []
    try:
        while len(children) < 14:  # above its limit, below what is killed
            child = os.fork()
            if child == 0:
                os.read(hold, 1)
                os._exit(0)
            children.append(child)
    except OSError:
        pass
    os.close(release)
    return len(children)
hold, release = os.pipe()
attempt("canary", lambda: open(canary).read())
attempt("connect", connect)
attempt("memory", lambda: len(bytearray(4 * 2**30)))
attempt("disk", lambda: [os.path.exists(p) for p in ("/", "/job", "/usr", "/dev") if os.access(p, os.W_OK)])
attempt("hidden", lambda: os.memfd_create("hidden") > 0)
attempt("environment", lambda: open("/proc/1/environ").read())
os.set_inheritable(release, False)
os.register_at_fork(after_in_child=lambda: os.close(release))
attempt("forks", fork)
print(token, json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python that programs may use: its path, and the folders outside /usr that it needs."""

    path: str
    trees: tuple[Path, ...]


@cache
def interpreter() -> Interpreter | str:
    """Return the Python for programs: this one where they can reach it, else the system's; or why there is none."""
    own = Path(sys.base_prefix)
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for path in (own / "bin" / name, Path("/usr/local/bin/python3"), Path("/usr/bin/python3")):
        if reachable(path):
            inside = path.resolve().is_relative_to("/usr")
            return Interpreter(str(path), () if inside else (own,))
    return "there is no Python that every user can read; install it with: apt-get install python3"


def reachable(path: Path) -> bool:
    """Return whether the user that programs run as can reach and execute a file."""
    if not path.exists():
        return False
    if os.geteuid():
        return os.access(path, os.X_OK)
    place = path.resolve()
    return all(one.stat().st_mode & stat.S_IXOTH for one in (place, *place.parents))


@cache
def sandbox() -> Bubblewrap | str:
    """Return a sandbox that has just held, or why there is none and what to install."""
    found, python = bubblewrap(), interpreter()
    if isinstance(found, str):
        return found
    if isinstance(python, str):
        return python
    return breach(found, python) or found


def chosen(unsafe: bool) -> Sandbox | str:
    """Return what runs programs: the sandbox, a plain process if that is what was asked for, or why neither does."""
    return Unconfined() if unsafe else sandbox()


def breach(tried: Sandbox, python: Interpreter) -> str:
    """Attack canaries from within a sandbox; return "" if it held, else what it let through."""
    token, secret = verdict_token(), verdict_token()
    with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.TemporaryDirectory() as place:
        listener.settimeout(0)
        Path(place).chmod(0o755)
        canary = Path(place) / "canary"
        canary.write_text(secret)
        canary.chmod(0o644)
        said = f"{canary} {listener.getsockname()[1]} {token}"
        outcome = tried.run(
            Job({"attack.py": _ATTACK}, (python.path, "-I", "{job}/attack.py"), said, _LIMITS, python.trees)
        )
        hit = _was_hit(listener)
    return _judge(outcome, token, secret, hit)


def _judge(outcome: Outcome, token: str, secret: str, hit: bool) -> str:
    line = next((line for line in outcome.output.splitlines() if line.startswith(token)), None)
    if line is None:
        what = outcome.output.strip()[-300:] or outcome.ended
        return f"the sandbox does not work on this machine ({what}); user namespaces may be switched off"
    found = json.loads(line.removeprefix(token))
    broken = {
        "read a file of the host": found["canary"] == secret,
        "connected to the host's network": bool(found["connect"]) or hit,
        f"started {found['forks']} processes": found["forks"] is None or found["forks"] > _LIMITS.processes,
        "took 4 GiB of memory": bool(found["memory"]),
        "took memory that no limit shows": bool(found["hidden"]),
        "could write outside its scratch disk": found["disk"] != [],
        "saw an environment": bool(found["environment"]),
    }
    through = [what for what, happened in broken.items() if happened]
    return f"the sandbox did not hold: a trial program {' and '.join(through)}" if through else ""


def _was_hit(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True
