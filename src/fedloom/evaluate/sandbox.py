"""Where model-written programs run: bubblewrap, and nothing in its place unless a person asks for that.

Order of what confines a program: an unprivileged user (if this process is root), all namespaces unshared, a read-only
system tree, a small scratch disk, an empty environment, and limits on processes, processor time, files and address
space. What a limit cannot hold, such as the memory of a Java machine, is watched: once the process tree's resident size
passes its limit, all of it is killed.

System calls for memory that neither shows are filtered out. Not contained: the kernel's own memory (for many empty
files, say), for want of a control group.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from fedloom.evaluate import seccomp
from fedloom.evaluate.watch import USUAL, Ended, Limits, watch

NOBODY = 65533
"""User and group that programs run as where this process is root: nothing on a system belongs to it."""
JOB, WORK = "/job", "/tmp"
"""Where a confined program finds its files, which are read-only, and its scratch disk."""
SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
CONFIGURATION = ("alternatives", "ld.so.cache", "java*", "ssl/certs/java")


@dataclass(frozen=True, slots=True)
class Job:
    """A program to run.

    Attributes:
        files: name -> content.  command: with `{job}` for the folder of the files; it runs in a scratch folder.
        stdin: what it may read.
        trees: folders outside /usr that it needs, such as a toolchain's.
        environment: all that it sees of one, beside PATH and HOME.
    """

    files: Mapping[str, str]
    command: Sequence[str]
    stdin: str = ""
    limits: Limits = USUAL
    trees: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended.

    Attributes:
        ended: `done` by itself, killed for its `time`, `memory`, `processes` or `output`, or `error`: it was not run.
        status: exit status, 128 and more after a signal.  output: stdout and stderr as they came.
    """

    ended: Ended
    status: int
    output: str


class Sandbox(Protocol):
    """A way to run programs."""

    @property
    def name(self) -> str:
        """What results are marked with."""
        ...

    def run(self, job: Job) -> Outcome:
        """Run one program to its end; never raises because of what the program does."""
        ...


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """Programs see a read-only /usr, their own files, and 256 MiB of scratch disk; no network, no host process."""

    path: str
    version: str

    @property
    def name(self) -> str:
        """What results are marked with."""
        return self.version

    def run(self, job: Job) -> Outcome:
        """Run one program; `error` if bubblewrap could not set up the sandbox."""
        with _memory_files(job.files) as files, _memory_files(_filter()) as filters, _pipe() as (told, tell):
            words = [self.path, "--json-status-fd", str(tell), *_namespaces(), *_tree(job), *_given(files)]
            words += [word for fd in filters.values() for word in ("--seccomp", str(fd))]
            words += ["--remount-ro", "/", "--chdir", WORK, "--", *limited(job.limits, confined=True)]
            words += [word.replace("{job}", JOB) for word in job.command]
            fds = (*files.values(), *filters.values(), tell)
            try:
                process = _start(words, "/", {}, fds)  # its own environment can be read from within: an empty one
            except OSError as error:
                return Outcome("error", -1, f"{self.path}: {error.strerror}")
            os.close(tell)
            ended, output = watch(process, job.stdin, job.limits)
            with open(told, encoding="utf-8", closefd=False) as report:
                lines = [json.loads(line) for line in report]
        status = next((line["exit-code"] for line in lines if "exit-code" in line), None)
        if ended == "done" and status is None:
            return Outcome("error", -1, output.strip()[-500:] or f"bubblewrap ended with status {process.returncode}")
        return _judged(ended, -1 if status is None else status, output)


@dataclass(frozen=True, slots=True)
class Unconfined:
    """A plain process with limits: programs can read, write and send whatever their user can."""

    name: str = "none: programs ran unconfined (unsafe_execution)"

    def run(self, job: Job) -> Outcome:
        """Run one program in a folder of its own, as an unprivileged user if this process is root."""
        with tempfile.TemporaryDirectory(prefix="fedloom-program-", ignore_cleanup_errors=True) as place:
            work = Path(place) / "work"
            work.mkdir()
            for name, text in job.files.items():
                (Path(place) / name).write_text(text, encoding="utf-8")
                (Path(place) / name).chmod(0o644)
            Path(place).chmod(0o755)
            if os.geteuid() == 0:
                os.chown(work, NOBODY, NOBODY)
            words = [*limited(job.limits, confined=False), *(word.replace("{job}", place) for word in job.command)]
            try:
                process = _start(words, str(work), environment(job, str(work)), ())
            except OSError as error:
                return Outcome("error", -1, f"{words[0]}: {error.strerror}")
            ended, output = watch(process, job.stdin, job.limits)
        status = process.returncode
        return _judged(ended, status if status >= 0 else 128 - status, output)


def verdict_token() -> str:
    """Return what a harness prints once all checks have held; it is nowhere in a program's files."""
    return secrets.token_hex(16)


