"""What a run and its worker processes say to each other: frames of a JSON header and raw bytes, never a pickle.

    to a worker      start: the recipe as text, and what else it needs to build its world
                     base: merges into the base weights that it lacks · train: some clients' errands in one round
    from a worker    ready: with a fingerprint of its rows · step: one optimiser step · done: the replies to the last
                     `train` · error: what went wrong

JSON keeps every bit of a float, and tensors travel as the codec's safetensors, so a reply is the one that a call in the
same process would have returned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedloom.cost import METRICS
from fedloom.runtime.engine import Errand, Reply, Stage
from fedloom.types import Bundle, Memory
from fedloom.wire import codec


@dataclass(frozen=True, slots=True)
class Frame:
    """One thing said.

    Attributes:
        kind: what it is about.  head: JSON values.  blobs: bytes.
    """

    kind: str
    head: Mapping[str, Any] = field(default_factory=dict)
    blobs: Sequence[bytes] = ()


def pack(frame: Frame) -> bytes:
    """Return a frame as bytes: the length of its header (8 bytes), the header, the blobs."""
    told = {"kind": frame.kind, "head": frame.head, "sizes": [len(blob) for blob in frame.blobs]}
    text = json.dumps(told).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *frame.blobs])


def unpack(data: bytes) -> Frame:
    """Return the frame that `pack` packed."""
    size = int.from_bytes(data[:8], "little")
    told, first, blobs = json.loads(data[8 : 8 + size]), 8 + size, []
    for length in told["sizes"]:
        blobs.append(data[first : first + length])
        first += length
    return Frame(told["kind"], told["head"], blobs)


def train(chunk: int, round_: int, errands: Sequence[Errand], finish: bool) -> Frame:
    """Return what asks a worker to train some clients.

    Args:
        chunk: its number in the round.  round_: from 0.  finish: see `Errands`.
    """
    head = {"chunk": chunk, "round": round_, "finish": finish, "clients": [errand.client for errand in errands]}
    return Frame("train", head, [blob for one in errands for blob in (one.message, codec.encode(one.memory))])


def errands(frame: Frame) -> list[Errand]:
    """Return the errands of a `train` frame."""
    pairs = zip(frame.blobs[::2], frame.blobs[1::2], strict=True)
    both = zip(frame.head["clients"], pairs, strict=True)
    return [Errand(client, message, codec.decode(memory)) for client, (message, memory) in both]


def done(chunk: int, replies: Sequence[Reply]) -> Frame:
    """Return what a worker answers to `train`."""
    told = [[one.client, one.weight, dict(one.metrics), one.bytes_down] for one in replies]
    blobs = [blob for one in replies for blob in (one.message, _kept(one.memory))]
    return Frame("done", {"chunk": chunk, "replies": told}, blobs)


def seconds(frame: Frame) -> float:
    """Return the time that the clients of a `done` frame spent in effects, all together."""
    names = [name for name in METRICS if name.endswith("seconds")]
    return float(sum(told.get(name, 0.0) for _, _, told, _ in frame.head["replies"] for name in names))


def replies(frame: Frame, share: float) -> list[Reply]:
    """Return the replies of a `done` frame.

    Args:
        share: see `Reply`.
    """
    found = []
    pairs = zip(frame.blobs[::2], frame.blobs[1::2], strict=True)
    for (client, weight, metrics, down), (message, kept) in zip(frame.head["replies"], pairs, strict=True):
        memory = codec.decode(kept) if kept else None
        found.append(Reply(client, weight, message, metrics, memory, down, share))
    return found


def fingerprint(stage: Stage) -> str:
    """Return a hash of who trains on what, and of where they start: both ends must have built the same."""
    digest = hashlib.sha256(stage.encoded.starts.tobytes() + stage.encoded.answer_bytes.tobytes())
    for client, data in stage.clients.items():
        digest.update(client.encode())
        digest.update(data.train.tobytes())
    digest.update(codec.encode({"initial": Bundle(stage.initial)}))
    return digest.hexdigest()


def _kept(memory: Memory | None) -> bytes:
    """Encode a memory; no bytes at all mean that it did not change."""
    return b"" if memory is None else codec.encode(memory)
