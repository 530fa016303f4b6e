"""The words of the contracts: what is kept, what is sent, what a client asks for, and what can go wrong."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor

Tensors: TypeAlias = Mapping[str, Tensor]
"""Live parameter name -> tensor, always with the original layer index."""

Penalty: TypeAlias = Callable[[Tensors], Tensor]
"""Differentiable map from a client's trainable tensors to a scalar that is added to its loss."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A named group of values that is kept or sent: tensors, numbers and texts."""

    tensors: Tensors = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Message:
    """All that crosses the wire, in either direction, as named groups."""

    groups: Mapping[str, Bundle] = field(default_factory=dict)


Memory: TypeAlias = Mapping[str, Bundle]
"""Private to one client; outlives a round; never sent."""


@dataclass(frozen=True, slots=True)
class Merge:
    """One change of the frozen base weights.

    Attributes:
        round: finished rounds when it was made.
        tensors: `<module>.lora_A` (r, d_in) and `<module>.lora_B` (d_out, r), whose product is added to the weight of
            the module; or `<module>.delta` (d_out, d_in), which is added itself.
        whole: it stands for all merges up to its round, not for one beside them.
    """

    round: int
    tensors: Tensors
    whole: bool = False


@dataclass(frozen=True, slots=True)
class ServerState:
    """All that a server keeps between rounds: together with the memories it *is* the checkpoint.

    Attributes:
        round: number of finished rounds.
        params: the global trainable tensors (empty for a method without a global adapter).
        slots: further named groups, such as control variates or the state of a server optimiser.
        base: the base log, what was merged into the base weights so far, oldest first (`baselog`).
        seen: client -> the round of its last update that was taken, for algorithms that tell clients what they missed.
    """

    round: int
    params: Tensors
    slots: Mapping[str, Bundle] = field(default_factory=dict)
    base: tuple[Merge, ...] = ()
    seen: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """What one client returns from one round.

    Attributes:
        weight: in the mean; at 0 nothing of it counts.
        changes: which groups of the message are changes of weights, trained minus broadcast, or such changes scaled:
            what bounds, rounds or noises an update acts on them alone, and on all of them jointly. Control variates,
            normalisers and scores are none. It does not travel; a decoded update has the default.
    """

    client: str
    weight: float
    message: Message
    metrics: Mapping[str, float] = field(default_factory=dict)
    changes: tuple[str, ...] = ("params",)


@dataclass(frozen=True, slots=True)
class Correction:
    """A constant direction that is added to every local step.

    Attributes:
        tensors: by trainable name; names that are absent are not corrected.
        where: `gradient`: added to the gradient before clipping and the optimiser;
            `weights`: after each optimiser step, `learning rate x direction` is subtracted from the weights.
    """

    tensors: Tensors
    where: Literal["gradient", "weights"] = "gradient"


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and its answer, as plain text; of a longer dialogue the first of each."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Fit:
    """Ask the runtime to train the client's adapter on the client's own rows.

    Attributes:
        start: values of all trainable tensors before the first step.
        trainable: which names move; None: all that the adapter trains. The others stay bit for bit what `start` says.
        penalty: added to the loss of every optimiser step.
        correct: see `Correction`.
        order: `first`: gradients by backpropagation. `zeroth`: each step's gradient is
            g z with g = (L(w + eps z) - L(w - eps z)) / (2 eps), z ~ N(0, I) drawn from (seed, round, client, step)
            (SPSA, as in MeZO, arXiv 2305.17333): two forward passes and no graph, at the memory of inference.
        epsilon: eps.
        optimizer_state: None: the optimiser is built afresh and forgotten. A bundle: it goes on from this state (empty:
            afresh), and the answer holds the state after the last step.
        steps: which of the round's optimiser steps are taken, in order; a step may come again, and those from
            `Client.steps` on are further ones on the rows that follow. None: each of the round's, once.
        lr: learning rate before the schedule; None: the trainer's.
        rows: (n,) which of the client's training rows, and of the pairs behind them, are trained on; None: all.
        pairs: further rows, numbered after the client's own; those longer than `data.max_tokens` are never drawn.
        weights: (own rows + pairs,) factor of each row's loss (the mean is still over all labels); None: ones.
    """

    start: Tensors
    trainable: Callable[[str], bool] | None = None
    penalty: Penalty | None = None
    correct: Correction | None = None
    order: Literal["first", "zeroth"] = "first"
    epsilon: float = 1e-3
    optimizer_state: Bundle | None = None
    steps: Sequence[int] | None = None
    lr: float | None = None
    rows: Tensor | None = None
    pairs: Sequence[Pair] = ()
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Fitted:
    """The answer to `Fit`.

    Attributes:
        params: the trained tensors, same names and shapes as `Fit.start`.
        steps: optimiser steps taken.  lr: their learning rate, that of the first where it falls within a round.
        examples: rows trained on.  tokens: input tokens trained on, padding aside.
        losses: token-weighted mean loss of each step, in nats per trained token.
        slopes: g of each step of a fit of order `zeroth`: with the seeds, all that the trained weights depend on.
        optimizer_state: where it was asked for: the optimiser's tensors, in the layout of the trained weights.
    """

    params: Tensors
    steps: int
    lr: float
    examples: int
    tokens: int
    losses: tuple[float, ...]
    slopes: tuple[float, ...] = ()
    optimizer_state: Bundle = field(default_factory=Bundle)


