"""What work costs: floating-point operations, from the shapes of the model and the lengths of the rows, and seconds.

Model FLOPs: what the equations need if every row is computed alone, once and without padding. So a number tells of the
method and the data, not of how they were laid out: recomputed layers, shared beginnings, padding, the optimiser and
the unpacking of a quantised weight are not in it. A multiplication and an addition are two operations.

    linear layer, t tokens            forward 2 t d_in d_out;   backward through the frozen weight the same again
    low-rank factors of rank r        forward 2 t r (d_in + d_out);   backward twice that, or only what moves
    attention of a row of t tokens    forward 4 t^2 d,  d = heads x head size, the square in full;   backward twice that
    logits of n labels                as a linear layer on n tokens

A linear layer that is trained itself costs once more backward. Vectors, norms and embeddings cost next to nothing.
A gradient costs what a step of training does, a score its forward pass, an embedding that without logits. An answer of
a tokens to a prompt of p is a pass of p tokens and a - 1 of one token each, which attends to all before it; each of the
a tokens (the end token counts) needs one row of logits.

Nothing flows back below the first adapted layers, so what lies there has a forward pass only, and the first adapted
layers themselves need no gradient of their input. Virtual tokens (`Attached.virtual`) make every row so much longer:
for all layers, or, where their keys and values are given, for attention alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedloom import slots
from fedloom.client.adapted import Adapted
from fedloom.client.adapters import SHARED_INPUTS
from fedloom.client.attached import Attached
from fedloom.client.fit import Job
from fedloom.client.quantize import is_linear, shape
from fedloom.types import Fit, Tensors

Unit = Literal["flops", "seconds"]
UNITS: tuple[Unit, ...] = ("flops", "seconds")
Phase = Literal["fit", "gradient", "score", "embed", "generate"]
BESIDE: tuple[Phase, ...] = ("gradient", "score", "embed", "generate")
"""What clients do beside training; metrics.jsonl and summary.json have `<phase>_flops` and `<phase>_seconds` of it."""
METRICS = ("flops", "fit_seconds", *(f"{phase}_{unit}" for phase in BESIDE for unit in UNITS))
"""The names of what was spent in metrics.jsonl and summary.json; those of training come first."""

FEED_ATTENTION = (*SHARED_INPUTS[0], "qkv_proj", "c_attn", "query_key_value")
"""Names of the layers that attention stands behind."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the operations of a model depend on.

    Attributes:
        forward, through: weights of all linear layers, and of those that a gradient passes through.
        head: weights of the output embeddings.
        attention, back: heads x head size, summed over the layers, and over those that a gradient passes through.
        edge: adapted modules whose input needs no gradient.
        own: live name -> numbers of the linear layers' weights that are trained themselves.  own_head: of the output
            embeddings' weight, empty where it is frozen.
        virtual: tokens before every row.  embedded: whether they go through the layers as others do.
    """

    forward: int
    through: int
    head: int
    attention: int
    back: int
    edge: frozenset[str]
    own: Mapping[str, int] = field(default_factory=dict)
    own_head: str = ""
    virtual: int = 0
    embedded: bool = False


@dataclass(slots=True)
class Spent:
    """What somebody's effects have cost.

    Attributes:
        flops, seconds: phase -> operations, and time by the clock, of those phases that there were.
    """

    flops: dict[Phase, float] = field(default_factory=dict)
    seconds: dict[Phase, float] = field(default_factory=dict)

    def add(self, phase: Phase, flops: float, seconds: float) -> None:
        """Book one effect."""
        self.flops[phase] = self.flops.get(phase, 0.0) + flops
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        """Return it by the names of metrics.jsonl; training is always there, other phases where there were some."""
        found = {"flops": self.flops.get("fit", 0.0), "fit_seconds": self.seconds.get("fit", 0.0)}
        for phase in BESIDE:
            if phase in self.flops:
                found |= {f"{phase}_flops": self.flops[phase], f"{phase}_seconds": self.seconds[phase]}
        return found


def beside(known: Mapping[str, Any], unit: Unit) -> float | None:
    """Return what all of `BESIDE` cost by a summary.json, or None where it does not tell."""
    names = [f"{phase}_{unit}" for phase in BESIDE]
    return float(sum(known[name] for name in names)) if all(name in known for name in names) else None


def shapes_of(model: PreTrainedModel, attached: Attached) -> Shapes:
    """Read the shapes of a resident model with its adapter."""
    head = model.get_output_embeddings()
    sizes = {name: _weights(one) for name, one in _linears(model) if one is not head}
    first = next((name for name in sizes if name in attached.layers), "")
    edge = {name for name in sizes if name == first or _share_input(name, first)}
    edge = edge if getattr(attached.layers.get(first), "edge", True) else set()
    later = list(sizes)[list(sizes).index(first) :] if first else []
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers, width = config.num_hidden_layers, width * config.num_attention_heads
    if attached.virtual:
        through = sum(size for name, size in sizes.items() if not _feeds_first(name))
        whole = sum(sizes.values()), through, _weights(head), layers * width, layers * width
        return Shapes(*whole, frozenset(), virtual=attached.virtual, embedded=attached.embedded)
    if attached.whole:
        own = {f"{name}.weight": size for name, size in sizes.items()}
        weight = head.weight if head is not None else None
        own_head = next((name for name, p in model.named_parameters() if p is weight), "")
        whole = sum(sizes.values()), sum(sizes.values()), _weights(head), layers * width, layers * width
        return Shapes(*whole, frozenset(), own, own_head)
    return Shapes(
        forward=sum(sizes.values()),
        through=sum(sizes[name] for name in later if name not in edge),
        head=_weights(head),
        attention=layers * width,
        back=max(0, layers - _still(first)) * width,
        edge=frozenset(edge),
    )


def of_fit(shapes: Shapes, job: Job) -> float:
    """Return the operations of a client's fit, from the rows of the steps that it took."""
    rows = np.array([row for step in job.steps[: job.taken] for row in step], dtype=np.int64)
    lengths = np.array(job.lengths, dtype=np.int64)[rows]
    labels = np.array(job.rows.labels(), dtype=np.int64)[rows]
    return of_rows(shapes, job.effect, lengths.tolist(), labels.tolist())


