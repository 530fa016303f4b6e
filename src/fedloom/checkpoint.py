"""What survives an interruption: the server state and the clients' memories, each written at once or not at all.

    checkpoints/<round>/state.safetensors, state.json     the state after <round> finished rounds, and the run's totals
    checkpoints/latest, checkpoints/best                  links to one of them
    memories/<client>/<round>.safetensors                 what a client kept when <round> rounds were finished
    memories/<client>/<round>.5.safetensors               what it made of that after the last round, by itself
    memories/index.jsonl                                  one line a round: the clients whose memory changed
    base/<round>.safetensors, base/<round>.whole.safetensors   a merge into the base; all merges up to there

Memory files are immutable. The index is written before the checkpoint that it belongs to, and lines after the
checkpoint are ignored, so a crash at any moment leaves a state from which the run goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from fedloom.parts import Record
from fedloom.types import Bundle, Memory, Merge, ServerState, Stopped, WireError
from fedloom.wire import codec

FINISHED = 0.5
"""What is added to the number of finished rounds once clients have worked on by themselves after the last one."""


class Checkpointing(Record):
    """The recipe's `checkpoint:` section."""

    every: PositiveInt = 1
    """Rounds between checkpoints; the last round is always kept."""
    keep: PositiveInt = 2
    """How many checkpoints stay, the best one aside."""


def pack(state: ServerState) -> dict[str, Bundle]:
    """Return the state's tensors as groups for the codec; the base log has files of its own."""
    seen = {"seen": Bundle(scalars={name: float(round_) for name, round_ in state.seen.items()})} if state.seen else {}
    slots = {f"slot:{name}": bundle for name, bundle in state.slots.items()}
    return {"params": Bundle(state.params), **seen, **slots}


def unpack(round_: int, groups: Mapping[str, Bundle], base: tuple[Merge, ...] = ()) -> ServerState:
    """Return the state that `pack` took apart."""
    slots = {name.removeprefix("slot:"): b for name, b in groups.items() if name.startswith("slot:")}
    seen = {name: int(when) for name, when in groups.get("seen", Bundle()).scalars.items()}
    return ServerState(round_, groups["params"].tensors, slots, base, seen)