Split: TypeAlias = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Score:
    """Ask the runtime for the loss sums of `params` (None: of the base alone) on the client's rows of one split."""

    params: Tensors | None
    split: Split = "validation"


@dataclass(frozen=True, slots=True)
class Losses:
    """Ask the runtime for the loss of `params` (None: of the base alone) on each row.

    Answered by a bundle of (n,) tensors in float64: `nll` (nats), `tokens` (trained ones), `bytes` (of the answer).

    Attributes:
        split: of the client's own rows.
        pairs: these instead of own rows; what is longer than `data.max_tokens` has NaN for `nll`. None: own rows.
        rows: numbers of the own rows that count, in the order of the answer; None: all.
    """

    params: Tensors | None
    split: Split = "train"
    pairs: Sequence[Pair] | None = None
    rows: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Embed:
    """Ask the runtime for embeddings: last hidden states of questions, each (d,), answered by (n, d) float32.

    Attributes:
        params: the adapter in the layers; None: the base alone.
        split: of the client's own rows.
        prompts: rendered prompts in place of the own rows' questions; None: own rows.
        pool: `last`: the last token's state; `mean`: the mean over all tokens.
        rows: numbers of the own rows that count, in the order of the answer; None: all.
    """

    params: Tensors | None
    split: Split = "train"
    prompts: Sequence[str] | None = None
    pool: Literal["last", "mean"] = "last"
    rows: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Texts:
    """Ask the runtime for the client's own rows of one split as pairs; they must not leave the client."""

    split: Split = "train"


@dataclass(frozen=True, slots=True)
class Generate:
    """Ask the runtime for answers of `params` (None: of the base alone) to prompts.

    Attributes:
        prompts: rendered, or with `questions` what a user asks, which the template makes a prompt.
        temperature: 0: the most likely token; else what the logits are divided by before one is drawn.
        top_p: draws from the smallest set of tokens whose probabilities sum to this.
        purpose: names the random stream of the client and round that draws.
    """

    params: Tensors | None
    prompts: Sequence[str]
    max_new_tokens: int = 64
    questions: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    purpose: str = "generate"


@dataclass(frozen=True, slots=True)
class Gradient:
    """Ask the runtime for the gradient of the mean loss at `params` over the first `examples` training rows."""

    params: Tensors
    examples: int


Effect: TypeAlias = Fit | Score | Losses | Embed | Texts | Generate | Gradient
T = TypeVar("T")
Steps: TypeAlias = Generator[Effect, Any, T]
"""A pure coroutine: it yields effects, is sent their answers, and returns a T."""


def done(value: T) -> Steps[T]:
    """Wrap a value that needs no effect as `Steps`, so that overriding methods may yield some."""
    return value
    yield


class FedloomError(Exception):
    """Base of every error that is meant for a person; the command prints it without a traceback.

    The message names the knob or file, the value got, what is allowed, and the next step.
    """

    exit_status = 2


class RecipeError(FedloomError):
    """A recipe, a part or an option is wrong."""


class DataError(FedloomError):
    """Rows, their files, templates or partitions are wrong."""


class ModelError(FedloomError):
    """A model or an adapter cannot be found, read or fitted together."""


class WireError(FedloomError):
    """An encoded message is damaged or is not what was promised."""


class SiteError(FedloomError):
    """A site failed or does not answer."""


class Stopped(FedloomError):
    """The run cannot go on but its last checkpoint is valid (NaN, full disk, lost quorum)."""

    exit_status = 3


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a `; did you mean 'x'?` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
