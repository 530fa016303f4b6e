"""Fed-SB (Singhal et al., arXiv 2502.15436): only the core R of LoRA-SB (arXiv 2411.19557) is trained and averaged.

    client k:  trains R_k (r, r) in W + B R_k A from R^t; A and B are frozen and the same everywhere
    server:    R^{t+1} = sum_k p_k R_k

so that the mean of the products is B (sum_k p_k R_k) A exactly.

A and B come from the gradient G (d_out, d_in) of the mean loss on the server's own rows: with the SVD G = U S V^T they
are U_r and V_r^T, and R^0 = -e sqrt(d_out d_in) S_r / ||S_r||, a move of W against G whose elements have the root
mean square e = `first_step`, as those of a first step of Adam with that rate have. The SVD is a randomised one
(Halko et al., arXiv 0909.4061) that sees G through the gradients of a LoRA adapter alone: with B = 0, dL/dB = G A^T;
with A = 0, dL/dA = B^T G. The rank is 8 above r, and each power iteration costs two more passes over the rows.

On the wire: down A and B once to each client, b r (d_in + d_out) a layer, and R every round, b r^2; up R, b r^2. With
`start: random` everybody draws A and B from the seed, and they are never sent.

Differs from the paper in: G is the gradient instead of a sum of its signs; the server's rows stand for a sample of the
clients' (a gradient on private rows would tell of them).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from fedloom import tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.client.lora_sb import CORE, cores, frozen, is_core, orthonormal, plain
from fedloom.server.aggregate import Around
from fedloom.types import Bundle, ClientUpdate, Gradient, Memory, Message, ServerState, Steps, Tensors, done

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

OVERSAMPLING = 8
"""Directions beyond r that the randomised SVD looks at."""
FROZEN = "frozen"
"""The group with A and B, in a client's first message and then in its memory."""


class FedSb(FedAvg, name="fed-sb"):
    """Averages of R (r, r) between frozen A and B; for `adapter: lora-sb`."""

    needs_core: ClassVar[bool] = True
    tells_missed: ClassVar[bool] = True

    start: Literal["gradient", "random"] = "gradient"
    """Whence A and B: the gradient on the server's rows (`data.public`), or random orthonormal ones with R = 0."""
    examples: PositiveInt = 64
    """The server's rows that the gradient is taken over, at most."""
    first_step: NonNegativeFloat = 1e-4
    """Root mean square of the first change of a weight's elements, made on the server; 0 starts at the base."""
    power: NonNegativeInt = 1
    """Power iterations of the randomised SVD."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        if self.start == "gradient" and not recipe.data.public:
            yield (
                "algorithm=fed-sb takes its factors from the gradient on rows of the server; set data.public to their "
                "number, such as 32, or algorithm.start=random"
            )
        if recipe.server.aggregator.products:
            yield (
                "server.aggregator.distance=product is what distances of R are already, as A and B of algorithm=fed-sb "
                "are orthonormal; set server.aggregator.distance=factors"
            )
        if recipe.init is not None:
            yield f"init={recipe.init}: algorithm=fed-sb makes its own factors; remove init"
        if recipe.compare:
            yield (
                f"compare: {', '.join(recipe.compare)} would train the factors that adapter={recipe.adapter.part_name} "
                "freezes; set compare=[]"
            )

    def prepare(self, server: Server, state: ServerState) -> Steps[ServerState]:
        if self.start == "random" or state.round > 0:
            return state
        found = yield from self._svd(server, state.params)
        params = dict(state.params)
        for module, (u, s, vh) in found.items():
            core = params[f"{module}.{CORE}"]
            # without a gradient there is nothing to step along, and R is zero
            size = self.first_step * math.sqrt(u.shape[0] * vh.shape[1]) / (float(s.norm()) or 1.0)
            for name, t in (("lora_A", vh), ("lora_B", u), (CORE, torch.diag(-size * s))):
                params[f"{module}.{name}"] = t.to(core.dtype).contiguous()
        return replace(state, params=params)

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        groups = {"params": Bundle(cores(state.params))}
        if self.start == "gradient" and client not in state.seen:
            groups[FROZEN] = Bundle(frozen(state.params))
        return Message(groups)

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start, still = message.groups["params"].tensors, self._frozen(client, message)
        fitted = yield from client.fit({**still, **start}, trainable=is_core)
        update = client.update(tensors.sub(cores(fitted.params), start), fitted)
        return update, {**client.memory, FROZEN: Bundle(still)} if FROZEN in message.groups else client.memory

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        ended = tensors.add(cores(state.params), update.message.groups["params"].tensors)
        return plain({**state.params, **ended})

    def around(self, server: Server, state: ServerState) -> Around:
        # A and B are orthonormal: distances of R are those of the products
        return replace(super().around(server, state), params=cores(state.params), scale=None)

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after = yield from super().step(server, replace(state, params=cores(state.params)), combined)
        return replace(after, params={**state.params, **after.params})

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        params = {**self._frozen(client, message), **message.groups["params"].tensors}
        return done(params)

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        return {"shared": plain(state.params)}

    def _frozen(self, client: Client, message: Message) -> dict[str, Tensor]:
        """Return A and B as a client knows them."""
        if self.start == "random":
            return frozen(client.initial)
        return dict((message.groups.get(FROZEN) or client.memory[FROZEN]).tensors)

    def _svd(self, server: Server, params: Tensors) -> Steps[dict[str, tuple[Tensor, Tensor, Tensor]]]:
        """Return module -> U_r, S_r, V_r^T in float64 of the gradient of its weight."""
        modules = [name.removesuffix(f".{CORE}") for name in cores(params)]
        zero = {name: torch.zeros_like(t) for name, t in frozen(params).items()}
        stream, right, left = server.stream(0, "fed-sb"), dict[str, Tensor](), dict[str, Tensor]()
        for module in modules:
            rank, d_in = params[f"{module}.lora_A"].shape
            width = min(rank + OVERSAMPLING, d_in, len(params[f"{module}.lora_B"]))
            right[module] = torch.randn(d_in, width, generator=stream)
        for _ in range(self.power + 1):
            seen = yield from self._through(zero, "lora_A", {m: orthonormal(t).mT for m, t in right.items()})
            left = {m: orthonormal(t) for m, t in seen.items()}
            seen = yield from self._through(zero, "lora_B", left)
            right = {m: t.double().mT for m, t in seen.items()}
        found = {}
        for module in modules:
            u, s, vh = torch.linalg.svd(right[module].mT, full_matrices=False)
            rank = len(params[f"{module}.{CORE}"])
            found[module] = ((left[module] @ u)[:, :rank], s[:rank], vh[:rank])
        return found

    def _through(self, zero: Tensors, fixed: str, values: Mapping[str, Tensor]) -> Steps[dict[str, Tensor]]:
        """Return module -> the gradient of the other factor, which is zero: G A^T with A fixed, B^T G with B fixed."""
        params, other = {}, "lora_B" if fixed == "lora_A" else "lora_A"
        for module, value in values.items():
            like = zero[f"{module}.{other}"]
            width = value.shape[0] if fixed == "lora_A" else value.shape[1]
            shape = (len(like), width) if other == "lora_B" else (width, like.shape[1])
            params[f"{module}.{fixed}"] = value.to(like.dtype).contiguous()
            params[f"{module}.{other}"] = like.new_zeros(shape)
        found: Tensors = yield Gradient(params, self.examples)
        return {module: found[f"{module}.{other}"] for module in values}