def of_rows(shapes: Shapes, effect: Fit, lengths: Sequence[int], labels: Sequence[int]) -> float:
    """Return the operations of training on some rows.

    Args:
        shapes: of the model.
        effect: what was fitted, and how.
        lengths, labels: tokens and labels of every row that was trained on, again each time it was.
    """
    _, back = _low_rank(shapes.edge, effect.start, effect.trainable)
    moves = effect.trainable or (lambda name: True)
    back += sum(size for name, size in shapes.own.items() if moves(name))
    tokens, squares = _sizes(shapes, lengths)
    logits = 2.0 * sum(labels) * shapes.head
    forward = of_pass(shapes, effect.start, lengths, labels)
    if effect.order == "zeroth":
        return 2 * forward
    own_head = logits if shapes.own_head and moves(shapes.own_head) else 0.0
    return forward + 2.0 * tokens * (shapes.through + back) + 8.0 * squares * shapes.back + logits + own_head


def of_pass(shapes: Shapes, params: Tensors | None, lengths: Sequence[int], labels: Sequence[int] = ()) -> float:
    """Return the operations of reading some rows without gradients.

    Args:
        shapes: of the model.  params: the adapter; None: the base alone.
        lengths: tokens of every row.  labels: positions of every row whose logits are needed.
    """
    plain = shapes if params is not None else replace(shapes, virtual=0)
    tokens, squares = _sizes(plain, lengths)
    return _forward(plain, params, tokens, squares, sum(labels))


