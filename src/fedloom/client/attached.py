"""What an adapter is once it is in a resident model: the names and shapes of its tensors, and the way to set them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedloom.client.adapted import Owners, Spans
from fedloom.client.stack import Stack
from fedloom.types import Merge, ModelError, Penalty, ServerState, Tensors


class Attached:
    """An adapter in one resident model.

    Attributes:
        layers: live module name -> the layer that computes with the adapter, in the model's order.
        owners: whose tokens the layers see.
    """

    packs: ClassVar[bool] = True
    """Whether rows may lie side by side without padding (`trainer.packing`)."""
    drops: bool = False
    """Whether it drops inputs while training, so that equal tokens of different rows differ."""
    whole: ClassVar[bool] = False
    """Whether it is all of the model's weights, so that a run leaves `merged/` and no PEFT folder."""
    penalty: Penalty | None = None
    """What its own method adds to every client's loss."""
    virtual: int = 0
    """Tokens that come before every row, which nobody who calls the model knows of."""
    embedded: ClassVar[bool] = False
    """Whether virtual tokens go through the layers as others do, or have given keys and values."""

    layers: Mapping[str, Any]
    owners: Owners

    def rebase(self, log: Sequence[Merge]) -> None:
        """Let the frozen base be the untouched one plus the merges of a base log, whatever it was before.

        Raises:
            ModelError: the adapter cannot take merges.
        """
        if log:
            raise ModelError("the base of this adapter takes no merges; set adapter=lora")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor, in the model's order."""
        raise NotImplementedError

    def moves(self, name: str) -> bool:
        """Return whether a tensor is trained unless an algorithm says what is."""
        return True

    def check(self, params: Tensors) -> None:
        """Raise ModelError unless the layers can take an adapter: the names and shapes of `shapes()`."""
        check_fit(params, self.shapes())

    def init(self, seed: int, dtype: torch.dtype = torch.float32, round_: int | None = None) -> dict[str, Tensor]:
        """Return the starting point, drawn from our own stream.

        Args:
            round_: draws an adapter for one round; None: the one that the run starts from.
        """
        raise NotImplementedError

    def load(self, clients: Sequence[Tensors], moving: Callable[[str], bool] | None = None) -> Stack:
        """Put the weights of K clients into the layers, stacked.

        Args:
            clients: one name -> tensor map a client, names as in `shapes()`.
            moving: which names will be trained; None: all.

        Returns:
            Their tensors in one buffer, on the layers' device, in at least float32.

        Raises:
            ModelError: names or shapes do not fit this adapter.
        """
        for tensors in clients:
            self.check(tensors)
        like = self.like()
        # in the model's order, whatever the order of the message, as sums such as a norm depend on it
        ordered = [{name: tensors[name] for name in self.order(tensors)} for tensors in clients]
        stack = Stack(ordered, like.device, torch.promote_types(like.dtype, torch.float32), moving)
        self.bind(stack)
        return stack

    def order(self, params: Tensors) -> list[str]:
        """Return the names of an adapter's tensors in the model's order."""
        return [name for name in self.shapes() if name in params]

    def governed(self, before: ServerState, after: ServerState, rounds: int) -> ServerState:
        """Return the state after a round with what the adapter's own method does to it at the server.

        Args:
            before: the state that was sent.  after: with the step of the algorithm taken.  rounds: of the whole run.
        """
        return after

    def like(self) -> Tensor:
        """Return a weight that gives the device and dtype that the layers compute in."""
        raise NotImplementedError

    def bind(self, stack: Stack) -> None:
        """Let the layers compute with what is in the stack now."""
        raise NotImplementedError

    @contextmanager
    def owned(self, tokens: Spans) -> Iterator[None]:
        """Within the context a pass holds `tokens[k]` tokens of client k, client after client."""
        self.owners.tokens = tokens
        try:
            yield
        finally:
            self.owners.tokens = None

    def off(self) -> AbstractContextManager[None]:
        """Within the context the model computes as the untouched base."""
        raise NotImplementedError

    def dropout(self, streams: Sequence[torch.Generator]) -> AbstractContextManager[None]:
        """Within the context the layers drop inputs, client k's rows by `streams[k]`; outside they never do."""
        return nullcontext()

    def merged(self, model: PreTrainedModel, params: Tensors) -> dict[str, Tensor]:
        """Return the state dict of the plain model with the adapter added to its weights, in the base's dtype.

        Args:
            model: the resident model that the layers are in.
            params: the adapter, names as in `shapes()`.

        Raises:
            ModelError: the adapter is no change of the model's weights.
        """
        raise NotImplementedError

    def save(self, folder: Path, params: Tensors, base: str) -> None:
        """Write an adapter as a PEFT folder, with `adapter_model.safetensors`.

        Args:
            base: name of the base model, written into the adapter's configuration.
        """
        raise NotImplementedError

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Read what `save` wrote, under its live names.

        Raises:
            ModelError: the folder holds no such adapter, or one whose numbers would mean something else here.
        """
        raise NotImplementedError


def check_fit(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], any_rank: bool = False) -> None:
    """Raise ModelError unless `tensors` has the names and shapes of `shapes` (`any_rank`: but for LoRA ranks)."""
    if any_rank:
        shapes = {name: _with_rank(name, shape, tensors) for name, shape in shapes.items()}
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    wrong = [n for n in shapes if n in tensors and tuple(tensors[n].shape) != tuple(shapes[n])]
    if not (missing or extra or wrong):
        return
    lines = [f"missing {len(missing)}, such as {missing[0]}"] if missing else []
    lines += [f"unexpected {len(extra)}, such as {extra[0]}"] if extra else []
    lines += [f"{n} has shape {tuple(tensors[n].shape)}, expected {tuple(shapes[n])}" for n in wrong[:3]]
    raise ModelError("the adapter's tensors do not fit the model: " + "; ".join(lines))


def _with_rank(name: str, shape: tuple[int, ...], tensors: Tensors) -> tuple[int, ...]:
    """Return the shape with the rank of the tensors' own A."""
    module, _, factor = name.rpartition(".")
    a = tensors.get(f"{module}.lora_A")
    if factor not in ("lora_A", "lora_B") or a is None or a.dim() != 2 or not len(a):
        return shape
    return (len(a), shape[1]) if factor == "lora_A" else (shape[0], len(a))
