"""Replies that came before their turn."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

from fedloom.runtime import pipes
from fedloom.runtime.pipes import Frame


class Spill:
    """Keeps a chunk's replies until it is their turn, in a file without a name: a kill leaves nothing behind."""

    def __init__(self, folder: Path) -> None:
        self.file = TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._places: dict[int, tuple[int, int]] = {}
        self._shares: dict[int, float] = {}
        self._now: tuple[int, Frame] | None = None

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._shares

    def put(self, chunk: int, frame: Frame, share: float, now: bool) -> None:
        """Keep a chunk's replies.

        Args:
            share: see `Reply`.  now: it is their turn, so they need not go to the disk.
        """
        self._shares[chunk] = share
        if now:
            self._now = chunk, frame
            return
        data = pipes.pack(frame)
        self._places[chunk] = self.file.seek(0, os.SEEK_END), len(data)
        self.file.write(data)

    def pop(self, chunk: int) -> tuple[Frame, float]:
        """Return what was put for a chunk."""
        share = self._shares.pop(chunk)
        if self._now is not None and self._now[0] == chunk:
            frame, self._now = self._now[1], None
            return frame, share
        first, size = self._places.pop(chunk)
        self.file.seek(first)
        frame = pipes.unpack(self.file.read(size))
        if not self._places:
            self.file.truncate(0)
        return frame, share
