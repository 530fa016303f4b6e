"""A worker process: builds the model and the rows that a recipe names, and trains the clients that it is given.

It serves the one run that started it, over a pipe (`pipes.py`), and ends with it, however that ends.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from fedloom import baselog
from fedloom import recipe as recipes
from fedloom.assets import prepare
from fedloom.checkpoint import MemoryStore
from fedloom.runtime import pipes
from fedloom.runtime.engine import Engine
from fedloom.runtime.pipes import Frame
from fedloom.tracking import Event, Sink, Step
from fedloom.types import FedloomError, Merge, Message
from fedloom.wire import codec
from fedloom.world import set_stage


class Speaker(Sink):
    """The worker's end of its pipe; of a run's events it passes on the optimiser steps."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def say(self, frame: Frame) -> None:
        """Send a frame; without anybody who listens the process ends."""
        try:
            self.pipe.send_bytes(pipes.pack(frame))
        except OSError:
            os._exit(0)

    def on(self, event: Event) -> None:
        if isinstance(event, Step):
            self.say(Frame("step", {"client": event.client, "tokens": event.tokens, "loss": event.loss}))


def main(fd: int) -> None:
    """Serve the run at the other end of a pipe until it closes it.

    Args:
        fd: the file descriptor of this end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the run decides what it means
    os.set_inheritable(fd, False)
    pipe = Connection(fd)
    speaker, inbox = Speaker(pipe), SimpleQueue[Frame]()
    Thread(target=_listen, args=(pipe, inbox), daemon=True).start()
    try:
        _serve(speaker, inbox)
    except BaseException as error:
        told = {"type": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
        speaker.say(Frame("error", {**told, "for_people": isinstance(error, FedloomError)}))
        os._exit(1)


def _listen(pipe: Connection, inbox: SimpleQueue[Frame]) -> None:
    """Take in what is said; the end of the pipe ends the process at once, in the middle of whatever it does."""
    try:
        while True:
            inbox.put(pipes.unpack(pipe.recv_bytes()))
    except (EOFError, OSError):
        os._exit(0)


def _serve(speaker: Speaker, inbox: SimpleQueue[Frame]) -> None:
    engine, speaks = _build(inbox.get(), speaker)
    speaker.say(Frame("ready", {"fingerprint": pipes.fingerprint(engine.stage)}))
    base: tuple[Merge, ...] = ()
    while True:
        asked = inbox.get()
        if asked.kind == "base":
            base = baselog.received(base, Message(codec.decode(asked.blobs[0])))
            engine.stage.bench.attached.rebase(base)
            continue
        errands = pipes.errands(asked)
        work = engine.finish_some if asked.head["finish"] else engine.train
        replies = work(asked.head["round"], errands)
        # all ranks of a team have computed the same; one of them tells it
        speaker.say(pipes.done(asked.head["chunk"], replies if speaks else ()))


def _build(start: Frame, speaker: Speaker) -> tuple[Engine, bool]:
    """Build what the recipe names; return it, and whether this process speaks for its team."""
    rank, size, store = start.head["rank"], start.head["size"], start.head["store"]
    import_all(start.head["modules"])
    recipe = recipes.validate(json.loads(start.head["recipe"]), "the recipe")
    if size > 1:
        from fedloom.client import sharding  # imports what most workers do not need

        sharding.join(rank, size, Path(store), start.head["device"])
    assets = prepare(recipe, Sink())
    if size > 1:
        sharding.shard(assets.loaded.model, start.head["device"])
    # memories come with the errands and go with the replies, so the store is never looked at
    stage, _ = set_stage(recipe, assets, MemoryStore(Path(os.devnull)), speaker if rank == 0 else Sink())
    return Engine(stage), rank == 0


def import_all(modules: Sequence[str]) -> None:
    """Import the modules that register the recipe's own parts."""
    for name in modules:
        importlib.import_module(name)
