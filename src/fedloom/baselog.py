"""The base log: low-rank changes of the frozen base weights, made in the course of a run by some algorithms.

Every merge is an entry of its own, so that a participant that was absent can be told what it missed. Once the entries
take more numbers than the dense changes would (a summed rank of about half the smaller dimension), all but the newest
become one dense entry. The weights after any number of merges are W_0 plus the sum of the entries, rounded once to the
base's dtype, so they depend on the log alone and not on the way to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from fedloom.factors import Factors, stack
from fedloom.types import Bundle, Merge, Message

GROUP = "base"
"""Name of the message group that brings merges."""


def merged(log: Sequence[Merge], round_: int, products: Mapping[str, Factors]) -> tuple[Merge, ...]:
    """Return the log with one more merge.

    Args:
        log: oldest first.  round_: finished rounds once the current one is.
        products: module -> what is added to its weight.
    """
    tensors: dict[str, Tensor] = {}
    for module, pair in products.items():
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = pair.a, pair.b * pair.scale
    return _append(log, Merge(round_, tensors))


def _append(log: Sequence[Merge], new: Merge) -> tuple[Merge, ...]:
    """Return the log with one more entry: a pure function of both, so that everybody's log folds at the same point."""
    if new.whole:
        return (new,)
    low = sum(t.numel() for one in (*log, new) if not one.whole for t in one.tensors.values())
    dense = sum(pair.a.shape[1] * len(pair.b) for m in modules([new]) if (pair := low_part([new], m)) is not None)
    if not log or low <= dense:
        return (*log, new)
    # the newest stays as it is: it is all that a participant of the last round lacks
    totals = {f"{module}.delta": delta(log, module) for module in modules(log)}
    return Merge(log[-1].round, {name: t for name, t in totals.items() if t is not None}, whole=True), new


def modules(log: Iterable[Merge]) -> list[str]:
    """Return the modules that the log changes, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for one in log for name in one.tensors))


def delta(log: Sequence[Merge], module: str) -> Tensor | None:
    """Return the sum of all changes of a module's weight, (d_out, d_in); None: it never changed."""
    dense, low = dense_part(log, module), low_part(log, module)
    if low is None:
        return dense
    return low.product() if dense is None else dense + low.product()


def dense_part(log: Sequence[Merge], module: str) -> Tensor | None:
    """Return the dense entry's change of a module, (d_out, d_in); None: there is none."""
    return next((one.tensors[f"{module}.delta"] for one in log if f"{module}.delta" in one.tensors), None)


def low_part(log: Sequence[Merge], module: str) -> Factors | None:
    """Return the stack of the low-rank entries' changes of a module; None: there is none."""
    low = _low(log, module)
    return stack(low) if low else None


def is_dense(log: Iterable[Merge]) -> bool:
    """Return whether an entry has no low-rank form any more."""
    return any(one.whole for one in log)


def with_adapter(log: Sequence[Merge], adapter: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return module -> one pair of summed rank: every change of the base and an adapter on top, scale 1.

    Raises:
        ValueError: the log is dense.
    """
    if is_dense(log):
        raise ValueError("a dense change of the base has no low-rank factors")
    return {module: stack([*_low(log, module), pair]) for module, pair in adapter.items()}


def news(log: Iterable[Merge], seen: int | None) -> dict[str, Bundle]:
    """Return what tells a participant of the merges that it lacks, as a message group; empty if it has all.

    Args:
        seen: finished rounds when it last had the log; None: it knows the untouched base.
    """
    missing = [one for one in log if seen is None or one.round > seen]
    if not missing:
        return {}
    tensors = {f"{i}.{name}": t for i, one in enumerate(missing) for name, t in one.tensors.items()}
    scalars = {f"{i}.round": float(one.round) for i, one in enumerate(missing)}
    scalars |= {f"{i}.whole": float(one.whole) for i, one in enumerate(missing)}
    return {GROUP: Bundle(tensors, scalars)}


def received(log: Sequence[Merge], message: Message) -> tuple[Merge, ...]:
    """Return a participant's log after the merges that a message brings."""
    bundle = message.groups.get(GROUP, Bundle())
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in bundle.tensors.items():
        place, _, name = key.partition(".")
        found.setdefault(place, {})[name] = tensor
    for place in sorted(found, key=int):
        one = Merge(int(bundle.scalars[f"{place}.round"]), found[place], bool(bundle.scalars[f"{place}.whole"]))
        log = _append(log, one)
    return tuple(log)


def _low(log: Iterable[Merge], module: str) -> list[Factors]:
    first, second = f"{module}.lora_A", f"{module}.lora_B"
    return [Factors(one.tensors[first], one.tensors[second]) for one in log if first in one.tensors]
