"""What importers share: the settings of another project's file, taken one by one, and what became of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fedloom.parts import Part
from fedloom.types import suggest

Tree: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Remark:
    """A setting as it was written, and what there is to say about it."""

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}: {self.why}"


class Settings:
    """Settings by dotted key. Each is taken, or remarked on; what is left at the end was not understood.

    Attributes:
        lost: settings that were not translated.  moot: settings that need no counterpart.  notes: what was translated,
            but means something slightly different here.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._left = dict(values)
        self.lost: list[Remark] = []
        self.moot: list[Remark] = []
        self.notes: list[Remark] = []

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def take(self, key: str, default: Any = None) -> Any:
        """Return a setting that is translated, or what it is where it is not given."""
        self._left.pop(key, None)
        return self._values.get(key, default)

    def drop(self, key: str, why: str) -> None:
        """Remark that a setting, if it is given, is not translated, and why."""
        self._remark(self.lost, key, why)

    def pass_over(self, key: str, why: str) -> None:
        """Remark that a setting, if it is given, needs no counterpart, and why."""
        self._remark(self.moot, key, why)

    def note(self, key: str, why: str) -> None:
        """Remark how a setting, if it is given, differs here."""
        self._remark(self.notes, key, why)

    def _remark(self, remarks: list[Remark], key: str, why: str) -> None:
        if key in self._values:
            self._left.pop(key, None)
            remarks.append(Remark(key, self._values[key], why))

    def under(self, prefix: str) -> list[str]:
        """Return the keys that nothing was said about and that are `prefix` or lie below it."""
        return [key for key in self._left if key == prefix or key.startswith(f"{prefix}.")]

    def switch(self, section: str, why: str, key: str = "use") -> None:
        """Remark on a whole section that is on or off as a whole: not translated where its `key` is true."""
        on = bool(self._values.get(f"{section}.{key}", False))
        for one in self.under(section):
            if on:
                self.drop(one, why)
            else:
                self.pass_over(one, f"{section} is switched off")

    def part(self, family: type[Part], name: str, options: Mapping[str, tuple[str, Any]], key: str) -> Tree | None:
        """Return a part of a family as a recipe writes it, or None, with a remark, where there is none of that name.

        Args:
            options: field -> (the setting that it comes from, its value; None: leave the default).
            key: the setting that asks for the part.
        """
        if name not in family.known:
            hint = suggest(name, family.known)
            self.drop(key, f"there is no {family.family_name} {name!r} here{hint} (fedloom list shows what there is)")
            for theirs, _ in options.values():
                self.drop(theirs, f"belongs to {name}, which is not here")
            return None
        fields = family.known[name].model_fields
        chosen = {field: value for field, (_, value) in options.items() if value is not None and field in fields}
        for field, (theirs, value) in options.items():
            if value is not None and field not in fields:
                self.drop(theirs, f"{name} has no such option here (it has: {', '.join(fields) or 'none'})")
        return {"name": name, **chosen}

    def close(self) -> None:
        """Count what nothing was said about as not translated."""
        for key in list(self._left):
            self.drop(key, "no knob is known for it")


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of file that can be imported.

    Attributes:
        name: what people call it.  marks: what it is recognised by, for the message when nothing is.
        read: text -> settings by dotted key, or None where the text is something else.
        translate: settings -> a recipe as plain values.
    """

    name: str
    marks: str
    read: Callable[[str], Mapping[str, Any] | None]
    translate: Callable[[Settings], Tree]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def is_number(value: Any) -> bool:
    """Return whether a value is a number and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def peft_targets(model: str) -> Sequence[str] | None:
    """Return the modules that peft adapts by itself in a family of models, found by the model's name; None: unknown."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    plain = re.sub(r"[^a-z0-9]", "", model.rpartition("/")[2].lower())
    named = {re.sub(r"[^a-z0-9]", "", family.lower()): family for family in (*DEFAULTS, *_NAMES)}
    for name in sorted(named, key=len, reverse=True):
        if name in plain:
            targets = DEFAULTS.get(_NAMES.get(named[name], named[name]))
            return list(targets) if isinstance(targets, list | tuple) else None
    return None


_NAMES = {"pythia": "gpt_neox", "smollm": "llama", "vicuna": "llama", "alpaca": "llama", "qwen1.5": "qwen2"}
"""Model names -> the family whose architecture they have, where the names differ."""


def lora_targets(settings: Settings, model: str, key: str) -> Sequence[str] | str:
    """Return what peft would adapt by default, or `all-linear`, with a note, where that is not known."""
    targets = peft_targets(model)
    if targets is None:
        settings.note(key, f"peft's default target modules of {model} are not known here: adapter.targets=all-linear")
    return targets or "all-linear"
