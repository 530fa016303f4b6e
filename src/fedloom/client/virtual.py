"""Virtual tokens in front of every row: what prompt tuning, p-tuning and prefix tuning have in common.

A causal model's layers see of m virtual tokens nothing but their keys and values. So a pass is given these, for every
layer, as if they were the beginning of its cache (Front), in training as in generation: rows need no tokens more, and
there is no output to cut away. Real tokens stand at positions m, m + 1, ... Keys and values are parameters (prefix
tuning), or what the model itself computes for m embeddings (prompt tuning, p-tuning), once a client and pass.

Whoever calls the model does not know: a cache of the caller holds real tokens alone, and so do its mask and positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import peft
import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoTokenizer, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from fedloom.client.adapted import Owners
from fedloom.client.attached import Attached
from fedloom.client.attention import NAME, small
from fedloom.client.batches import Piece, Pieces
from fedloom.client.bundled import reading
from fedloom.client.peft_files import load_peft
from fedloom.client.prompts import plain
from fedloom.client.stack import Stack
from fedloom.types import ModelError, Tensors

EMBEDDINGS = "prompt_embeddings"
"""The name under which peft saves virtual tokens, whatever their kind."""
TOLERANCE = 1e-4
"""Of the trial of a model: wrong positions make 30 times as much and more, rounding in float32 a hundredth."""

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values of one layer, (rows or clients, key heads, tokens, head size) each."""


class Front(Cache):  # type: ignore[misc]
    """The keys and values of virtual tokens, followed by those of a caller's cache, if there is one."""

    def __init__(self, pairs: Sequence[Pair], own: Cache | None) -> None:
        super().__init__(layers=[_Fronted(pair, own, i) for i, pair in enumerate(pairs)])


class _Fronted(DynamicLayer):  # type: ignore[misc]
    def __init__(self, pair: Pair, own: Cache | None, index: int) -> None:
        super().__init__()
        (self.keys, self.values), self.own, self.index = pair, own, index
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Return all keys and values; a cache of the caller keeps the new ones."""
        if self.own is not None:
            key_states, value_states = self.own.update(key_states, value_states, self.index)
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        real = self.own.get_mask_sizes(query_length, self.index)[0] if self.own is not None else query_length
        return int(self.keys.shape[-2]) + real, 0

    def get_seq_length(self) -> int:
        return int(self.keys.shape[-2]) + (self.own.get_seq_length(self.index) if self.own is not None else 0)


class _Seen(DynamicLayer):  # type: ignore[misc]
    """Notes the keys and values of a pass; the same again, when a checkpointed layer is recomputed, changes nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        if not self.get_seq_length():
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        return key_states, value_states


