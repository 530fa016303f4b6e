"""Where a block of a language with braces ends."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|`[^`]*`|[{}]", re.DOTALL)


def depth(text: str) -> int:
    """Return how many braces are open at the end of a text; those in comments and literals do not count."""
    found = [match[0] for match in _TOKEN.finditer(text)]
    return found.count("{") - found.count("}")


def closing(text: str, open_braces: int, start: int = 0) -> int:
    """Return the place behind the brace that closes the outermost of `open_braces`; the end, if none does."""
    for match in _TOKEN.finditer(text, start):
        open_braces += {"{": 1, "}": -1}.get(match[0], 0)
        if open_braces == 0:
            return match.end()
    return len(text)


def without(text: str, head: re.Pattern[str]) -> str:
    """Return a text without the blocks whose head matches; the match ends before the opening brace."""
    while found := head.search(text):
        opened = text.find("{", found.end())
        if opened < 0:
            return text
        text = text[: found.start()] + text[closing(text, 1, opened + 1) :]
    return text


def body(declaration: str, text: str) -> str:
    """Return a continuation of a declaration up to where all that it opened is closed."""
    return text[: closing(text, max(1, depth(declaration)))]