def of_answers(shapes: Shapes, params: Tensors | None, answers: Iterable[tuple[int, int]]) -> float:
    """Return the operations of answering prompts.

    Args:
        shapes, params: as for `of_pass`.  answers: tokens of each prompt, and how many were chosen behind it.
    """
    made = [(prompt, chosen) for prompt, chosen in answers if chosen]
    more = shapes.virtual if params is not None else 0
    # the token after k others in the answer sees the prompt, these and itself
    squares = sum((a - 1) * (p + more) + a * (a - 1) // 2 for p, a in made)
    begun = of_pass(shapes, params, [p for p, _ in made], [1] * len(made))
    further = sum(a - 1 for _, a in made)
    return begun + _forward(shapes, params, further, squares, further)


@contextmanager
def counting(
    model: PreTrainedModel, shapes: Shapes, params: Tensors | None, tell: Callable[[float], None]
) -> Iterator[None]:
    """Tell the operations of every forward pass within the context, for work whose rows are not known: as it is laid
    out, so with padding, and with logits for as many positions as the pass returns.

    Args:
        model, shapes, params: as for `of_pass`.  tell: receives the operations of a pass.
    """
    more = shapes.virtual if params is not None else 0

    def told(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        (rows, tokens), cache = ids.shape, output.get("past_key_values")
        seen = max(tokens, cache.get_seq_length()) if cache is not None else tokens
        labels = rows * output.logits.shape[1]
        tell(_forward(shapes, params, rows * tokens, rows * tokens * (seen + more), labels))

    hook = model.register_forward_hook(told, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _sizes(shapes: Shapes, lengths: Sequence[int]) -> tuple[int, int]:
    """Return how many tokens rows have in the layers, and how many pairs of tokens in attention."""
    more, read = shapes.virtual, shapes.virtual if shapes.embedded else 0
    return sum(n + read for n in lengths), sum(n * (n + more) + read * more for n in lengths)


def _forward(shapes: Shapes, params: Tensors | None, tokens: int, squares: int, labels: int) -> float:
    low = _low_rank(shapes.edge, params, None)[0] if params is not None else 0
    return 2.0 * tokens * (shapes.forward + low) + 4.0 * squares * shapes.attention + 2.0 * labels * shapes.head


def _low_rank(edge: frozenset[str], start: Tensors, moves: Callable[[str], bool] | None) -> tuple[int, int]:
    """Return the multiplications of a token with the factors, forward and backward; other tensors cost next to none."""
    forward = backward = 0
    for name, tensor in start.items():
        module, _, kind = slots.plain(name).rpartition(".")
        if kind not in ("lora_A", "lora_B", "lora_R"):
            continue
        forward += tensor.numel()
        # a factor costs once for its own gradient and once to pass the gradient on
        backward += tensor.numel() * ((moves is None or moves(name)) + (kind != "lora_A" or module not in edge))
    return forward, backward


def _linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the linear layers in the model's order, those under an adapter's layer by the name of that layer."""
    inside = {id(one.base) for one in model.modules() if isinstance(one, Adapted)}
    return [
        (name, one)
        for name, one in model.named_modules()
        if isinstance(one, Adapted) or ((is_linear(one) or isinstance(one, Conv1D)) and id(one) not in inside)
    ]


def _weights(layer: nn.Module | None) -> int:
    if layer is None:
        return 0
    rows, columns = (layer.d_out, layer.d_in) if isinstance(layer, Adapted) else _shape(layer)
    return rows * columns


def _shape(layer: nn.Module) -> Sequence[int]:
    return tuple(layer.weight.shape) if isinstance(layer, Conv1D) else shape(layer)


def _feeds_first(name: str) -> bool:
    """Return whether attention of the first layer stands behind a module."""
    return _still(name) == 0


def _still(first: str) -> int:
    """Return how many layers' attention lies below the first adapted module."""
    numbers = [int(part) for part in first.split(".") if part.isdigit()]
    return (numbers[0] if numbers else 0) + (first.rpartition(".")[2] not in FEED_ATTENTION)


def _share_input(a: str, b: str) -> bool:
    parent, _, one = a.rpartition(".")
    other, _, two = b.rpartition(".")
    return parent == other and any(one in group and two in group for group in SHARED_INPUTS)


def human_flops(count: float) -> str:
    """Return a number of operations for people, such as 3.2 TFLOP."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} EFLOP"
