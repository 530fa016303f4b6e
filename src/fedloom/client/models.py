"""Base models: where their files come from, how they are loaded, and their forward in two halves.

The halves are `hidden_states` (the backbone) and `logits` (the output embedding), so that a training loop builds logits
only where there is a label. `load_model` checks on every model that the two together are the model's own forward.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema, PydanticCustomError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedloom.client import quantize as quantizing
from fedloom.client.bundled import Notify, Place, ignore, locate, read_config, reading
from fedloom.client.identity import Base, identify
from fedloom.client.quantize import Quantize
from fedloom.home import cpu_bf16, devices
from fedloom.parts import Record
from fedloom.types import ModelError, RecipeError, suggest
from fedloom.units import human_bytes

Dtype = Literal["auto", "bf16", "fp16", "fp32", "fp64"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


class Model(Record):
    """The base model that all clients fine-tune; a bare name equals `{name: ...}`."""

    name: str = Field(min_length=1)
    """`smollm2-135m` (bundled), a hub id, a local folder, or a GGUF file."""
    dtype: Dtype = "auto"
    """Of the base weights; auto: bf16 on GPUs and on CPUs with AMX or AVX512-BF16, else fp32."""
    quantize: Quantize = "none"
    """Keep the linear layers, all but the output head, in 4 bits (nf4, as QLoRA does) or 8 (int8); null: none."""
    attention: Attention = "auto"
    """Attention kernels; auto: sdpa where the model supports it, else eager."""
    compile: bool = False
    """Compile the decoder layers (torch.compile): on CPUs it needs a C++ compiler; the first steps take longer."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:N or mps."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model; needed by architectures unknown to transformers."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit found is kept in the resolved recipe."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("quantize", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        return "none" if value is None else value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            hint = suggest(value, ("auto", "cpu", "cuda", "mps"))
            message = "no device is named '{value}'{hint} (allowed: auto, cpu, cuda, cuda:N, mps)"
            raise PydanticCustomError("device", message, {"value": value, "hint": hint})
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(schema)]}

    def resolved(self, notify: Notify = ignore) -> Model:
        """Return the same model with every `auto` replaced by what this machine and this model call for.

        Args:
            notify: is told of anything that takes long, such as the one-time conversion of a GGUF file.

        Raises:
            ModelError: the model cannot be found or read.
            RecipeError: a device, dtype, attention or quantisation is not available here.
        """
        return _resolve(self, notify).spec


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready for use: frozen, in evaluation mode, on its device.

    Attributes:
        parameters: how many numbers the model holds, tied weights once, quantised ones like others.
        source: where it came from, in one line.
        spec: the resolved record that loads it again.
        base: what tells it apart from other models.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    parameters: int
    source: str
    spec: Model
    base: Base


@dataclass(frozen=True, slots=True)
class _Resolved:
    spec: Model
    place: Place
    config: PretrainedConfig


