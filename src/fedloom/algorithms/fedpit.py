"""FedPIT (Zhang et al., arXiv 2403.06131): the shared adapter sees only what the model makes up, never private rows.

    client k:  D~_k <- question-answer pairs that the model writes after some of the client's own, filtered
               P_k  <- local steps on its own rows and D~_k, with G^t frozen beside it:  y = W_0 x + P_k(x) + G(x)
               G_k  <- local steps from G^t on D~_k alone
    server:    FedAvg of the G_k,  p_k = |D~_k| / sum_j |D~_j|

D~_k is kept by the client and made once (`renew`: anew every so many rounds, by the newest G). A pair is dropped if it
is not complete, or if its question, or the whole pair, is as near as `threshold` (ROUGE-L) to one of the client's own
or to an earlier one. The metric `synthetic` counts them; a client to which none is left counts for nothing in the mean.

On the wire: as FedAvg, G. P_k and D~_k never travel.

Privacy: no step of G takes a private row, so its change depends on those only through D~_k. That is no guarantee: a
model may repeat in other words what it was shown, and then G learns it. A client's weight tells how many pairs it kept;
with `weighting: uniform`, whether it kept any.

Differs from the paper in: the examples are shown as plain text, without the template; the local adapter begins at zero
beside G.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from fedloom import slots, tensors
from fedloom.algorithms.base import Client
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.pairs import packed, unpacked
from fedloom.data.similar import rouge_l
from fedloom.types import (
    Bundle,
    ClientUpdate,
    Fitted,
    Generate,
    Memory,
    Message,
    Pair,
    ServerState,
    Steps,
    Tensors,
    Texts,
    done,
)

OWN, SYNTHETIC = "local", "synthetic"
"""Names of the memory groups with a client's P and its made-up pairs."""
QUESTION, ANSWER = "Instruction:", "Response:"


class FedPit(FedAvg, name="fedpit"):
    """FedAvg on pairs that every client's model makes up, and a local adapter that sees the client's rows."""

    needs_lora: ClassVar[bool] = True
    personal: ClassVar[bool] = True

    weighting: Literal["examples", "uniform"] = "examples"
    """Weight of a client in the mean: the number of its made-up pairs, or 1."""
    synthetic: PositiveInt = 32
    """Pairs that a client makes up, at most."""
    attempts: PositiveInt = 2
    """Times that as many pairs are written, until enough are left or this is reached."""
    shots: PositiveInt = 3
    """Own pairs that are shown before one is written."""
    temperature: NonNegativeFloat = 0.7
    """Of the writing; 0: the most likely words."""
    max_new_tokens: PositiveInt = 128
    """Longest pair written, in tokens."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """ROUGE-L from which on a pair is dropped as a copy."""
    renew: NonNegativeInt = 0
    """Rounds after which pairs are made up anew; 0: never."""
    local_steps: PositiveInt | None = None
    """Optimiser steps on the local adapter in a round; null: as many as the trainer's."""

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = message.groups["params"].tensors
        made = yield from self._made(client, start)
        pairs = unpacked(made)
        local = yield from self._local(client, start, pairs, self.local_steps)
        made_up = torch.arange(client.examples, client.examples + len(pairs))
        shared = yield from client.fit(start, pairs=pairs, rows=made_up)
        # without a step there is no loss of the shared adapter to tell
        told, also = (shared, local) if shared.steps else (local, shared)
        update = client.update(tensors.sub(shared.params, start), told, also=[also])
        metrics = {**update.metrics, "synthetic": float(len(pairs))}
        # without a step there is no change, and others' must not be watered down by it
        weight = self.weight(len(pairs)) if shared.steps else 0.0
        kept = {**client.memory, OWN: Bundle(slots.main(local.params)), SYNTHETIC: made}
        return replace(update, weight=weight, metrics=metrics), kept

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return done(_mixed(client.memory, message.groups["params"].tensors))

    def adapt(self, client: Client, message: Message, steps: int) -> Steps[Tensors]:
        pairs = unpacked(client.memory.get(SYNTHETIC, Bundle()))
        return (yield from self._local(client, message.groups["params"].tensors, pairs, steps)).params

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        return {"shared": state.params} if memory is None else {"personal": _mixed(memory, state.params)}

    def _local(self, client: Client, shared: Tensors, pairs: Sequence[Pair], steps: int | None) -> Steps[Fitted]:
        """Train the local adapter on private and made-up rows, with the shared one frozen beside it."""
        own = client.memory[OWN].tensors if OWN in client.memory else client.draw(0)
        chosen = None if steps is None else range(steps)
        return (yield from client.fit(slots.beside(own, shared), trainable=slots.is_main, pairs=pairs, steps=chosen))

    def _made(self, client: Client, shared: Tensors) -> Steps[Bundle]:
        """Return the client's made-up pairs, written now if they are due."""
        if SYNTHETIC in client.memory:
            before = client.memory[SYNTHETIC]
            if not self.renew or client.round - before.scalars["round"] < self.renew:
                return before
        private = yield Texts()
        kept: list[Pair] = []
        stream = client.stream("shots", client.round)
        for attempt in range(self.attempts if private else 0):
            shown = [torch.randperm(len(private), generator=stream)[: self.shots] for _ in range(self.synthetic)]
            prompts = [_shown([private[i] for i in some.tolist()]) for some in shown]
            purpose = f"synthetic:{attempt}"
            texts = yield Generate(shared, prompts, self.max_new_tokens, temperature=self.temperature, purpose=purpose)
            for pair in _read(texts):
                if len(kept) < self.synthetic and not any(self._copies(pair, one) for one in (*private, *kept)):
                    kept.append(pair)
            if len(kept) == self.synthetic:
                break
        return packed(kept, round=float(client.round))

    def _copies(self, pair: Pair, other: Pair) -> bool:
        """Return whether a pair is too near to another."""
        if pair.question == other.question:
            return True  # also where there is no word that ROUGE-L counts
        texts = ((pair.question, other.question), (_whole(pair), _whole(other)))
        return any(rouge_l(*both) >= self.threshold for both in texts)


def _mixed(memory: Memory, shared: Tensors) -> Tensors:
    return slots.beside(memory[OWN].tensors, shared) if OWN in memory else shared


def _whole(pair: Pair) -> str:
    return f"{pair.question} {pair.answer}"


def _shown(pairs: Sequence[Pair]) -> str:
    """Return some pairs as plain text that goes on with the question of another."""
    told = [f"{QUESTION} {one.question}\n{ANSWER} {one.answer}\n\n" for one in pairs]
    return "".join(told) + QUESTION


def _read(texts: Sequence[str]) -> Iterator[Pair]:
    """Yield the pairs that texts begin with; those without a question or an answer are left out."""
    for text in texts:
        question, _, rest = text.partition(ANSWER)
        answer = rest.partition(QUESTION)[0]
        if QUESTION not in question and question.strip() and answer.strip():
            yield Pair(question.strip(), answer.strip())
