"""vLLM as the engine: a stand-in of its interface answers with transformers and peft from what it is handed."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from tests.helpers import lines, tree
from transformers import AutoModelForCausalLM

import fedloom
from fedloom import recipe as recipes
from fedloom.evaluate import vllm_engine

TASKS = {"name": "tasks", "items_per_category": 2, "categories": ["units", "sorting"], "max_new_tokens": 6}


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class LLM:
    """Greedy answers, one prompt at a time; asleep unless it was woken."""

    model: str
    dtype: str
    enable_lora: bool
    max_lora_rank: int
    gpu_memory_utilization: float
    enable_sleep_mode: bool
    seed: int
    asleep: bool = False
    numbers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.enable_lora and self.enable_sleep_mode and 0 < self.gpu_memory_utilization < 1
        torch.manual_seed(self.seed)  # as the real one does in this process

    def sleep(self, level: int) -> None:
        assert level == 1 and not self.asleep
        self.asleep = True

    def wake_up(self) -> None:
        self.asleep = False

    def generate(
        self, prompts: Sequence[Any], rules: Sequence[SamplingParams], lora_request: LoRARequest | None, use_tqdm: bool
    ) -> list[Any]:
        assert not self.asleep
        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=getattr(torch, self.dtype))
        if lora_request is not None:
            assert lora_request.lora_int_id not in self.numbers
            self.numbers.append(lora_request.lora_int_id)
            model = peft.PeftModel.from_pretrained(model, lora_request.lora_path)
        found = []
        for prompt, rule in zip(prompts, rules, strict=True):
            ids, made = list(prompt["prompt_token_ids"]), []
            for _ in range(rule.max_tokens or 0):
                with torch.inference_mode():
                    made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
                if made[-1] in (rule.stop_token_ids or ()):
                    break
            found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=made)]))
        return found


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams, "__version__": "0.0.stand-in"},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (6 << 30, 8 << 30))
    vllm_engine._engine.cache_clear()


def test_answers_are_those_of_our_own_loop(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: None
) -> None:
    changes = {"evaluate": [TASKS], "adapter": {"dropout": 0.1}, "trainer": {"lr": 0.1}}
    own = fedloom.run(tree(tiny_folder, **changes), out=tmp_path / "own")
    monkeypatch.setattr(vllm_engine, "chosen", lambda recipe, model: True)
    other = fedloom.run(tree(tiny_folder, **changes), out=tmp_path / "vllm")
    answers = [
        [(one["regime"], one["id"], one["output"]) for one in lines(run.folder / "samples" / "tasks.jsonl")]
        for run in (own, other)
    ]
    assert answers[0] == answers[1]
    assert len({output for _, _, output in answers[0]}) > 1
    assert own.summary["adapter_sha256"] == other.summary["adapter_sha256"]
    engines = [run.summary["evaluation"]["tasks"]["engine"] for run in (own, other)]
    assert engines == ["fedloom", "vllm 0.0.stand-in"]
    engine = vllm_engine._engine(str(tiny_folder), "float32", 2)
    assert engine.asleep and len(engine.numbers) == 1 and engine.max_lora_rank == 8
    assert engine.gpu_memory_utilization == 0.375


def test_what_vllm_cannot_load_as_we_mean_it_is_not_asked_of_it(tiny_folder: Path, stand_in: None) -> None:
    gpu = SimpleNamespace(device=torch.device("cuda"), name_or_path=str(tiny_folder))
    asked = lambda *texts: vllm_engine.chosen(recipes.load(tree(tiny_folder), texts), gpu)  # type: ignore[arg-type]
    assert asked()
    assert not asked("model.quantize=int8")
    assert not asked("adapter.r=1024")
    assert not asked("adapter=ia3")
    assert not asked("algorithm=ditto")
    assert not asked("algorithm=fedex")
    assert not asked("runtime.reference=true")
    cpu = SimpleNamespace(device=torch.device("cpu"), name_or_path=str(tiny_folder))
    assert not vllm_engine.chosen(recipes.load(tree(tiny_folder)), cpu)  # type: ignore[arg-type]
    bare = SimpleNamespace(device=torch.device("cuda"), name_or_path="org/model")
    assert not vllm_engine.chosen(recipes.load(tree(tiny_folder)), bare)  # type: ignore[arg-type]
