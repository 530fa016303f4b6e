"""P-tuning (Liu et al., arXiv 2103.10385): m embeddings in front of every row that a small network makes.

    E = W_3 relu(W_2 relu(W_1 X + b_1) + b_2) + b_3,   X (m, d), W_1 (h, d), W_2 (h, h), W_3 (d, h);
    hidden = model([E; embeddings of the row]).

The network (peft's MLP; the paper has an LSTM before it) eases training and is not needed afterwards. Virtual tokens
stand in front of the row (the paper also puts some in its middle). What crosses the wire, `share`:

    encoder      X and the network, b (m d + h d + h + h h + h + d h + d) bytes: averaged tensor by tensor
    embeddings   E alone, b m d bytes: the server averages changes of E

With `embeddings` the network is a client's means of moving E within one round, and dropped after it: from the E that it
was sent, E_0, a client trains theta in   E = E_0 + f(theta) - f(theta_0)   with theta_0 one and the same draw in every
round, at every client. So no network has to be made to fit averaged embeddings, and nothing private outlives a round.
A penalty on E (fedprox) reaches theta through E; a correction of E's gradient (scaffold) has no counterpart there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import peft
import torch
from pydantic import PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import relu
from transformers import PreTrainedModel

from fedloom import seeds
from fedloom.client.adapters import Adapter
from fedloom.client.attached import Attached, check_fit
from fedloom.client.prompt_tuning import KINDS
from fedloom.client.stack import Stack
from fedloom.client.virtual import EMBEDDINGS, AttachedVirtual, key_shape, read_virtual
from fedloom.types import ModelError, Tensors

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

INPUT = "prompt_encoder.embedding"
LAYERS = ("prompt_encoder.mlp_head.0", "prompt_encoder.mlp_head.2", "prompt_encoder.mlp_head.4")
FILE = "encoder.safetensors"
"""Beside the PEFT files: what makes the embeddings, for those who train on."""


def encoder_shapes(tokens: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of an encoder of m tokens of d numbers with h hidden ones."""
    sizes = (width, hidden, hidden, width)
    shapes: dict[str, tuple[int, ...]] = {INPUT: (tokens, width)}
    for name, (d_in, d_out) in zip(LAYERS, pairwise(sizes), strict=True):
        shapes |= {f"{name}.weight": (d_out, d_in), f"{name}.bias": (d_out,)}
    return shapes


