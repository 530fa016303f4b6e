"""The contract of an evaluator: from a view of one regime to metrics and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

from pydantic import NonNegativeInt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedloom.client.generate import GREEDY, Decoding
from fedloom.client.likelihood import Likelihood
from fedloom.data.rows import Turn
from fedloom.parts import Part
from fedloom.types import Bundle, Pair, Split, Tensors


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated answer and its score.

    Attributes:
        score: its contribution to the evaluator's primary metric; None where it could not be judged, and is in no
            metric. Over one adapter the primary metric is the mean over strata of the mean over items of the mean over
            an item's samples of it.
        verdict: why it has its score, where there is more to tell.
        stratum: the category, task or subject whose mean counts once; "" where all items count alike.
    """

    id: str
    prompt: str
    output: str
    extracted: str | None
    reference: str
    score: float | None
    verdict: str = ""
    stratum: str = ""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one evaluator found in one regime.

    Attributes:
        metrics: name -> value over all items, as reported.
        clients: client -> the same metrics for that client; empty where there is one model and one test set.
        weights: client -> its weight in the primary metric's mean over clients; empty: all count alike.
        samples: (client or None, sample) pairs.
        invalid: number of items or clients whose loss was not finite; they are in no metric.
        settings: what the figures depend on beside the evaluator's own knobs and `View.settings`; JSON values.
        not_run: why it could not measure all that was asked for, or ""; metrics that are there hold for the rest.
        notes: what a person should know about the figures.
    """

    metrics: Mapping[str, float]
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: Sequence[tuple[str | None, Sample]] = ()
    invalid: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    not_run: str = ""
    notes: Sequence[str] = ()
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Own:
    """The adapter that a client would use, found out where it is needed, so that one exists at a time."""

    client: str


Using: TypeAlias = Tensors | Own | None
"""With what a model answers: an adapter, that of a client, or none."""


class View(Protocol):
    """What an evaluator may look at: one regime's adapters, and the rows of its clients as sums only."""

    @property
    def seed(self) -> int:
        """The recipe's seed."""
        ...

    @property
    def split(self) -> Split:
        """`validation` in the course of a run, `test` at its end."""
        ...

    @property
    def adapters(self) -> Mapping[str | None, Using]:
        """Client -> its adapter, or None -> the one of all; the adapter None is the untouched base."""
        ...

    def own_rows(self) -> Mapping[str, Sequence[Pair]]:
        """Return client -> its own rows of `split` as pairs; clients without any are left out."""
        ...

    def losses(self) -> Mapping[str, Bundle]:
        """Return client -> loss sums (nll, tokens, bytes, examples) on its own rows of `split`."""
        ...

    def prompts(self, conversations: Sequence[Sequence[Turn]]) -> list[str]:
        """Render conversations with the training template and system prompt, up to where the assistant answers."""
        ...

    def texts(self, texts: Sequence[str]) -> list[str]:
        """Return bare texts as the model expects them to begin: behind bos where its tokenizer adds one."""
        ...

    def generate(
        self, params: Using, prompts: Sequence[str], max_new_tokens: int, decoding: Decoding = GREEDY
    ) -> list[str]:
        """Return answers, in the order of `prompts`; equal prompts are sampled apart."""
        ...

    def likelihoods(self, params: Using, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Return how likely each continuation is after its context; give pairs that begin alike in one call."""
        ...

    def model(self, params: Using) -> AbstractContextManager[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """Lend the resident model, with the adapter in its layers while the context lasts, and its tokenizer."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Return what answers and likelihoods depend on beside prompts and adapter: engine, dtype, batch, versions."""
        ...


class Evaluator(Part, family=True):
    """Measures a regime."""

    primary: ClassVar[str] = "loss"
    """The metric by which early stop and the best checkpoint judge."""
    higher_is_better: ClassVar[bool] = False
    """The direction of every metric of this evaluator."""
    judges: ClassVar[bool] = True
    """Whether best checkpoint and early stop may judge by it: in the course of a run it sees no items of the end."""
    own_rows: ClassVar[bool] = False
    """Whether it measures clients on their own rows, so that clients kept out of training can be measured apart."""

    every: NonNegativeInt = 0
    """Rounds between evaluations on validation data in the course of the run; 0: only at the end, on test data."""

    def check(self, seed: int) -> None:
        """Refuse what can be known to fail in the course of a run, where `every` asks for validation data.

        Raises:
            DataError: no validation items can be had.
        """

    def evaluate(self, view: View) -> Evaluation:
        """Measure one regime."""
        raise NotImplementedError