class Backbone:
    """The backbone of a resident model, with virtual tokens in front of all that it reads.

    Attributes:
        layers: how many layers of keys and values it has.  tokens: virtual ones of each client.
        pairs: gives the keys and values of the K clients' virtual tokens, layer by layer; None: there are none.
        owners: whose rows a pass holds.
    """

    def __init__(self, model: PreTrainedModel, tokens: int, owners: Owners) -> None:
        self.module, self.config, self.owners = model.get_decoder(), model.config.get_text_config(), owners
        self.tokens = tokens
        self.plain: Callable[..., Any] = self.module.forward
        self.layers = int(self.config.num_hidden_layers)
        self.pairs: Callable[[], list[Pair]] | None = None
        self._kept: list[Pair] | None = None
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                # a layer that is computed again reads the same virtual tokens, and adds nothing to any cache
                layer._can_checkpoint_with_cache = True
        self.module.forward = self.forward

    def forget(self) -> None:
        """Make the keys and values anew when they are needed next: what they are made of has changed."""
        self._kept = None

    def forward(self, input_ids: Tensor | None = None, **given: Any) -> Any:
        """Run the backbone as its own forward would, behind the virtual tokens."""
        if self.pairs is None:
            return self.plain(input_ids, **given)
        rows, width = (input_ids if input_ids is not None else given["inputs_embeds"]).shape[:2]
        own, wanted = given.get("past_key_values"), given.get("use_cache")
        if own is None and (self.config.use_cache if wanted is None else wanted):
            own = DynamicCache(config=self.config)
        lay = self._in_one_row if given.get("pieces") is not None else self._by_rows
        pairs = [(lay(keys, rows, width), lay(values, rows, width)) for keys, values in self._pairs(own is not None)]
        mask, positions, tokens = given.get("attention_mask"), given.get("position_ids"), self.tokens
        if mask is not None:
            if mask.dim() != 2:
                raise ModelError("virtual tokens need a mask of rows x tokens, and this caller gave one of queries")
            mask = torch.cat([mask.new_ones(rows, tokens), mask], 1)
        if positions is None:
            seen = own.get_seq_length() if own is not None else 0
            positions = torch.arange(seen, seen + width, device=pairs[0][0].device)[None]
        changed = {"attention_mask": mask, "position_ids": positions + tokens, "use_cache": False}
        out = self.plain(input_ids, **{**given, **changed, "past_key_values": Front(pairs, own)})
        out.past_key_values = own
        return out

    def pairs_of(self, embeddings: Tensor) -> list[Pair]:
        """Return the keys and values that the backbone computes for (K, m, d) embeddings, layer by layer."""
        cache, (clients, tokens) = Cache(layers=[_Seen() for _ in range(self.layers)]), embeddings.shape[:2]
        positions = torch.arange(tokens, device=embeddings.device)[None]
        if self.config._attn_implementation != NAME:
            self.plain(inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=False)
            return [(layer.keys, layer.values) for layer in cache.layers]
        # within `by_piece` the model attends to packed rows alone
        pieces = Pieces(tuple(Piece(k * tokens, tokens, client=k) for k in range(clients)), clients)
        self.plain(
            inputs_embeds=embeddings.flatten(0, 1)[None],
            position_ids=positions.repeat(1, clients),
            past_key_values=cache,
            use_cache=False,
            pieces=pieces,
        )
        cut = [[t[0].unflatten(1, (clients, tokens)).transpose(0, 1) for t in (x.keys, x.values)] for x in cache.layers]
        return [(keys, values) for keys, values in cut]

    def _pairs(self, cached: bool) -> list[Pair]:
        """Return the clients' keys and values; token by token of an answer, they are those of the first."""
        if self.pairs is None:
            raise TypeError("there are no virtual tokens")
        if not cached or torch.is_grad_enabled():
            return self.pairs()
        if self._kept is None:
            self._kept = self.pairs()
        return self._kept

    def _by_rows(self, given: Tensor, rows: int, width: int) -> Tensor:
        """Give each row what its client has, of (K, heads, m, d): rows of a pass belong to clients in runs."""
        clients = len(given)
        if clients == 1:
            return given.expand(rows, -1, -1, -1)
        counts = torch.tensor(self.owners.tokens or [rows * width // clients] * clients) // width
        return given[torch.arange(clients).repeat_interleave(counts).to(given.device)]

    @staticmethod
    def _in_one_row(given: Tensor, rows: int, width: int) -> Tensor:
        """Put what the clients have side by side, as `attention.attend` looks for it in a packed row."""
        return given.transpose(0, 1).flatten(1, 2)[None]


def key_shape(adapter: str, model: PreTrainedModel) -> tuple[int, int]:
    """Return (key heads, head size) of a model's layers, after it was tried out whether virtual tokens work in it.

    The trial is on a model of the same architecture with few layers and random float32 weights: a row must get the
    same hidden states whole, and behind the keys and values that its own beginning has.

    Args:
        adapter: name of the part, for the message.

    Raises:
        ModelError: they do not.
    """
    kind, advice = f"{model.name_or_path}, a {model.config.model_type} model,", "set adapter=lora"
    if model.config.is_encoder_decoder:
        raise ModelError(f"adapter={adapter}: {kind} has an encoder, and virtual tokens are for decoders; {advice}")
    if not plain(DynamicCache(config=model.config)):
        raise ModelError(
            f"adapter={adapter}: {kind} has layers that do not see every earlier token (sliding windows, recurrent or "
            f"linear attention), so virtual tokens would go out of sight; {advice}"
        )
    if "inputs_embeds" not in inspect.signature(model.get_decoder().forward).parameters:
        raise ModelError(f"adapter={adapter}: {kind} takes no embeddings as input; {advice}")
    try:
        error, shapes = _trial(model)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as problem:
        raise ModelError(
            f"adapter={adapter}: {kind} takes no keys and values of tokens that it did not read ({problem}); {advice}"
        ) from problem
    if not error <= TOLERANCE or len(shapes) != 1:
        why = "has layers of different key sizes" if len(shapes) != 1 else "computes otherwise behind virtual tokens"
        raise ModelError(f"adapter={adapter}: {kind} {why}; {advice}")
    return next(iter(shapes))


@torch.no_grad()
def _trial(model: PreTrainedModel) -> tuple[float, set[tuple[int, int]]]:
    """Return the relative error of hidden states, and the (key heads, head size) that layers have."""
    tried = small(model)
    backbone, ids = Backbone(tried, 5, Owners()), torch.arange(3, 14)[None]
    whole = _ends(tried, ids)
    front = backbone.pairs_of(tried.get_input_embeddings()(ids[:, :5]))
    backbone.pairs = lambda: front
    behind = _ends(tried, ids[:, 5:])
    if any(keys.shape[2] != 5 for keys, _ in front):
        raise ValueError("its layers do not tell their keys")
    shapes = {(int(t.shape[1]), int(t.shape[3])) for pair in front for t in pair}
    errors = [(a - b).abs().max() / a.abs().max() for a, b in zip(whole, behind, strict=True)]
    return float(max(errors)), shapes


def _ends(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last hidden states and logits of six tokens, by both ways into a model."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[0, -6:], model(input_ids=ids, use_cache=False).logits[0, -6:]


class AttachedVirtual(Attached):
    """Virtual tokens in one resident model, as one tensor `prompt_embeddings`, which is how peft saves them.

    Attributes:
        adapter: name of the part.
        config: the peft configuration that describes them.
        width: numbers of one virtual token.
    """

    kinds: ClassVar[frozenset[peft.PeftType]]
    """Of PEFT folders whose numbers mean the same here."""

    def __init__(
        self, adapter: str, model: PreTrainedModel, config: peft.PromptLearningConfig, shape: tuple[int, int]
    ) -> None:
        self.adapter, self.model, self.config = adapter, model, config
        (self.virtual, self.width), self.owners = shape, Owners()
        self.layers = {n: one for n, one in model.named_modules() if isinstance(one, GradientCheckpointingLayer)}
        self.backbone = Backbone(model, self.virtual, self.owners)
        self.stack: Stack | None = None
        config.num_virtual_tokens, config.task_type = self.virtual, peft.TaskType.CAUSAL_LM
        config.num_transformer_submodules, config.num_layers = 1, self.backbone.layers

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {EMBEDDINGS: (self.virtual, self.width)}

    def like(self) -> Tensor:
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    def bind(self, stack: Stack) -> None:
        self.stack = stack
        self.backbone.pairs = self.pairs
        self.backbone.forget()

    def values(self) -> Tensor:
        """Return `prompt_embeddings` of the clients that are in the layers, (K, m, width), in the model's dtype."""
        if self.stack is None:
            raise TypeError("no virtual tokens are loaded")
        return self.stack.views[EMBEDDINGS].to(self.like().dtype)

    def pairs(self) -> list[Pair]:
        """Return the keys and values of each client's virtual tokens, layer by layer."""
        return self.backbone.pairs_of(self.values())

    @contextmanager
    def off(self) -> Iterator[None]:
        before = self.backbone.pairs
        self.backbone.pairs = None
        try:
            yield
        finally:
            self.backbone.pairs = before

    def merged(self, model: PreTrainedModel, params: Tensors) -> dict[str, Tensor]:
        raise ModelError(
            f"adapter={self.adapter}: virtual tokens are no change of the model's weights, so there is no merged "
            "model; export with --to adapter"
        )

    def save(self, folder: Path, params: Tensors, base: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        saved = {EMBEDDINGS: params[EMBEDDINGS].detach().cpu().contiguous()}
        (folder / "adapter_model.safetensors").write_bytes(save(saved, metadata={"format": "pt"}))
        self.config.base_model_name_or_path, self.config.inference_mode = base, True
        self.config.save_pretrained(str(folder))

    def read(self, folder: Path) -> dict[str, Tensor]:
        found = read_virtual(folder, self.kinds, self.adapter)
        if len(found[EMBEDDINGS]) != self.virtual:
            raise ModelError(
                f"{folder} holds {len(found[EMBEDDINGS])} virtual tokens and the recipe has {self.virtual}; set "
                f"adapter.tokens={len(found[EMBEDDINGS])}"
            )
        return found

    def words(self, text: str | None, stream: torch.Generator) -> Tensor:
        """Return m rows of the embedding table (m, d), in float32 at least: of a text, or drawn (None).

        A text is cut, or said again and again, until it has m tokens.

        Raises:
            ModelError: the text has no tokens, or the model's tokenizer cannot be read.
        """
        table = self.like()
        ids = torch.randint(len(table), (self.virtual,), generator=stream) if text is None else self._tokens(text)
        return table.detach()[ids.to(table.device)].to(torch.promote_types(table.dtype, torch.float32)).cpu()

    def _tokens(self, text: str) -> Tensor:
        with reading(f"adapter.text: the tokenizer of {self.model.name_or_path} cannot be read"):
            tokenizer = AutoTokenizer.from_pretrained(self.model.name_or_path)
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not own:
            raise ModelError("adapter.text has no tokens; give it a text such as 'Answer with the result only.'")
        return torch.tensor((own * -(-self.virtual // len(own)))[: self.virtual])


def read_virtual(folder: Path, kinds: frozenset[peft.PeftType], adapter: str) -> dict[str, Tensor]:
    """Read `prompt_embeddings` of a PEFT folder.

    Args:
        kinds: that its numbers may be of.  adapter: name of the part, for the message.

    Raises:
        ModelError: the folder holds no safetensors adapter, or one of another kind.
    """
    params = load_peft(folder)
    kind = peft.PeftConfig.from_pretrained(str(folder)).peft_type
    if kind not in kinds or set(params) != {EMBEDDINGS}:
        raise ModelError(f"{folder} holds an adapter of kind {kind}, which adapter={adapter} cannot take")
    return params