def environment(job: Job, home: str) -> dict[str, str]:
    """Return the environment that a program sees."""
    path = ":".join([*(str(tree / "bin") for tree in job.trees), "/usr/local/bin", "/usr/bin", "/bin"])
    return {"PATH": path, "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", **job.environment}


@cache
def bubblewrap() -> Bubblewrap | str:
    """Return the installed bubblewrap, not yet probed, or why there is none."""
    path = shutil.which("bwrap", path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/local/bin")
    if path is None:
        return (
            "bubblewrap is not installed; install it with: apt-get install bubblewrap (Fedora: dnf install bubblewrap)"
        )
    if shutil.which("prlimit", path="/usr/bin:/bin") is None:
        return "prlimit is not installed; install it with: apt-get install util-linux"
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return Bubblewrap(path, told.stdout.strip() or "bubblewrap of an unknown version")


def limited(limits: Limits, *, confined: bool) -> list[str]:
    """Return the words before a command that set its limits; none is above what this process may have."""
    kinds = {
        "fsize": (resource.RLIMIT_FSIZE, limits.file_bytes),
        "as": (resource.RLIMIT_AS, limits.address_space),
        "core": (resource.RLIMIT_CORE, 0),
    }
    if confined:  # outside, all processes of the user count
        kinds["nproc"] = (resource.RLIMIT_NPROC, limits.processes)
    # the soft limit alone: it ends a program by a signal that names the reason, and the wall clock holds anyway
    words = ["/usr/bin/prlimit", f"--cpu={limits.cpu_seconds}:"]
    for name, (kind, wanted) in kinds.items():
        ceiling = resource.getrlimit(kind)[1]
        if wanted is not None:
            words.append(f"--{name}={wanted if ceiling == resource.RLIM_INFINITY else min(wanted, ceiling)}")
    return [*words, "--"]


def _namespaces() -> list[str]:
    kinds = ("user", "ipc", "pid", "net", "uts")
    return [*(f"--unshare-{kind}" for kind in kinds), "--unshare-cgroup-try", "--disable-userns", "--die-with-parent",
            "--new-session", "--clearenv"]  # fmt: skip


def _tree(job: Job) -> list[str]:
    """Return the mounts: the system read-only, a scratch disk, private /proc and /dev."""
    words = ["--ro-bind", "/usr", "/usr"]
    for name in SYSTEM:
        place = Path("/") / name
        if place.is_symlink():
            words += ["--symlink", str(place.readlink()), str(place)]
        elif place.is_dir():
            words += ["--ro-bind", str(place), str(place)]
    for pattern in CONFIGURATION:
        for place in sorted(Path("/etc").glob(pattern)):
            words += ["--ro-bind-try", str(place), str(place)]
    # /dev is a disk in memory without a limit of its own
    words += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    words += ["--size", str(job.limits.disk_bytes), "--tmpfs", WORK]
    for tree in job.trees:  # behind the scratch disk, in whose place one may lie
        words += ["--ro-bind", str(tree), str(tree)]
    for name, value in environment(job, WORK).items():
        words += ["--setenv", name, value]
    return words


def _filter() -> Mapping[str, bytes]:
    """Return the filter of system calls; without one the probe finds the sandbox wanting."""
    found = seccomp.program()
    return {} if found is None else {"seccomp": found}


def _given(files: Mapping[str, int]) -> list[str]:
    words = ["--dir", JOB]
    for name, fd in files.items():
        words += ["--perms", "0444", "--ro-bind-data", str(fd), f"{JOB}/{name}"]
    return words


@contextmanager
def _memory_files(files: Mapping[str, str | bytes]) -> Iterator[Mapping[str, int]]:
    """Yield name -> descriptor: files that lie in no folder, so that no folder need be opened to another user."""
    made: dict[str, int] = {}
    try:
        for name, text in files.items():
            made[name] = os.memfd_create(name)
            os.write(made[name], text.encode() if isinstance(text, str) else text)
            os.lseek(made[name], 0, os.SEEK_SET)
        yield MappingProxyType(made)
    finally:
        for fd in made.values():
            os.close(fd)


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """Yield both ends of a pipe; who starts the process closes the end to write to."""
    read, write = os.pipe()
    try:
        yield read, write
    finally:
        os.close(read)


def _start(words: Sequence[str], folder: str, env: Mapping[str, str], fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, as an unprivileged user if this process is root."""
    who = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        cwd=folder, env=dict(env), pass_fds=tuple(fds), start_new_session=True, **who,
    )  # fmt: skip


def _judged(ended: Ended, status: int, output: str) -> Outcome:
    """Tell the limit of processor time from an end of the program's own."""
    return Outcome("time" if ended == "done" and status == 128 + signal.SIGXCPU else ended, status, output)
