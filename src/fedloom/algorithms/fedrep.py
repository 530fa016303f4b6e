"""FedRep (Collins et al., arXiv 2102.07078): first what is private, then what is shared.

    client k:  tau_h steps on h_k with phi^t frozen, then the rest of the round's steps on phi with h_k frozen
    server:    phi^{t+1} = sum_k p_k phi_k

What is private is named as in FedPer (`fedper.py`), whose wire and neutral cases it has: with `none` or `all` every
step goes to the one part that there is.

Differs from the paper in: the adapter's tensors are split, as there is no new head; both phases share the round's
steps, so that a round costs what one of FedPer does. The optimiser is built afresh for each phase.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import PositiveFloat, PositiveInt

from fedloom.algorithms.base import Client
from fedloom.algorithms.fedper import FedPer
from fedloom.algorithms.phases import joined
from fedloom.types import ClientUpdate, Memory, Message, Steps

if TYPE_CHECKING:
    from fedloom.recipe import Recipe


class FedRep(FedPer, name="fedrep"):
    """FedPer in two phases: the private tensors first, then the shared ones."""

    private_steps: PositiveInt | None = None
    """tau_h, the round's first steps, on the private tensors; a client with fewer spends all there; null: half."""
    private_lr: PositiveFloat | None = None
    """Learning rate of the private tensors; null: the trainer's."""
    shared_lr: PositiveFloat | None = None
    """Learning rate of the shared tensors; null: the trainer's."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        yield from super().conflicts(recipe)
        trainer = recipe.trainer
        if isinstance(self.private, str):
            return
        if trainer.steps is not None and self.private_steps is not None and self.private_steps >= trainer.steps:
            yield (
                f"algorithm.private_steps={self.private_steps} leaves none of trainer.steps={trainer.steps} to the "
                "shared tensors; lower the one or raise the other"
            )
        if trainer.steps == 1 and self.private_steps is None:
            yield "algorithm=fedrep halves a round, and trainer.steps=1 has but one step; raise trainer.steps"
        if trainer.decay != 1:
            yield "algorithm=fedrep has two phases, and trainer.decay would begin anew with each; set trainer.decay=1"

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = self._whole(client, message)
        first, last = self._turn(client, start)
        private = yield from client.fit(start, trainable=self.keeps, steps=range(first), lr=self.private_lr)
        shared = yield from client.fit(
            private.params, trainable=self.shares, steps=range(first, last), lr=self.shared_lr
        )
        return self._sent(client, start, joined([private, shared]))

    def _turn(self, client: Client, names: Iterable[str]) -> tuple[int, int]:
        """Return at which of the round's steps the shared tensors take over, and how many steps there are."""
        kept = [self.keeps(name) for name in names]
        if all(kept) or not any(kept):
            return (client.steps if all(kept) else 0), client.steps
        wanted = client.steps // 2 if self.private_steps is None else self.private_steps
        return min(wanted, client.steps), client.steps