def drawn(shapes: dict[str, tuple[int, ...]], stream: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return an encoder as torch starts one: X standard normal, weights and biases uniform in +- 1 / sqrt(inputs)."""
    # drawn in float32 whatever the dtype, so that a fp64 run starts where the fp32 run does
    start = {INPUT: torch.randn(shapes[INPUT], generator=stream)}
    for name in LAYERS:
        bound = shapes[f"{name}.weight"][1] ** -0.5
        for key in (f"{name}.weight", f"{name}.bias"):
            start[key] = (torch.rand(shapes[key], generator=stream) * 2 - 1) * bound
    return {name: t.to(dtype) for name, t in start.items()}


def encode(views: Tensors) -> Tensor:
    """Return E (K, m, d) of K clients' encoders, each tensor with a leading client axis; differentiable."""
    x = views[INPUT]
    for i, name in enumerate(LAYERS):
        x = torch.baddbmm(views[f"{name}.bias"][:, None], relu(x) if i else x, views[f"{name}.weight"].mT)
    return x


class Moved(Stack):
    """K clients' embeddings E = E_0 + f(theta) - f(theta_0), of which theta is trained."""

    def __init__(self, starts: Sequence[Tensor], theta: Tensors, like: Tensor) -> None:
        super().__init__([theta] * len(starts), like.device, torch.promote_types(like.dtype, torch.float32))
        with torch.no_grad():
            self._offset = torch.stack([start.to(self.flat) for start in starts]) - encode(self.views)

    def pack(self, tensors: Tensors, device: torch.device, dtype: torch.dtype) -> Tensor:
        if EMBEDDINGS in tensors:
            raise ModelError(
                "adapter.share=embeddings: what is added to the embeddings' gradient, or to themselves, has no place "
                "in the encoder that moves them; set adapter.share=encoder, or adapter=prompt-tuning"
            )
        return super().pack(tensors, device, dtype)

    def embeddings(self) -> Tensor:
        """Return E (K, m, d)."""
        return self._offset + encode(self.views)

    def client(self, k: int) -> dict[str, Tensor]:
        return {EMBEDDINGS: self.embeddings()[k]}

    def keep(self, clients: Sequence[int]) -> None:
        self._offset = self._offset[list(clients)]
        super().keep(clients)


class AttachedShared(AttachedVirtual):
    """Embeddings that an encoder makes, which is shared; embeddings alone can be loaded too, to answer with."""

    kinds = KINDS
    embedded: ClassVar[bool] = True

    def __init__(self, part: PTuning, model: PreTrainedModel) -> None:
        width = model.get_input_embeddings().weight.shape[1]
        self.hidden = part.hidden or width
        config = peft.PromptEncoderConfig(
            token_dim=width, num_attention_heads=model.config.num_attention_heads, encoder_hidden_size=self.hidden
        )
        super().__init__(part.part_name, model, config, (part.tokens, width))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return encoder_shapes(self.virtual, self.width, self.hidden)

    def check(self, params: Tensors) -> None:
        check_fit(params, super().shapes() if EMBEDDINGS in params else self.shapes())

    def order(self, params: Tensors) -> list[str]:
        return [EMBEDDINGS] if EMBEDDINGS in params else super().order(params)

    def init(self, seed: int, dtype: torch.dtype = torch.float32, round_: int | None = None) -> dict[str, Tensor]:
        return drawn(self.shapes(), seeds.generator(seed, round_, None, "adapter"), dtype)

    def values(self) -> Tensor:
        if self.stack is None or EMBEDDINGS in self.stack.views:
            return super().values()
        return encode(self.stack.views).to(self.like().dtype)

    def save(self, folder: Path, params: Tensors, base: str) -> None:
        if EMBEDDINGS in params:
            super().save(folder, params, base)
            return
        super().save(folder, {EMBEDDINGS: encode({name: t[None] for name, t in params.items()})[0]}, base)
        whole = {name: t.detach().cpu().contiguous() for name, t in sorted(params.items())}
        (folder / FILE).write_bytes(save(whole))

    def read(self, folder: Path) -> dict[str, Tensor]:
        super().read(folder)
        if not (folder / FILE).is_file():
            raise ModelError(
                f"{folder} holds embeddings without {FILE}, the encoder that is trained on; set "
                "adapter.share=embeddings, or adapter=prompt-tuning"
            )
        return _read_encoder(folder)


class AttachedMoved(AttachedShared):
    """Embeddings that are shared, and moved by an encoder while they are trained."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return AttachedVirtual.shapes(self)

    def init(self, seed: int, dtype: torch.dtype = torch.float32, round_: int | None = None) -> dict[str, Tensor]:
        start = drawn(self._encoder(), seeds.generator(seed, round_, None, "adapter"), dtype)
        return {EMBEDDINGS: encode({name: t[None] for name, t in start.items()})[0]}

    def load(self, clients: Sequence[Tensors], moving: Callable[[str], bool] | None = None) -> Stack:
        if moving is None or not moving(EMBEDDINGS):
            return super().load(clients, moving)
        for tensors in clients:
            self.check(tensors)
        # the same for all runs, so that E_0 is all that a client has to be told
        theta = drawn(self._encoder(), seeds.generator(0, None, None, "adapter"), torch.float32)
        stack = Moved([tensors[EMBEDDINGS] for tensors in clients], theta, self.like())
        self.bind(stack)
        return stack

    def values(self) -> Tensor:
        if isinstance(self.stack, Moved):
            return self.stack.embeddings().to(self.like().dtype)
        return super().values()

    def read(self, folder: Path) -> dict[str, Tensor]:
        return AttachedVirtual.read(self, folder)

    def _encoder(self) -> dict[str, tuple[int, ...]]:
        return encoder_shapes(self.virtual, self.width, self.hidden)


def _read_encoder(folder: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(folder / FILE)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / FILE} is not a readable safetensors file: {error}") from error
    return found


class PTuning(Adapter, name="p-tuning"):
    """P-tuning (arXiv 2103.10385): embeddings in front of every row, made by a small network that is trained."""

    stackable: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    twice: ClassVar[bool] = True

    tokens: PositiveInt = 20
    """Virtual tokens; every row becomes so much longer."""
    hidden: PositiveInt | None = None
    """Hidden size of the encoder; null: the model's."""
    share: Literal["encoder", "embeddings"] = "encoder"
    """What crosses the wire: the encoder's weights, or only the tokens x d embeddings that it ends with."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        why = recipe.algorithm.by_tensor
        if self.share == "embeddings" and why:
            yield (
                f"algorithm={recipe.algorithm.part_name} {why}, and adapter.share=embeddings trains an encoder in "
                "their place; set adapter.share=encoder, or adapter=prompt-tuning"
            )

    def attach(self, model: PreTrainedModel, reference: bool = False) -> Attached:
        key_shape(self.part_name, model)
        return AttachedShared(self, model) if self.share == "encoder" else AttachedMoved(self, model)

    def read(self, folder: Path) -> dict[str, Tensor]:
        found = read_virtual(folder, KINDS, self.part_name)
        return _read_encoder(folder) if self.share == "encoder" and (folder / FILE).is_file() else found

    @classmethod
    def from_peft(cls, saved: peft.PeftConfig) -> Adapter | None:
        if type(saved) is not peft.PromptEncoderConfig:
            return None
        # a PEFT folder has the embeddings alone, whatever was shared
        return cls(tokens=saved.num_virtual_tokens, share="embeddings")
