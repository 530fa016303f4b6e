"""Watching a process: its output, the wall clock, and the resident size of all that it starts."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias

import psutil

Ended: TypeAlias = Literal["done", "time", "memory", "processes", "output", "error"]

MIB = 2**20
_PERIOD = 0.05  # seconds between looks at the tree: at most some 100 MB are touched meanwhile


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: by the wall clock, amply, since other programs may be busy.  cpu_seconds: of one process.
        processes: at a time, threads counted.
        address_space: of one process, in bytes; None where the language reserves more than it uses.
        resident_bytes: of the whole process tree.  file_bytes: of one file.  disk_bytes: of the scratch disk.
        output_bytes: of stdout and stderr.
    """

    seconds: float = 20.0
    cpu_seconds: int = 5
    processes: int = 16
    address_space: int | None = 512 * MIB
    resident_bytes: int = 1024 * MIB
    file_bytes: int = 64 * MIB
    disk_bytes: int = 256 * MIB
    output_bytes: int = 4 * MIB


USUAL = Limits()


def watch(process: subprocess.Popen[bytes], stdin: str, limits: Limits) -> tuple[Ended, str]:
    """Give a process its input, and wait for its end or bring it about.

    Args:
        process: just started, in a session of its own, with pipes for stdin and stdout.

    Returns:
        How it ended (never `error`), and its output, decoded.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    # short enough for the pipe to take it at once; a program may end without reading it
    with suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(stdin.encode())
    out = process.stdout.fileno()
    os.set_blocking(out, False)
    exited = os.pidfd_open(process.pid)
    output = bytearray()
    try:
        ended = _follow(process, out, exited, output, limits)
        _kill(process)
        process.wait()
        _read(out, output, limits.output_bytes)
    finally:
        os.close(exited)
        process.stdout.close()
    return ended, output.decode(errors="replace")


def _follow(process: subprocess.Popen[bytes], out: int, exited: int, output: bytearray, limits: Limits) -> Ended:
    deadline = time.monotonic() + limits.seconds
    look = time.monotonic() + _PERIOD
    with selectors.DefaultSelector() as selector:
        selector.register(exited, selectors.EVENT_READ)
        selector.register(out, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select(max(0.0, min(look, deadline) - time.monotonic()))}
            if out in ready and not _read(out, output, limits.output_bytes):
                selector.unregister(out)
            if len(output) > limits.output_bytes:
                return "output"
            if exited in ready:
                return "done"
            if time.monotonic() >= deadline:
                return "time"
            if time.monotonic() >= look:
                if over := _over(process.pid, limits):
                    return over
                look = time.monotonic() + _PERIOD


def _read(out: int, output: bytearray, most: int) -> bool:
    """Read what is there, up to a little more than `most` bytes; return whether more may come."""
    while len(output) <= most:
        try:
            chunk = os.read(out, 2**16)
        except BlockingIOError:
            return True
        if not chunk:
            return False
        output += chunk
    return True


def _over(pid: int, limits: Limits) -> Ended | None:
    tree = _tree(pid)
    resident = 0
    for one in tree:
        try:
            resident += one.memory_info().rss
        except psutil.Error:
            continue  # it has just ended
    if resident > limits.resident_bytes:
        return "memory"
    # those of the sandbox itself are in the tree as well
    return "processes" if len(tree) > limits.processes + 4 else None


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process, its session and its descendants.

    The first process of a sandbox takes all others with it; a plain one may have left some behind in its session.
    """
    left = _tree(process.pid) if process.poll() is None else []
    with suppress(ProcessLookupError, PermissionError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    for one in left:
        try:
            one.kill()
        except psutil.Error:
            continue
