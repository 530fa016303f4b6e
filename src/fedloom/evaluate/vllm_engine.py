"""vLLM (arXiv 2309.06180) gives an evaluator's answers where it is installed and the model is on a GPU.

Written after its documentation (0.10 and later) and held against a stand-in that answers with transformers and peft; it
has not run on a GPU. Its engine lives in this process, in half of the GPU memory that is free when it is first asked,
and sleeps between calls, so that training has the memory. What it could not load as we mean it is answered by our own
loop: quantised models, base weights that a method changes, adapters other than LoRA of one rank, personal methods.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedloom import seeds
from fedloom.client.adapters import Lora
from fedloom.client.attached import Attached
from fedloom.client.generate import Answer, Decoding, cut, end_tokens
from fedloom.client.prompts import tokenised
from fedloom.evaluate.lm_eval_bridge import untouched
from fedloom.types import Tensors

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks for which vLLM can be made ready."""
SHARE = 0.5
"""Of the free GPU memory; the rest stays with the resident model."""
_numbers = itertools.count(1)
"""vLLM keeps adapters by number, so that each set of tensors needs one of its own."""


def chosen(recipe: Recipe, model: PreTrainedModel) -> bool:
    """Return whether vLLM answers in the evaluations of a run; it is the same for all of its regimes."""
    adapter = recipe.adapter
    return (
        model.device.type == "cuda"
        and importlib.util.find_spec("vllm") is not None
        and Path(model.name_or_path).is_dir()
        and recipe.model.quantize == "none"
        and not recipe.runtime.reference
        and not recipe.algorithm.changes_base
        and not recipe.algorithm.personal
        and isinstance(adapter, Lora)
        and not adapter.ranks
        and adapter.r <= RANKS[-1]
    )


def name() -> str:
    """Return the engine's name and version."""
    import vllm

    return f"vllm {vllm.__version__}"


def answered(  # noqa: PLR0913, PLR0917 - what to answer with, what to answer, and how
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    attached: Attached,
    params: Tensors | None,
    prompts: Sequence[str],
    max_new_tokens: int,
    decoding: Decoding,
) -> list[Answer]:
    """Return what `client.generate.answered` does, with the adapter `params` in the model's layers; None: the base."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    ids = tokenised(tokenizer, prompts)
    rules = [
        SamplingParams(
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=seeds.derive(decoding.seed, None, None, f"answer:{i}") if decoding.temperature else None,
            max_tokens=max_new_tokens,
            stop=list(decoding.stop) or None,
            stop_token_ids=sorted(end_tokens(model, tokenizer)),
        )
        for i in range(len(ids))
    ]
    with TemporaryDirectory() as folder, untouched(model):
        lora = None
        if params is not None:
            attached.save(Path(folder), params, model.name_or_path)
            lora = LoRARequest("adapter", next(_numbers), folder)
        rank = max(shape[0] for key, shape in attached.shapes().items() if key.endswith("lora_A"))
        engine = _engine(model.name_or_path, str(model.dtype).removeprefix("torch."), rank)
        engine.wake_up()
        try:
            found = engine.generate(
                [{"prompt_token_ids": row} for row in ids], rules, lora_request=lora, use_tqdm=False
            )
        finally:
            engine.sleep(level=1)
    tokens = [list(one.outputs[0].token_ids) for one in found]
    texts = [cut(tokenizer.decode(row, skip_special_tokens=True), decoding.stop) for row in tokens]
    return [Answer(text, len(row), len(new)) for text, row, new in zip(texts, ids, tokens, strict=True)]


@lru_cache(1)
def _engine(folder: str, dtype: str, rank: int) -> Any:
    """Return the sleeping engine of a model."""
    # in a process of its own it would import an unguarded script that runs a recipe once more
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    free, total = torch.cuda.mem_get_info()
    engine = LLM(
        model=folder,
        dtype=dtype,
        enable_lora=True,
        max_lora_rank=next(one for one in RANKS if one >= rank),
        gpu_memory_utilization=SHARE * free / total,
        enable_sleep_mode=True,
        seed=0,
    )
    engine.sleep(level=1)
    return engine
