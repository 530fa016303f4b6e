"""Server optimisers: how the combined change of the clients is applied to the global weights."""

from __future__ import annotations

from fedloom import tensors
from fedloom.parts import Part
from fedloom.types import Bundle, Tensors


class ServerOptimizer(Part, family=True):
    """Maps (weights, combined change, kept state) to (new weights, new state)."""

    def step(self, params: Tensors, delta: Tensors, kept: Bundle, lr: float) -> tuple[Tensors, Bundle]:
        """Return the new weights and what the optimiser keeps until the next round (an empty Bundle: nothing).

        Args:
            params: the global weights.  delta: the combined change, same names.
            kept: what the last step returned; empty before the first.  lr: the server's learning rate.
        """
        raise NotImplementedError


class ServerSgd(ServerOptimizer, name="sgd"):
    """w <- w + lr * delta; lr = 1 is plain averaging (arXiv 2003.00295 names the family)."""

    def step(self, params: Tensors, delta: Tensors, kept: Bundle, lr: float) -> tuple[Tensors, Bundle]:
        return tensors.add(params, delta, alpha=lr), kept
