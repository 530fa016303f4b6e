"""The two scores of the task suite, on text alone: the exact answer, and the answer somewhere in the output."""

from __future__ import annotations

import re

_LETTER_OR_DIGIT = r"[^\W_]"


def exact_match(output: str, answer: str) -> bool:
    """Tell whether a model's output is the answer and nothing else.

    Outer whitespace and one final full stop are dropped and inner runs of whitespace count as one space; case counts.

    Args:
        output: what the model wrote.
        answer: what it should have written.

    Returns:
        True if both are the same text.
    """
    return _normal(output) == _normal(answer)


def contained(output: str, answer: str) -> bool:
    """Tell whether the answer stands somewhere in a model's output, as a whole word or number.

    An answer never matches inside a longer word or number: "12" is not in "312", "12.5" or "12:30", "1" is not in
    "1,000", "5" is not in "-5" nor in "2024-01-05". Case counts.

    Args:
        output: what the model wrote.
        answer: what it should have written.

    Returns:
        True if the answer occurs; an empty answer occurs in an empty output only.
    """
    text, wanted = _normal(output), _normal(answer)
    if not wanted:
        return not text
    before, after = rf"(?<!{_LETTER_OR_DIGIT})", rf"(?!{_LETTER_OR_DIGIT})"
    if wanted[0].isdigit():
        # a sign, a decimal point or a separator glued to the left makes it the tail of another number
        before += r"(?<![-\u2212.])(?<!\d[,:/])"
    if wanted[-1].isdigit():
        after += r"(?![-.,:/]\d)"
    return re.search(before + re.escape(wanted) + after, text) is not None


def _normal(text: str) -> str:
    """Collapse whitespace and drop one final full stop."""
    return " ".join(text.split()).removesuffix(".").rstrip()
