"""Encoding: rows become token ids and a mask of labels, once, in flat arrays that are cached by their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from fedloom.data.rows import Row
from fedloom.data.templates import Span, Template, with_system
from fedloom.types import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1000
"""Texts that are tokenised at a time."""


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row.

    Attributes:
        ids: (t,) int64 token ids.  train: (t,) bool, True where the token is a label.
        weight: factor of its loss.
    """

    ids: Tensor
    train: Tensor
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """All examples in flat arrays.

    Attributes:
        ids: (total,) int32 token ids.
        train: (total,) bool, True where the token is a label: assistant text and its end token.
        starts: (n + 1,) int64; example i is `starts[i]:starts[i + 1]`.
        answer_bytes: (n,) int64 UTF-8 bytes of the trained text, end tokens aside (for bits per byte).
    """

    ids: np.ndarray
    train: np.ndarray
    starts: np.ndarray
    answer_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.answer_bytes)

    def length(self, i: int) -> int:
        """Return the number of tokens of example `i`."""
        return int(self.starts[i + 1] - self.starts[i])

    def example(self, i: int) -> Example:
        """Return example `i` as tensors of their own."""
        cut = slice(int(self.starts[i]), int(self.starts[i + 1]))
        return Example(torch.from_numpy(self.ids[cut].astype(np.int64)), torch.from_numpy(self.train[cut].copy()))

    def some(self, indices: np.ndarray) -> Encoded:
        """Return copies of some examples."""
        cuts = [slice(int(self.starts[i]), int(self.starts[i + 1])) for i in indices]
        return Encoded(
            np.concatenate([self.ids[:0], *(self.ids[cut] for cut in cuts)]),
            np.concatenate([self.train[:0], *(self.train[cut] for cut in cuts)]),
            np.cumsum([0, *(cut.stop - cut.start for cut in cuts)], dtype=np.int64),
            self.answer_bytes[indices],
        )

    @staticmethod
    def joined(parts: Sequence[Encoded]) -> Encoded:
        """Return the examples of several, one after the other."""
        lengths = np.concatenate([np.diff(one.starts) for one in parts])
        return Encoded(
            np.concatenate([one.ids for one in parts]),
            np.concatenate([one.train for one in parts]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([one.answer_bytes for one in parts]),
        )


@dataclass(frozen=True, slots=True)
class Left:
    """Counts of rows that were left out.

    Attributes:
        too_long: more than `max_tokens` tokens; they are never cut, since a cut answer teaches to stop in mid-sentence.
        no_label: without a single trained token.
    """

    too_long: int = 0
    no_label: int = 0

    @property
    def total(self) -> int:
        """All rows left out."""
        return self.too_long + self.no_label


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_tokens: int,
    system: str | None,
    cache: Path | None,
) -> tuple[Encoded, list[int], Left]:
    """Render and tokenise rows, or load the result from the cache.

    Args:
        rows: n rows.
        tokenizer: of the model to be trained; a fast one.
        template: how a dialogue becomes text.
        max_tokens: longer examples are left out.
        system: system prompt of rows that have none of their own.
        cache: folder of encoded data sets; None keeps nothing.

    Returns:
        The examples, the indices in `rows` that they stand for, and counts of those left out.

    Raises:
        DataError: a row cannot be rendered, or none is left.
        ModelError: the tokenizer is not a fast one.
    """
    return encode_spans(render(rows, tokenizer, template, system), tokenizer, max_tokens, cache)


def render(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: Template, system: str | None
) -> list[list[Span]]:
    """Return the spans of each row; arguments and errors are those of `encode`."""
    spans: list[list[Span]] = []
    for row in rows:
        try:
            spans.append(template.render(with_system(row.turns, system), tokenizer))
        except DataError as error:
            raise DataError(f"row {row.id}: {error}") from error
    return spans


