"""Training speed: fedloom's step against a plain bf16 loop over peft, on the same rows, in one run.

    python benchmarks/plain_loop.py [--steps 8] [--rows 8] [--tokens 128] [--attention sdpa]

Both train LoRA r = 8 on all linear layers of SmolLM2-135M from the same start with AdamW, logits only at labels. Their
steps alternate, so that whatever else the machine does hits both; the figure to read is the ratio. Rows are GSM8K's
first training rows where FEDLOOM_DATA is set, else random tokens. Prints JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fedloom.client.adapters import Lora
from fedloom.client.models import Loaded, Model, load_model
from fedloom.client.objectives import Batch, Sft


def rows(tokenizer: PreTrainedTokenizerBase, count: int, tokens: int) -> torch.Tensor:
    """Return (count, tokens) token ids."""
    home = os.environ.get("FEDLOOM_DATA")
    path = Path(home or "") / "gsm8k" / "gsm8k_train.jsonl"
    if home and path.is_file():
        text = "".join(json.loads(line)["question"] + json.loads(line)["answer"] for line in path.open())
        ids = tokenizer(text[: 40 * count * tokens], return_tensors="pt")["input_ids"][0]
        return ids[: count * tokens].view(count, tokens)
    return torch.randint(3, 40000, (count, tokens), generator=torch.Generator().manual_seed(0))


def plain(loaded: Loaded, ids: torch.Tensor, labels: int) -> Callable[[], float]:
    """Return one step of the plain loop: peft, label-only logits, AdamW."""
    model = get_peft_model(copy.deepcopy(loaded.model), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    start = Lora(r=8, alpha=16).attach(copy.deepcopy(loaded.model)).init(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(start[name.removeprefix("base_model.model.").replace(".default.weight", "")])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    inner = model.base_model.model

    def step() -> float:
        hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state[:, -labels - 1 : -1].flatten(0, 1)
        logits = inner.lm_head(hidden).float()
        loss = functional.cross_entropy(logits, ids[:, -labels:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def ours(loaded: Loaded, ids: torch.Tensor, labels: int) -> Callable[[], float]:
    """Return one step as fedloom's trainer takes it."""
    model = copy.deepcopy(loaded.model)
    attached = Lora(r=8, alpha=16).attach(model)
    params = attached.load([attached.init(0)])
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3, fused=True)
    train = torch.zeros(ids.shape, dtype=torch.bool)
    train[:, -labels:] = True
    where = train[:, 1:].nonzero()
    lengths = torch.full((len(ids),), ids.shape[1])
    batch = Batch(ids, lengths, where, ids[where[:, 0], where[:, 1] + 1])
    objective = Sft()

    def step() -> float:
        loss = objective.loss(model, batch) / len(batch.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def main() -> None:
    """Run both, alternating, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="counted steps of each, after two uncounted ones")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    parser.add_argument("--labels", type=int, default=24, help="label tokens at the end of a row")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    asked = parser.parse_args()
    torch.set_num_threads(2)
    loaded = load_model(Model(name="smollm2-135m", dtype="bf16", device="cpu", attention=asked.attention))
    ids = rows(loaded.tokenizer, asked.rows, asked.tokens)
    steps = {"plain": plain(loaded, ids, asked.labels), "fedloom": ours(loaded, ids, asked.labels)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for i in range(asked.steps + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            losses[name] = step()
            if i >= 2:
                seconds[name].append(time.perf_counter() - began)
    tokens = asked.rows * asked.tokens
    ratios = [p / f for p, f in zip(seconds["plain"], seconds["fedloom"], strict=True)]
    result = {
        "tokens_per_second": {name: round(tokens / statistics.median(s), 1) for name, s in seconds.items()},
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "final_loss": {name: round(loss, 4) for name, loss in losses.items()},
        "step": {"rows": asked.rows, "tokens": asked.tokens, "labels": asked.labels, "attention": asked.attention},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": 2, "torch": torch.__version__},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