class BaseFiles:
    """The base log on disk: one immutable file a merge, and one a dense entry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, log: Sequence[Merge]) -> list[str]:
        """Write the entries that have no file yet; return the names of all, oldest first."""
        names = [f"{one.round}{'.whole' if one.whole else ''}" for one in log]
        for name, one in zip(names, log, strict=True):
            if not self._file(name).exists():
                codec.write(self._file(name), {"merge": Bundle(one.tensors)})
        return names

    def load(self, names: Sequence[str]) -> tuple[Merge, ...]:
        """Return the entries of `save`."""
        tensors = [codec.read(self._file(name))["merge"].tensors for name in names]
        return tuple(
            Merge(int(name.partition(".")[0]), one, name.endswith(".whole"))
            for name, one in zip(names, tensors, strict=True)
        )

    def prune(self, kept: Iterable[str]) -> None:
        """Delete the files of entries that no checkpoint refers to."""
        spared = {self._file(name).name for name in kept}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in spared:
                path.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


class MemoryStore:
    """The private memories of all clients on disk; in memory are only the rounds of clients that ever changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._versions: dict[str, list[float]] = {}
        self._pending: dict[str, float] = {}

    def load(self, client: str) -> Memory:
        """Return a client's last committed memory; empty before its first."""
        versions = self._versions.get(client)
        return codec.read(self._file(client, versions[-1])) if versions else {}

    def save(self, client: str, round_: float, memory: Memory) -> None:
        """Write a client's memory as of `round_` finished rounds (see `FINISHED`); `commit` makes it count."""
        codec.write(self._file(client, round_), memory)
        self._pending[client] = round_

    def commit(self, round_: float) -> list[str]:
        """Make the memories saved since the last commit those of `round_`; return the clients that changed."""
        if not self._pending:
            return []
        line = json.dumps({"round": round_, "clients": sorted(self._pending)})
        with self._index().open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        for client in self._pending:
            self._versions.setdefault(client, []).append(self._pending[client])
        changed, self._pending = list(self._pending), {}
        return changed

    def restore(self, round_: float) -> None:
        """Go back to the memories as of `round_` finished rounds, and forget whatever came later."""
        lines = self.look_at(round_)
        for path in self.folder.glob("*/*.5.safetensors"):
            if float(path.name.removesuffix(".safetensors")) > round_:
                path.unlink()  # no later version will take its place
        if lines:
            codec.write_atomic(self._index(), "".join(line + "\n" for line in lines).encode())
        else:
            self._index().unlink(missing_ok=True)

    def look_at(self, round_: float) -> list[str]:
        """Read the memories as of `round_` finished rounds, changing no file; return the index lines up to there."""
        self._versions, self._pending, lines = {}, {}, []
        if self._index().exists():
            for line in self._index().read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    break  # the last line of a killed run may be torn; nothing after it was committed
                if entry["round"] > round_:
                    break
                lines.append(line)
                for client in entry["clients"]:
                    self._versions.setdefault(client, []).append(entry["round"])
        return lines

    def prune(self, kept: Sequence[int], changed: Iterable[str]) -> None:
        """Delete versions of the `changed` clients that none of the `kept` checkpoints refers to."""
        for client in changed:
            versions = self._versions.get(client, [])
            spared = {max((v for v in versions if v <= round_), default=None) for round_ in kept} | {versions[-1]}
            for version in [v for v in versions if v not in spared]:
                versions.remove(version)
                self._file(client, version).unlink(missing_ok=True)

    def _file(self, client: str, round_: float) -> Path:
        return self.folder / client / f"{round_}.safetensors"

    def _index(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / "index.jsonl"


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep, self.base = folder, keep, BaseFiles(folder.parent / "base")

    def save(self, state: ServerState, record: Mapping[str, Any]) -> None:
        """Write the state and `record` (JSON) as one checkpoint, then point `latest` at it and prune.

        Raises:
            Stopped: the disk refuses; the checkpoints before stay valid.
        """
        target = self.folder / str(state.round)
        temporary = self.folder / f".{state.round}.{os.getpid()}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            codec.write(temporary / "state.safetensors", pack(state))
            base = {"base": self.base.save(state.base)} if state.base else {}
            text = json.dumps({"round": state.round, **base, **record}, indent=1, allow_nan=True)
            codec.write_atomic(temporary / "state.json", text.encode())
            if target.exists():  # a resumed run repeats a round that was saved but not pointed at
                shutil.rmtree(target)
            temporary.replace(target)
            self._point("latest", state.round)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise Stopped(
                f"the checkpoint of round {state.round} could not be saved in {self.folder}: {error.strerror}; "
                f"{self._last()} make room, then go on with: fedloom run --resume {self.folder.parent}"
            ) from error
        self._prune()

    def amend(self, round_: int, record: Mapping[str, Any]) -> None:
        """Replace entries of a checkpoint's record, at once or not at all; its state stays.

        Raises:
            Stopped: the disk refuses.
        """
        path = self.folder / str(round_) / "state.json"
        try:
            told = {**json.loads(path.read_text(encoding="utf-8")), **record}
            codec.write_atomic(path, json.dumps(told, indent=1, allow_nan=True).encode())
        except OSError as error:
            raise Stopped(
                f"{path} could not be written: {error.strerror}; {self._last()} make room, then go on with: "
                f"fedloom run --resume {self.folder.parent}"
            ) from error

    def mark_best(self, round_: int) -> None:
        """Point `best` at the checkpoint of `round_`, which then outlives pruning."""
        self._point("best", round_)
        self._prune()

    def rounds(self) -> list[int]:
        """Return the rounds that have a checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and (p / "state.json").exists())

    def find(self, name: str) -> int | None:
        """Return the round that `latest` or `best` points at, or None."""
        link = self.folder / name
        return int(link.readlink().name) if link.is_symlink() and (link / "state.json").exists() else None

    def load(self, round_: int) -> tuple[ServerState, dict[str, Any]]:
        """Return the state and the record of one checkpoint.

        Raises:
            WireError: a file is missing or damaged.
        """
        folder = self.folder / str(round_)
        try:
            record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WireError(f"{folder / 'state.json'} cannot be read: {error}") from error
        base = self.base.load(record.get("base", ()))
        return unpack(round_, codec.read(folder / "state.safetensors"), base), record

    def _point(self, name: str, round_: int) -> None:
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(str(round_))
        temporary.replace(self.folder / name)

    def _prune(self) -> None:
        spared = {self.find("best"), self.find("latest"), *self.rounds()[-self.keep :]}
        for round_ in self.rounds():
            if round_ not in spared:
                shutil.rmtree(self.folder / str(round_), ignore_errors=True)
        if self.base.folder.is_dir():
            self.base.prune(name for round_ in self.rounds() for name in self._merges(round_))

    def _merges(self, round_: int) -> list[str]:
        record = json.loads((self.folder / str(round_) / "state.json").read_text(encoding="utf-8"))
        return list(record.get("base", ()))

    def _last(self) -> str:
        last = self.find("latest")
        return "no earlier checkpoint exists;" if last is None else f"the checkpoint of round {last} is intact;"
