"""Questions and answers as a group of texts: in a message, in a slot, in a client's memory."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.types import Bundle, Pair


def packed(pairs: Sequence[Pair], **scalars: float) -> Bundle:
    """Return pairs as texts, in their order, with further numbers beside them."""
    texts = {}
    for i, pair in enumerate(pairs):
        texts[f"{i}.question"], texts[f"{i}.answer"] = pair.question, pair.answer
    return Bundle(scalars={"pairs": float(len(pairs)), **scalars}, texts=texts)


def unpacked(bundle: Bundle) -> tuple[Pair, ...]:
    """Return the pairs of a group that `packed` made; none of an empty one."""
    count = int(bundle.scalars.get("pairs", 0))
    return tuple(Pair(bundle.texts[f"{i}.question"], bundle.texts[f"{i}.answer"]) for i in range(count))