def load_tokenizer(spec: Model, notify: Notify = ignore) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer without touching its weights (but a GGUF file is converted once as a whole).

    Args:
        spec: the model.
        notify: as in `Model.resolved`.

    Raises:
        ModelError: the model or its tokenizer cannot be found or read, or has no end token.
    """
    return _read_tokenizer(_locate(spec, notify, weights=False), spec)


def load_model(spec: Model, notify: Notify = ignore) -> Loaded:
    """Return the model, frozen and in evaluation mode, with its tokenizer.

    Args:
        spec: the model; what is `auto` in it is chosen here.
        notify: as in `Model.resolved`.

    Raises:
        ModelError: the model cannot be found or read, its files do not fit together, its weights are pickle, or its
            forward is more than `logits` of `hidden_states`.
        RecipeError: a device, dtype, attention or quantisation is not available here.
    """
    resolved = _resolve(spec, notify)
    tokenizer = _read_tokenizer(resolved.place, spec)
    model = _read_weights(resolved, notify).requires_grad_(False).eval()
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"{resolved.place.source}: the tokenizer has {len(tokenizer)} tokens but the model embeds only {rows}; "
            f"use the tokenizer that the model was trained with"
        )
    _check_halves(model, resolved.place.source)
    place, base = resolved.place, identify(spec.name, resolved.place.folder)
    return Loaded(model, tokenizer, quantizing.count(model), place.source, resolved.spec, base)


def skeleton(spec: Model, notify: Notify = ignore) -> PreTrainedModel:
    """Return the model's layers without any weight (on the `meta` device): its shapes cost neither memory nor time.

    Raises:
        ModelError, RecipeError: as `load_model`, before the weights are read.
    """
    resolved = _resolve(spec, notify)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            resolved.config, dtype=DTYPES[resolved.spec.dtype], trust_remote_code=spec.trust_remote_code
        )
    model.name_or_path = spec.name
    return model.requires_grad_(False).eval()


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the backbone's last hidden states [batch, tokens, hidden], from which `logits` goes on.

    Args:
        model: a causal language model of transformers (take one out of its peft wrapper first).
        input_ids: [batch, tokens].
        attention_mask: [batch, tokens], 0 where padded; None where nothing is.
    """
    output = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return the logits [n, vocabulary] of hidden states [n, hidden], scaled and capped as the model's family does."""
    config = model.config.get_text_config()
    out: Tensor = model.get_output_embeddings()(hidden)
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        out = out * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        out = out / divisor
    if (factor := getattr(config, "lm_head_multiplier", None)) is not None:  # Falcon-H1
        out = out * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        out = torch.tanh(out / cap) * cap
    return out


def choose_dtype(device: str) -> Dtype:
    """Return the dtype that `auto` means on a device: bf16 where the hardware multiplies it fast, else fp32."""
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device == "mps" or bool(cpu_bf16())
    return "bf16" if fast else "fp32"


def choose_attention(config: PretrainedConfig) -> Attention:
    """Return the attention that `auto` means for a model: sdpa, or eager where sdpa is not the model's own attention.

    That is so for models that cap attention scores or have attention sinks, such as Gemma 2 and GPT-OSS.
    """
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return "sdpa" if not known or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"


def _locate(spec: Model, notify: Notify, weights: bool) -> Place:
    place = locate(spec.name, spec.revision, weights=weights, code=spec.trust_remote_code, notify=notify)
    if spec.revision is not None and place.revision is None:
        raise RecipeError(
            f"model.revision={spec.revision} is for hub ids, and {spec.name!r} is {place.source}; remove model.revision"
        )
    return place


def _resolve(spec: Model, notify: Notify) -> _Resolved:
    place = _locate(spec, notify, weights=True)
    config = read_config(place, spec.trust_remote_code)
    device = devices()[0] if spec.device == "auto" else spec.device
    chosen = {
        "device": device,
        "dtype": choose_dtype(device) if spec.dtype == "auto" else spec.dtype,
        "attention": choose_attention(config) if spec.attention == "auto" else spec.attention,
        "revision": place.revision,
    }
    resolved = spec.model_copy(update=chosen)
    if problems := list(_knob_problems(resolved, config)):
        raise RecipeError("\n".join(problems))
    return _Resolved(resolved, place, config)


def _knob_problems(spec: Model, config: PretrainedConfig) -> Iterable[str]:
    on_gpu = spec.device.startswith("cuda")
    if spec.device not in devices():
        yield f"model.device={spec.device} is not on this machine (allowed: auto, {', '.join(devices())})"
    if spec.dtype == "fp16" and spec.device == "cpu":
        yield "model.dtype=fp16 is for GPUs, and model.device is cpu (allowed: auto, bf16, fp32, fp64)"
    if spec.dtype == "fp64" and spec.device == "mps":
        yield "model.dtype=fp64 does not exist on mps (allowed: auto, bf16, fp16, fp32; or model.device=cpu)"
    yield from _quantize_problems(spec, config)
    if spec.attention == "sdpa" and choose_attention(config) != "sdpa":
        yield f"model.attention=sdpa is not the attention of {config.model_type} models (allowed: auto, eager)"
    if spec.attention == "flash_attention_2" and not (on_gpu and spec.dtype in ("bf16", "fp16")):
        yield (
            f"model.attention=flash_attention_2 needs a CUDA device with bf16 or fp16, not {spec.device} with "
            f"{spec.dtype} (allowed here: auto, sdpa, eager)"
        )


