"""Federations of LoRA adapters on bare tensors: a client trains as a function of the test says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tests.bare import bare_server
from torch import Tensor

from fedloom import factors, seeds, tensors
from fedloom.algorithms import Algorithm, Client, Server
from fedloom.factors import Ranks
from fedloom.types import ClientUpdate, Fit, Fitted, Memory, Message, ServerState, Tensors

LAYERS = {"q": (7, 9), "v": (6, 8)}  # (d_out, d_in)
ALPHA = 4.0
Solve = Callable[[str, int, Fit], Tensors]


def adapter(
    rank: int, seed: int = 0, b: float = 0.0, layers: Mapping[str, tuple[int, int]] = LAYERS
) -> dict[str, Tensor]:
    """Return an adapter in float64: A random, B random of size `b`."""
    stream, params = torch.Generator().manual_seed(seed), {}
    for module, (d_out, d_in) in layers.items():
        params[f"{module}.lora_A"] = torch.randn(rank, d_in, generator=stream, dtype=torch.float64)
        params[f"{module}.lora_B"] = b * torch.randn(d_out, rank, generator=stream, dtype=torch.float64)
    return params


def ranks(whole: int, of: Mapping[str, Mapping[str, int]] | None = None, alpha: float = ALPHA) -> Ranks:
    """Return what ranks mean; clients that `of` leaves out have the global rank."""
    everywhere = dict.fromkeys(LAYERS, whole)
    return Ranks(everywhere, lambda client: (of or {}).get(client, everywhere), lambda rank: alpha / rank)


def wander(name: str, round_: int, effect: Fit) -> Tensors:
    """Move every moving tensor to a random place that depends on the client and the round."""
    ended = dict(effect.start)
    for key, t in effect.start.items():
        if effect.trainable is None or effect.trainable(key):
            stream = seeds.generator(0, round_, name, key)
            ended[key] = t + 0.3 * torch.randn(t.shape, generator=stream, dtype=t.dtype)
    return ended


@dataclass
class Federation:
    """A server, its clients' memories, and all that was sent in the last round."""

    algorithm: Algorithm
    server: Server
    initial: Tensors
    examples: Mapping[str, int]
    state: ServerState
    memories: dict[str, Memory] = field(default_factory=dict)
    down: dict[str, Message] = field(default_factory=dict)
    updates: list[ClientUpdate] = field(default_factory=list)
    ended: dict[str, Tensors] = field(default_factory=dict)

    def client(self, name: str) -> Client:
        """Return what a client sees."""
        own = self.initial
        if self.algorithm.mixed_ranks:
            own = self.server.ranks.cut(own, name)
        examples = self.examples[name]
        weight = self.algorithm.weight(examples)
        memory = self.memories.get(name, {})
        return Client(name, self.state.round, memory, examples, weight, own, lambda round_: own, self.server.lora)

    def round(self, solve: Solve = wander, cohort: Sequence[str] | None = None) -> ServerState:
        """Run one round and return the state after it."""
        self.down, self.updates, self.ended = {}, [], {}
        self.state = drive(self.algorithm.prepare(self.server, self.state))
        for name in cohort or self.examples:
            self.down[name] = self.algorithm.broadcast(self.server, self.state, name)
            steps = self.algorithm.train(self.client(name), self.down[name])
            update, self.memories[name] = drive(steps, lambda effect, name=name: self._fit(solve, name, effect))
            self.updates.append(update)
        combined = drive(self.algorithm.combine(self.server, self.state, self.updates))
        after = drive(self.algorithm.step(self.server, self.state, combined))
        seen = {**self.state.seen, **dict.fromkeys(self.down, self.state.round)}
        self.state = replace(after, seen=seen) if self.algorithm.tells_missed else after
        return self.state

    def ideal(self) -> dict[str, Tensor]:
        """Return module -> sum_k p_k s_k B_k A_k of what the clients of the last round trained."""
        total = sum(self.examples[name] for name in self.ended)
        return {
            m: sum(self.examples[n] / total * _product(p, m, self.server.ranks) for n, p in self.ended.items())
            for m in self.server.ranks.whole
        }

    def global_product(self) -> dict[str, Tensor]:
        """Return module -> s B A of the global adapter."""
        (params,) = self.algorithm.export(self.state).values()
        return {m: _product(params, m, self.server.ranks) for m in self.server.ranks.whole}

    def _fit(self, solve: Solve, name: str, effect: Fit) -> Fitted:
        self.ended[name] = solve(name, self.state.round, effect)
        return Fitted(self.ended[name], 1, 0.1, 1, 1, (0.0,))


def federation(
    algorithm: Algorithm, examples: Mapping[str, int], lora: Ranks, initial: Tensors | None = None, **server: Any
) -> Federation:
    """Return a federation before its first round; `server`: arguments of `bare_server`."""
    start = adapter(max(lora.whole.values())) if initial is None else initial
    built = bare_server(tuple(examples), lora=lora, draw=lambda round_: start, **server)
    return Federation(algorithm, built, start, examples, algorithm.init(start))


def drive(steps: Any, answer: Callable[[Any], Any] | None = None) -> Any:
    """Run a coroutine to its end."""
    sent: Any = None
    try:
        while True:
            asked = steps.send(sent)
            assert answer is not None, asked
            sent = answer(asked)
    except StopIteration as stop:
        return stop.value


def size(message: Message) -> int:
    """Return the tensor bytes of a message."""
    return sum(tensors.nbytes(bundle.tensors) for bundle in message.groups.values())


def names(message: Message) -> set[str]:
    """Return the names of all tensors of a message."""
    return {name for bundle in message.groups.values() for name in bundle.tensors}


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], atol: float = 1e-12) -> None:
    """Fail unless two maps hold the same numbers up to `atol`."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def _product(params: Tensors, module: str, lora: Ranks) -> Tensor:
    return factors.pairs(params, lora.scale)[module].product()
