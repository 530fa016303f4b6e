"""The code in an answer."""

from __future__ import annotations

import re
from collections.abc import Callable

_FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


def fenced(output: str, wanted: Callable[[str], bool]) -> str | None:
    """Return the first block between code fences that is wanted, else the first block; None: there is none.

    A block that the answer's end cuts off is one.
    """
    blocks = [match[1] for match in _FENCE.finditer(output)]
    return next((block for block in blocks if wanted(block)), blocks[0] if blocks else None)
