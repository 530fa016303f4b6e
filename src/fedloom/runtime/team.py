"""Worker processes as the run sees them: started, spoken to, and ended; and what is left of one that died."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from tempfile import TemporaryFile

from fedloom import allocator
from fedloom.runtime import pipes
from fedloom.runtime.pipes import Frame
from fedloom.types import SiteError

GRACE_SECONDS = 5.0
"""How long a worker that was told to end may take before it is killed."""
SETTLE_SECONDS = 0.3
"""How long it may take until a process whose pipe has ended is seen to be over."""
LAST_WORDS = 2000
"""Bytes of a dead worker's output that are looked at."""
# the signal is ignored before the long imports, and the paths are those under which parts were found here
CODE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {paths!r}; "
    "from fedloom.runtime.worker import main; main({fd})"
)


class Worker:
    """One worker process, and this end of its pipe.

    Attributes:
        name: what people call it.  ready: whether it has said that it can train.
        written: bytes of output that are passed over.  fate: how it ended; empty while it runs.
    """

    def __init__(self, name: str) -> None:
        """Start the process.

        Raises:
            SiteError: the system does not let it.
        """
        self.name, self.ready, self.written, self.fate = name, False, 0, ""
        self.output = TemporaryFile()  # noqa: SIM115 - closed by `end`; not the terminal: nobody can read several processes at once
        self.pipe, theirs = multiprocessing.Pipe()
        command = [sys.executable, "-c", CODE.format(paths=sys.path, fd=theirs.fileno())]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                env=allocator.for_child(),
                pass_fds=(theirs.fileno(),),
            )
        except OSError as error:
            raise SiteError(f"{name} could not be started: {error.strerror}; lower runtime.workers") from error
        finally:
            theirs.close()

    def is_ready(self) -> None:
        """Note that it can train; what it wrote before, mostly warnings of libraries, is of no interest any more."""
        self.ready, self.written = True, os.fstat(self.output.fileno()).st_size

    def say(self, frame: Frame) -> None:
        """Send a frame; that the worker is gone shows when it is heard."""
        with suppress(OSError):
            self.pipe.send_bytes(pipes.pack(frame))

    def hear(self) -> Frame | None:
        """Return the next frame, or None if the worker is gone."""
        try:
            return pipes.unpack(self.pipe.recv_bytes())
        except (EOFError, OSError):
            return None

    def gone(self, seconds: float) -> bool:
        """Return whether the process ends by itself within some time."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def leave(self) -> None:
        """Close the pipe, which ends the process without being waited for."""
        self.pipe.close()

    def end(self) -> str:
        """Wait for the end of the process, or bring it about; return how it ended and its last words."""
        if self.fate:
            return self.fate
        self.leave()
        if not self.gone(GRACE_SECONDS):
            self.process.kill()
        status = self.process.wait()
        how = f"ended with status {status}"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            how += " (by a person, or for want of memory)" if status == -signal.SIGKILL else ""
        words = self._words()
        self.output.close()
        self.fate = f"{self.name} {how}" + (f"; its last words:\n{words}" if words else "")
        return self.fate

    def _words(self) -> str:
        output = self.output.fileno()
        first = max(self.written, os.fstat(output).st_size - LAST_WORDS)
        # not by seek and read, which would move the place where the process writes
        text = os.pread(output, LAST_WORDS, first).decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return "\n".join(f"  {line}" for line in lines[-5:])


@dataclass(eq=False, slots=True)
class Team:
    """The workers that hold one base model between them: mostly one.

    Attributes:
        name: what people call it.  workers: the first one speaks for all.
        chunk: the number of the chunk that it trains; None: it is free.  clients: of that chunk.
        base: finished rounds when it was last told of the base log; None: never.
    """

    name: str
    workers: list[Worker] = field(default_factory=list)
    chunk: int | None = None
    clients: Sequence[str] = ()
    base: int | None = None

    def say(self, frame: Frame) -> None:
        """Send a frame to every worker."""
        for worker in self.workers:
            worker.say(frame)

    def broken(self, witness: Worker) -> bool:
        """Return whether an error that `witness` told of comes from another worker of the team that was killed."""
        others = [worker for worker in self.workers if worker is not witness and worker.gone(SETTLE_SECONDS)]
        return any((worker.process.returncode or 0) < 0 for worker in others)

    def leave(self) -> None:
        """Let all workers end."""
        for worker in self.workers:
            worker.leave()

    def end(self) -> str:
        """End all workers; return what became of the one that had ended by itself."""
        if not self.workers:
            return self.name
        over = [worker for worker in self.workers if worker.gone(SETTLE_SECONDS)] or self.workers
        # one that was killed (a negative status) comes before those that broke because of it
        first = min(over, key=lambda worker: worker.process.returncode or 0)
        self.leave()
        told = {worker: worker.end() for worker in self.workers}
        return told[first]


def speaking(workers: Iterable[Worker], seconds: float | None) -> list[Worker]:
    """Return the workers that have said something or are gone.

    Args:
        seconds: how long to wait for one; None: for ever.
    """
    of = {worker.pipe: worker for worker in workers}
    return [of[pipe] for pipe in connection.wait(list(of), seconds) if isinstance(pipe, connection.Connection)]
