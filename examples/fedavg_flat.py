"""FedAvg with LoRA, flat: one file, no abstraction, the same numbers as `fedloom run` with `runtime.reference: true`.

    python examples/fedavg_flat.py MODEL_FOLDER

Every client holds some rows of token ids and a mask of labels. Each round every client starts from the global adapter,
takes a few AdamW steps on its own rows, and the server adds the weighted mean of the changes.
"""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

Row = tuple[Tensor, Tensor]  # (t,) token ids, (t,) True where the token is a label


def stream(seed: int, *key: object) -> torch.Generator:
    """One random stream a purpose: a pure function of the seed and the key."""
    text = "\x1f".join(str(part) for part in (seed, *key))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)


def rows_of_round(count: int, seed: int, client: str, round_: int, steps: int, batch: int) -> list[list[int]]:
    """The rows of each step: an endless stream of permutations, read on where the last round ended."""
    batch = min(batch, count)
    order: list[int] = []
    first = round_ * steps * batch
    epoch = 0
    while len(order) < first + steps * batch:
        order += torch.randperm(count, generator=stream(seed, epoch, client, "rows")).tolist()
        epoch += 1
    return [order[first + s * batch : first + (s + 1) * batch] for s in range(steps)]


def loss_of(model: nn.Module, rows: list[Row]) -> Tensor:
    """Mean of -log p over the labels of right-padded rows; causal attention never sees the padding."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    train = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (tokens, labels) in enumerate(rows):
        ids[i, : len(tokens)], train[i, : len(tokens)] = tokens, labels
    row, position = train[:, 1:].nonzero().unbind(1)
    logits = model(input_ids=ids, use_cache=False).logits[row, position]
    return functional.cross_entropy(logits, ids[row, position + 1], reduction="sum") / len(row)


def fedavg(  # noqa: PLR0913, PLR0917
    folder: str | Path,
    clients: dict[str, list[Row]],
    rounds: int = 2,
    steps: int = 2,
    batch: int = 2,
    lr: float = 1e-2,
    r: int = 2,
    alpha: float = 4.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the global adapter after `rounds` rounds: peft's name -> tensor."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}

    draws = stream(seed, None, None, "adapter")
    glob: dict[str, Tensor] = {}
    for name, p in live.items():
        glob[name] = torch.zeros_like(p)
        if "lora_A" in name:
            nn.init.kaiming_uniform_(glob[name], a=math.sqrt(5), generator=draws)

    for round_ in range(rounds):
        mean: dict[str, Tensor] = {}
        total = 0.0
        for client, rows in clients.items():
            with torch.no_grad():
                for name, p in live.items():
                    p.copy_(glob[name])
            optimizer = torch.optim.AdamW(live.values(), lr=lr, weight_decay=0.0, fused=True)
            for step in rows_of_round(len(rows), seed, client, round_, steps, batch):
                loss_of(model, [rows[i] for i in step]).backward()
                nn.utils.clip_grad_norm_(live.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            weight = float(len(rows))
            total += weight
            for name, p in live.items():
                delta = p.detach() - glob[name]
                if name in mean:
                    mean[name].add_(delta - mean[name], alpha=weight / total)
                else:
                    mean[name] = delta.clone()
        glob = {name: w + mean[name] for name, w in glob.items()}
    return glob


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw = stream(0, "example")
    mask = torch.arange(24) >= 12
    made = {f"client-{k}": [(torch.randint(3, 200, (24,), generator=draw), mask) for _ in range(8)] for k in (1, 2, 3)}
    for name, value in fedavg(sys.argv[1], made).items():
        print(f"{name}  {float(value.norm()):.6f}")
