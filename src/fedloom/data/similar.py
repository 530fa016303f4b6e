"""How alike two texts are, by ROUGE-L (Lin, 2004): the words that they share, in their order.

With LCS the longest common subsequence of words: P = LCS / words of the one, R = LCS / words of the other,
F = 2 P R / (P + R). Words are runs of letters and digits in lower case, unstemmed.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"[a-z0-9]+")


def rouge_l(output: str, reference: str) -> float:
    """Return the F of the longest common subsequence of words; 0 where either has no word."""
    a, b = (_WORD.findall(text.lower()) for text in (output, reference))
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for i, other in enumerate(b, 1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    return 2 * row[-1] / (len(a) + len(b))
