"""What crossed the wire in a run, noted where the engine trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from fedloom import tensors
from fedloom.runtime.engine import Engine
from fedloom.types import Message
from fedloom.wire import codec


@dataclass(frozen=True)
class Passed:
    """One client's messages of one round."""

    round: int
    client: str
    down: Message
    up: Message
    engine: Engine


@contextmanager
def watched() -> Iterator[list[Passed]]:
    """Within the context, note every client's messages, as they are decoded."""
    seen: list[Passed] = []
    real = Engine.train

    def noted(self: Any, round_: int, errands: Any) -> Any:
        replies = real(self, round_, errands)
        for errand, reply in zip(errands, replies, strict=True):
            seen.append(Passed(round_, errand.client, _opened(errand.message), _opened(reply.message), self))
        return replies

    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(Engine, "train", noted)
        yield seen


def payload(message: Message) -> int:
    """Return the bytes of a message's tensors."""
    return sum(tensors.nbytes(bundle.tensors) for bundle in message.groups.values())


def _opened(data: bytes) -> Message:
    return Message(codec.decode(data)) if data else Message()
