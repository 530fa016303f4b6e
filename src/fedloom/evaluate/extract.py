"""Reading the final number of a GSM8K answer (arXiv 2110.14168) by three rules.

- `strict` and `flexible` are the two filters of lm-evaluation-harness's task gsm8k: the first number after `#### `, and
  the last run that looks like a number; both compare strings, so "18.00" is not "18". They serve comparison with
  published results. `strict_chain` is the strict filter of its task gsm8k_cot: the first number after "The answer is ".
- `numeric` is ours: the first number after the last marker (`####`, "the answer is", `\\boxed{`), else the last number
  of the text; values are compared as exact fractions.

Texts must end where the answer ends: `fedloom.client.generate` cuts them at the stop strings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType

from fedloom.types import DataError

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_STRICT_CHAIN = re.compile(r"The answer is (-?[0-9.,]+).")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_IGNORED = re.compile(r"[,$]|\.$")

_MARKER = re.compile(r"####|the answer is|\\boxed\{", re.IGNORECASE)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
_NUMBER = re.compile(
    r"((?<![\w)])-)?"  # a minus, unless it follows a word, a number or a bracket: then it joins or subtracts
    r"(?:\\?\$)?"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:/(0*[1-9][0-9]*)(?!\.?[0-9]))?"
)


def strict(output: str) -> str | None:
    """Return the number after the first `#### `, normalised as lm-evaluation-harness does, or None."""
    found = _STRICT.search(output)
    return _plain(found[1]) if found else None


def strict_chain(output: str) -> str | None:
    """Return the number after the first `The answer is `, normalised likewise; one more character must follow it."""
    found = _STRICT_CHAIN.search(output)
    return _plain(found[1]) if found else None


def flexible(output: str) -> str | None:
    """Return the last run of digits, dots, commas and dollar signs, normalised likewise, or None."""
    found = _FLEXIBLE.findall(output)
    return _plain(found[-1]) if found else None


def numeric(output: str) -> Fraction | None:
    """Return the first number after the last marker, else the last number of the text; None without a number.

    Thousands commas, dollar signs, decimals, simple fractions (1/2, and LaTeX's) and both minus signs are understood.

    Args:
        output: what a model or a gold answer says, cut at its stop strings.
    """
    found = _final(output)
    return _value(found) if found else None


def has_marker(text: str) -> bool:
    """Return whether a number follows the text's last marker, so that the final answer is told from the working."""
    return _marked(_readable(text)) is not None


def _final(text: str) -> re.Match[str] | None:
    text = _readable(text)
    if marked := _marked(text):
        return marked
    numbers = list(_NUMBER.finditer(text))
    return numbers[-1] if numbers else None


def _marked(text: str) -> re.Match[str] | None:
    markers = list(_MARKER.finditer(text))
    return _NUMBER.search(text, markers[-1].end()) if markers else None


def _readable(text: str) -> str:
    return _LATEX_FRACTION.sub(r"\1/\2", text.replace("\N{MINUS SIGN}", "-"))


def _value(number: re.Match[str]) -> Fraction:
    minus, amount, divisor = number.groups()
    value = Fraction(amount.replace(",", "")) / int(divisor or 1)
    return -value if minus else value


def _plain(number: str) -> str:
    return _IGNORED.sub("", number)


def _gold(answer: str) -> re.Match[str]:
    found = _final(answer)
    if found is None:
        raise DataError(
            f"GSM8K: the gold answer {answer[-80:]!r} holds no number; needed: a text that ends in `#### <number>`; "
            "correct that row of the data file"
        )
    return found


def _same_text(read: Callable[[str], str | None]) -> Callable[[str, str], bool]:
    return lambda output, gold: read(output) == _plain(_gold(gold)[0])


def _same_value(output: str, gold: str) -> bool:
    return numeric(output) == _value(_gold(gold))


RULES: Mapping[str, Callable[[str, str], bool]] = MappingProxyType(
    {"strict": _same_text(strict), "flexible": _same_text(flexible), "numeric": _same_value}
)
"""Rule name -> whether an output gives the same number as a gold answer (the whole text, or the number alone)."""

CHAIN_RULES: Mapping[str, Callable[[str, str], bool]] = MappingProxyType({**RULES, "strict": _same_text(strict_chain)})
"""The same for outputs that end in "The answer is N."."""
