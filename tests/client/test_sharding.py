"""A model that two processes hold between them computes what a whole one computes, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

DUTY = """
import json, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from fedloom.client import generate, sharding
from fedloom.client.adapters import Lora
from fedloom.client.fit import Job, fit, score
from fedloom.client.lean import lean
from fedloom.client.objectives import Sft
from fedloom.client.trainer import Bench, Rows, Trainer
from fedloom.data.encode import Encoded
from fedloom.types import Fit
from tests.tiny import tiny_model, tiny_tokenizer

rank, store = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
sharding.join(rank, 2, store, "cpu")

def rows(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(8, 30, 6)
    ids, train = draw.integers(3, 250, lengths.sum()).astype(np.int32), draw.random(lengths.sum()) < 0.5
    return Rows(Encoded(ids, train, np.concatenate([[0], np.cumsum(lengths)]), lengths.astype(np.int64)), np.arange(6))

def work(bench):
    start = bench.attached.init(0, torch.promote_types(bench.model.dtype, torch.float32))
    found = [torch.tensor(score(bench, rows(0), start).scalars["nll"])]
    plain = replace(bench, trainer=bench.trainer.model_copy(update={"checkpointing": False}))
    for one, order in ((plain, "first"), (bench, "first"), (bench, "zeroth")):
        penalty = lambda w: 0.1 * sum(t.square().sum() for t in w.values())
        jobs = [Job(name, 0, rows(i), Fit(start, penalty=penalty, order=order)) for i, name in enumerate("ab")]
        for fitted in fit(one, jobs):
            start = fitted.params
            found += [*start.values(), torch.tensor(fitted.losses)]
    bench.attached.load([start])
    moved = max(float(t.abs().max()) for name, t in start.items() if name.endswith("lora_B"))  # these begin at zero
    return found, moved, generate.greedy(bench.model, tiny_tokenizer(), ["hello", "a"], 8)

told = {"differs": 0.0}
for dtype, packing, dropout in ((torch.float32, True, 0.0), (torch.float32, False, 0.2), (torch.bfloat16, True, 0.0)):
    model = tiny_model(dtype, layers=3).requires_grad_(False)
    lean(model)
    attached = Lora(r=4, alpha=8, dropout=dropout).attach(model)
    trainer = Trainer(steps=3, batch=4, lr=1e-2, packing=packing, checkpointing=True)
    bench = Bench(model, attached, Sft(), trainer, 0, 4)
    whole, told["whole"] = work(bench), sum(p.nbytes for p in model.parameters())
    layers = sum(p.nbytes for layer in sharding.decoder_layers(model) for p in layer.parameters())
    sharding.shard(model, "cpu")
    cut = work(bench)
    told["same"], told["moved"] = whole[1:] == cut[1:], cut[1]
    told["differs"] = max(told["differs"], *(float((a - b).abs().max()) for a, b in zip(whole[0], cut[0], strict=True)))
    told["layers"] = layers
    told["held"] = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())
print(json.dumps(told))
"""


def test_two_processes_with_half_the_layers_each(tmp_path: Path) -> None:
    """Both orders of derivatives, with and without checkpointing, packing and dropout; scoring and generation."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    words = [[sys.executable, "-c", DUTY, str(rank), str(tmp_path / "meet")] for rank in range(2)]
    ranks = [subprocess.Popen(one, env=environment, stdout=subprocess.PIPE, text=True) for one in words]
    for one in ranks:
        out, _ = one.communicate(timeout=120)
        told = json.loads(out.splitlines()[-1])
        assert told["differs"] == 0.0
        assert told["same"]
        assert told["moved"] > 0
        # every layer's share of a matrix is half of it
        assert told["held"] == told["whole"] - told["layers"] // 2