def encode_spans(
    texts: Sequence[Sequence[Span]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    cache: Path | None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Encoded, list[int], Left]:
    """Tokenise rendered rows; `progress` is called with the number of rows done, all else is as for `encode`."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} cannot tell which text a token stands for, which the mask needs;"
            " use a model with a fast tokenizer (tokenizer.json)"
        )
    file = cache / f"{_key(texts, tokenizer, max_tokens)}.safetensors" if cache else None
    arrays = _load(file) if file else None
    if arrays is None:
        arrays = _tokenise(texts, tokenizer, max_tokens, progress or (lambda done: None))
        if file:
            _save(arrays, file)
    left = Left(*arrays["left"].tolist())
    if not len(arrays["kept"]):
        raise DataError(
            f"no row is left: {left.too_long} have more than data.max_tokens={max_tokens} tokens, {left.no_label} have"
            " no assistant text to train on; raise data.max_tokens or choose another data.source"
        )
    encoded = Encoded(arrays["ids"], arrays["train"], arrays["starts"], arrays["answer_bytes"])
    return encoded, arrays["kept"].tolist(), left


def _tokenise(
    texts: Sequence[Sequence[Span]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    progress: Callable[[int], None],
) -> dict[str, np.ndarray]:
    ends = frozenset(tokenizer.get_added_vocab())
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    kept: list[int] = []
    left = np.zeros(2, np.int64)
    for first in range(0, len(texts), CHUNK):
        chunk = texts[first : first + CHUNK]
        wholes = ["".join(span.text for span in spans) for spans in chunk]
        encoding = tokenizer(wholes, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for i, spans in enumerate(chunk):
            mask = _labels(spans, np.array(encoding["offset_mapping"][i]).reshape(-1, 2), ends)
            fits, trains = len(mask) <= max_tokens, bool(mask.any())
            left += (not fits, fits and not trains)
            if fits and trains:
                kept.append(first + i)
                masks.append(mask)
                ids.append(np.array(encoding["input_ids"][i], dtype=np.int32))
        progress(first + len(chunk))
    return {
        "ids": np.concatenate([np.zeros(0, np.int32), *ids]),
        "train": np.concatenate([np.zeros(0, np.bool_), *masks]),
        "starts": np.cumsum([0, *map(len, ids)], dtype=np.int64),
        "answer_bytes": np.array([_answer_bytes(texts[i], ends) for i in kept], dtype=np.int64),
        "kept": np.array(kept, dtype=np.int64),
        "left": left,
    }


def _answer_bytes(spans: Sequence[Span], ends: frozenset[str]) -> int:
    return sum(len(span.text.encode()) for span in spans if span.train and span.text not in ends)


def _labels(spans: Sequence[Span], offsets: np.ndarray, ends: frozenset[str]) -> np.ndarray:
    """Return which tokens are labels: those wholly inside trained text, and end tokens.

    Args:
        spans: the pieces of one text.
        offsets: (t, 2) first character of each token, and the one after its last.
        ends: texts of tokens that may end a turn.
    """
    starts, stops = offsets[:, 0], offsets[:, 1]
    # Some tokenizers do not count a token's white space: what lies before it belongs to it.
    starts = np.minimum(starts, np.concatenate([[0], stops[:-1]])) if len(stops) else starts
    mask = np.zeros(len(offsets), np.bool_)
    at = begin = 0
    for span in spans:
        if span.train and span.text in ends:
            mask |= offsets[:, 0] == at  # by its start, since some end tokens swallow the white space after them
        at += len(span.text)
        if not span.train:
            begin = at
        else:
            mask |= (starts >= begin) & (stops <= at)
    mask[:1] = False  # nothing comes before the first token that could predict it
    return mask


def _key(texts: Sequence[Sequence[Span]], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """Hash all that the result depends on; the spans stand for rows, template and system prompt together."""
    backend = tokenizer.backend_tokenizer.to_str().encode()
    digest = hashlib.sha256(f"fedloom encode 1 {max_tokens} {hashlib.sha256(backend).hexdigest()}".encode())
    for spans in texts:
        digest.update(f"\x1e{len(spans)}".encode())
        for span in spans:
            digest.update(f"\x1f{int(span.train)} {len(span.text)} {span.text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _checksum(arrays: dict[str, np.ndarray]) -> np.ndarray:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def _load(file: Path) -> dict[str, np.ndarray] | None:
    """Return the cached arrays, or None if there are none or they are damaged and must be made anew."""
    if not file.is_file():
        return None
    try:
        arrays = dict(load_file(file))
    except (SafetensorError, OSError):
        return None
    checksum = arrays.pop("checksum", None)
    return arrays if checksum is not None and np.array_equal(checksum, _checksum(arrays)) else None


def _save(arrays: dict[str, np.ndarray], file: Path) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({**arrays, "checksum": _checksum(arrays)}, temporary)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        if temporary.exists():
            temporary.unlink()
        problem = f"{file.parent}: the cache of encoded rows cannot be written ({error})"
        raise DataError(f"{problem}; free space there, or set FEDLOOM_HOME to another folder") from error
