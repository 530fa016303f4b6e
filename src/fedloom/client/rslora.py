"""rsLoRA (Kalajdzievski, arXiv 2312.03732): LoRA with the scale alpha / sqrt r, so that high ranks learn no slower.

    W + (alpha / sqrt r) B A

The same as `adapter: {name: lora, rslora: true}`, under its own name.
"""

from __future__ import annotations

from typing import Literal

from fedloom.client.adapters import Lora


class RsLora(Lora, name="rslora"):
    """rsLoRA (arXiv 2312.03732): LoRA with the rank-stabilised scale alpha / sqrt r; `lora` with `rslora: true`."""

    rslora: Literal[True] = True
    """Always true: it is what the name stands for."""
