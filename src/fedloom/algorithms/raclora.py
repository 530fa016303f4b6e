"""Fed-RAC-LoRA (Malinovsky et al., arXiv 2410.08305): a chain of LoRA blocks of which one factor is random and fixed.

    round t:   everybody draws the fixed factor of the block, A_t (or B_t)
    client k:  trains the other one from 0, on W^t
    server:    B = sum_k p_k B_k,  W^{t+1} = W^t + s B A_t        (or A = sum_k p_k A_k,  W^{t+1} = W^t + s B_t A)

The mean is exact, since all products of a round share a factor; the chain of many rounds is not bound to one rank.
Nothing of the optimiser outlives a block.

On the wire: up the trained factor, b r d_out a layer (`trains: A`: b r d_in); down the same for every merge that the
client lacks. Fixed factors are drawn from the round, or with `trains: A` from a seed that is sent beside.

A step of SGD with rate eta moves W by -eta s^2 G A^T A (or -eta s^2 B B^T G), G the gradient of W. A is Kaiming-uniform
with E[A^T A] = r / (3 d_in) I, while B is N(0, 1) as in the paper with E[B B^T] = r I: the same rate goes 3 d_in times
as far with `trains: A`, and sqrt(3 d_in) times with an optimiser such as AdamW, whose steps do not grow with G.

Differs from the paper in: one block a round; the default fixes A, as LoRA starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from fedloom import baselog, factors, tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.halves import product_problems
from fedloom.factors import Scale
from fedloom.server.aggregate import Around
from fedloom.types import Bundle, ClientUpdate, Memory, Merge, Message, ServerState, Steps, Tensors, done

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

BLOCK = "block"
"""Name of the message group with the seed of the round's fixed factor."""


class RacLora(FedAvg, name="rac-lora"):
    """One random factor a round, the other trained, averaged and merged into the base."""

    needs_lora: ClassVar[bool] = True
    changes_base: ClassVar[bool] = True
    tells_missed: ClassVar[bool] = True
    own_step: ClassVar[str] = "the block is merged into the base"

    trains: Literal["B", "A"] = "B"
    """The factor that clients train; the other one is drawn."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        if recipe.init is not None:
            yield (
                f"init={recipe.init}: algorithm=rac-lora begins every round with a fresh block, so the adapter would "
                "be lost; export it with --to merged, set model.name to that folder and remove init"
            )
        yield from product_problems(self.part_name, recipe)
        if recipe.server.aggregator.remembers:
            yield (
                f"server.aggregator={recipe.server.aggregator.part_name} compares with earlier rounds, but the fixed "
                "factor of algorithm=rac-lora is another one in every round; set server.aggregator=mean, or a rule "
                "without memory such as median"
            )

    def block(self, drawn: Tensors, seed: float) -> dict[str, Tensor]:
        """Return the adapter with which a round begins; its product is zero.

        Args:
            drawn: the round's fresh LoRA adapter.  seed: of the fixed factor, where that is B.
        """
        if self.trains == "B":
            return dict(drawn)
        stream, start = torch.Generator().manual_seed(int(seed)), {}
        for name, t in drawn.items():
            # drawn in float32 whatever the dtype, as A is
            start[name] = (
                torch.zeros_like(t) if self.moves(name) else torch.randn(t.shape, generator=stream).to(t.dtype)
            )
        return start

    def moves(self, name: str) -> bool:
        """Return whether a factor is trained."""
        return name.endswith(f".lora_{self.trains}")

    def received(
        self, log: Sequence[Merge], message: Message, draw: Callable[[int], Tensors], scale: Scale
    ) -> tuple[Merge, ...]:
        """Return a participant's base log after the merges that a message brings.

        Args:
            draw: round -> the fresh adapter of it.  scale: rank -> scale.
        """
        bundle = message.groups.get(baselog.GROUP, Bundle())
        held = dict(bundle.tensors)
        for place in sorted({key.partition(".")[0] for key in held}, key=int):
            if bundle.scalars[f"{place}.whole"]:
                continue
            fresh = draw(int(bundle.scalars[f"{place}.round"]) - 1)
            for name, t in self.block(fresh, bundle.scalars.get(f"{place}.seed", 0.0)).items():
                if not self.moves(name):
                    # in a merge the scale is part of B
                    held[f"{place}.{name}"] = t * scale(t.shape[1]) if name.endswith(".lora_B") else t
        return baselog.received(log, Message({baselog.GROUP: Bundle(held, bundle.scalars)}))

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        groups = {group: self._halves(server, bundle) for group, bundle in self.news(state, client).items()}
        if self.trains == "A":
            groups[BLOCK] = Bundle(scalars={"seed": self._seed(server, state.round)})
        return Message(groups)

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        seed = message.groups.get(BLOCK, Bundle()).scalars.get("seed", 0.0)
        start = self.block(client.draw(client.round), seed)
        fitted = yield from client.fit(start, trainable=self.moves)
        moved = {name: t for name, t in fitted.params.items() if self.moves(name)}
        return client.update(tensors.sub(moved, {name: start[name] for name in moved}), fitted), client.memory

    def around(self, server: Server, state: ServerState) -> Around:
        return replace(super().around(server, state), params=self._begun(server, state.round))

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return self._ended(server, state.round, update.message)

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after = state.round + 1
        products = factors.pairs(self._ended(server, state.round, combined), server.ranks.scale)
        base = baselog.merged(state.base, after, products)
        slots = {**state.slots, **{g: b for g, b in combined.groups.items() if g == "aggregator"}}
        # with B = 0 it adds nothing to the base
        return done(replace(state, round=after, params=server.draw(after), slots=slots, base=base))

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return done(client.draw(client.round))

    def _seed(self, server: Server, round_: int) -> float:
        return float(torch.randint(2**31, (), generator=server.stream(round_, "rac-lora")))

    def _begun(self, server: Server, round_: int) -> dict[str, Tensor]:
        return self.block(server.draw(round_), self._seed(server, round_))

    def _ended(self, server: Server, round_: int, message: Message) -> dict[str, Tensor]:
        """Return the block of a round with the change that a message holds."""
        start, delta = self._begun(server, round_), message.groups["params"].tensors
        return {name: t + delta[name] if name in delta else t for name, t in start.items()}

    def _halves(self, server: Server, news: Bundle) -> Bundle:
        """Return the news of merges without the factors that everybody can draw."""
        fixed = ".lora_A" if self.trains == "B" else ".lora_B"
        kept = {key: t for key, t in news.tensors.items() if not key.endswith(fixed)}
        seeds = {}
        if self.trains == "A":
            rounds = {key: number for key, number in news.scalars.items() if key.endswith(".round")}
            seeds = {f"{key.partition('.')[0]}.seed": self._seed(server, int(n) - 1) for key, n in rounds.items()}
        return Bundle(kept, {**news.scalars, **seeds})