def _quantize_problems(spec: Model, config: PretrainedConfig) -> Iterable[str]:
    if spec.quantize == "none":
        return
    knob = f"model.quantize={spec.quantize}"
    if need := quantizing.lacking(spec.quantize):
        yield f"{knob} needs {need}: pip install 'fedloom[quantize]' (allowed without it: none, int8)"
    if spec.quantize == "nf4" and spec.dtype == "fp64":
        yield f"{knob} has no kernels for model.dtype=fp64 (allowed: auto, bf16, fp16, fp32; or model.quantize=int8)"
    if (already := getattr(config, "quantization_config", None)) is not None:
        kind = already.get("quant_method") if isinstance(already, dict) else getattr(already, "quant_method", already)
        yield f"{knob} is for plain weights; those of {spec.name} are quantised ({kind}): name the model they came from"


def _read_tokenizer(place: Place, spec: Model) -> PreTrainedTokenizerBase:
    advice = "it needs a tokenizer.json beside config.json, which tokenizer.save_pretrained(folder) writes"
    with reading(f"{place.source}: its tokenizer cannot be read", advice):
        tokenizer = AutoTokenizer.from_pretrained(place.folder, trust_remote_code=spec.trust_remote_code)
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{place.source}: its tokenizer has no end token, so answers could not end; set eos_token in "
            f"tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_weights(resolved: _Resolved, notify: Notify) -> PreTrainedModel:
    spec, place = resolved.spec, resolved.place
    with reading(f"{place.source}: its weights cannot be read"):
        model, report = AutoModelForCausalLM.from_pretrained(
            place.folder,
            config=resolved.config,
            dtype=DTYPES[spec.dtype],
            attn_implementation=spec.attention,
            device_map={"": spec.device},
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            quantization_config=quantizing.config(spec.quantize),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below with their names
        )
        mismatched = [*report["mismatched_keys"], *quantizing.finish(model)]
    if absent := sorted(report["missing_keys"]):
        raise ModelError(f"{place.source}: its weights lack {_some(absent)}; config.json belongs to another model")
    if odd := [f"{name} {tuple(has)}, not {tuple(wants)}" for name, has, wants in sorted(mismatched)]:
        raise ModelError(f"{place.source}: weights have other shapes than config.json says: {_some(odd)}")
    if unused := sorted(report["unexpected_keys"]):
        notify(f"{place.source}: the architecture has no place for {_some(unused)}; left out")
    _check_quantised(model, spec, place.source, notify)
    return model


def _check_quantised(model: PreTrainedModel, spec: Model, source: str, notify: Notify) -> None:
    if odd := next(quantizing.foreign(model), None):
        raise ModelError(
            f"{source}: its weights are quantised in a way that is not trained on here ({odd[0]} is a {odd[1]}); name "
            f"the model that they came from, and set model.quantize=nf4 or int8"
        )
    layers = len(list(quantizing.quantised(model)))
    if spec.quantize != "none" and not layers:
        raise ModelError(
            f"model.quantize={spec.quantize}: {source} is a {model.config.model_type} model without plain linear "
            f"layers; set model.quantize=none"
        )
    if layers:
        size = human_bytes(quantizing.nbytes(model))
        notify(f"{source}: {layers} linear layers in {spec.quantize}, {size} of weights")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _check_halves(model: PreTrainedModel, source: str) -> None:
    ids = torch.arange(3, device=model.device)[None]
    with reading(f"{source}: its forward cannot be run in two halves"), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[0]
        halves = logits(model, hidden_states(model, ids)[0])
    if (whole - halves).abs().max() > 1e-2 * whole.abs().max():
        raise ModelError(
            f"{source}: a {model.config.model_type} model changes its logits in a way that is not supported yet "
            f"(supported: logit_scale, logits_scaling, lm_head_multiplier, final_logit_softcapping)"
        )
