"""Training speed: fedloom against TRL's SFTTrainer with peft, as published federated code uses them, in one run.

    python benchmarks/speed.py [--rounds 2] [--clients 1] [--steps 2]

Both fine-tune LoRA r = 8 on all linear layers of SmolLM2-135M in bf16 on the same tokenised GSM8K rows, in the same
order, from the same start, with AdamW and the same clipping; each is a process of its own, one after the other. TRL
gets a new SFTTrainer for every client and round, and its adapters are averaged. The figure to read is the ratio.

Rows of the table: TRL as its users start it (it checkpoints gradients by default), without that, and under the same
allocator as fedloom; fedloom as the command starts it, with layers compiled, and with the system's allocator. The
matrix rate is that of the base model's products alone, forward and backward, in the shapes of our passes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import harness

SYSTEM = {"FEDLOOM_ALLOCATOR": "off"}


def ours(asked: argparse.Namespace) -> dict[str, Any]:
    """Train with fedloom and return its figures."""
    recipe, clock = _recipe(asked), harness.Clock()
    began = time.perf_counter()
    world, _, settled = harness.build(recipe, Path(tempfile.mkdtemp()), clock)
    setup, clock.last = time.perf_counter() - began, time.perf_counter()
    _, reports = harness.rounds(world, asked.rounds)
    whole, fit = sum(r.seconds for r in reports), sum(r.fit_seconds for r in reports)
    return {
        **_steady([(r.fit_seconds, r.tokens) for r in reports], [loss for _, _, loss in clock.steps], asked),
        "first_round_seconds": round(reports[0].fit_seconds, 1),
        "setup_seconds": round(setup, 1),
        "outside_fitting": round(1 - fit / whole, 4),
        "peak_gb": round(harness.peak_rss(), 2),
        "cohort": settled.runtime.cohort,
        "packing": settled.trainer.packing,
    }


def trl(asked: argparse.Namespace) -> dict[str, Any]:
    """Train with TRL and return its figures."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

        def log(self, logs: dict[str, float], *rest: Any, **more: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    warnings.simplefilter("ignore")
    recipe, losses, fits = _recipe(asked), [], []
    world, assets, _ = harness.build(recipe, Path(tempfile.mkdtemp()), harness.Sink())
    rows = {n: [world.rows(n)[i] for i in range(len(world.rows(n)))] for n in world.clients}
    plan = {(t, n): harness.order(world, t, n) for t in range(asked.rounds) for n in world.clients}
    start, tokenizer = assets.initial, assets.loaded.tokenizer
    clients = world.clients
    del world, assets
    model = _plain(recipe)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    live = {n: p for n, p in model.named_parameters() if p.requires_grad}
    mine = {n: n.removeprefix("base_model.model.").replace(".default.weight", "") for n in live}
    glob = {n: start[mine[n]].clone() for n in live}
    for round_ in range(asked.rounds):
        mean, seconds, tokens = {n: torch.zeros_like(g) for n, g in glob.items()}, 0.0, 0
        for client in clients:
            for n, p in live.items():
                p.data.copy_(glob[n])
            chosen = [rows[client][i] for step in plan[round_, client] for i in step]
            began = time.perf_counter()
            table = Dataset.from_list(
                [{"input_ids": r.ids.tolist(), "completion_mask": r.train.int().tolist()} for r in chosen]
            )
            config = SFTConfig(
                output_dir=tempfile.mkdtemp(),
                max_steps=asked.steps,
                per_device_train_batch_size=asked.batch,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=1.0,
                max_length=512,
                completion_only_loss=True,
                bf16=True,
                use_cpu=True,
                report_to=[],
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
                **({} if asked.kind == "trl" else {"gradient_checkpointing": False}),
            )
            trainer = InOrder(model, args=config, train_dataset=table, processing_class=tokenizer)
            trainer.train()
            seconds, tokens = seconds + time.perf_counter() - began, tokens + sum(len(r.ids) for r in chosen)
            for n, p in live.items():
                mean[n] += (p.detach() - glob[n]) / len(clients)
        glob = {n: g + mean[n] for n, g in glob.items()}
        fits.append((seconds, tokens))
    return {**_steady(fits, losses, asked), "peak_gb": round(harness.peak_rss(), 2)}


def peak(asked: argparse.Namespace) -> dict[str, Any]:
    """Return how fast this machine multiplies bf16 matrices of the base model's shapes, forward and backward."""
    from fedloom.client.models import load_model

    model = load_model(_recipe(asked).resolved().model).model
    torch.set_num_threads(2)
    shapes: dict[tuple[int, int], int] = {}
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            size = (module.out_features, module.in_features)
            shapes[size] = shapes.get(size, 0) + 1
    seconds = flops = 0.0
    for (rows, columns), count in shapes.items():
        weight = torch.randn(rows, columns, dtype=torch.bfloat16)
        x = torch.randn(asked.tokens, columns, dtype=torch.bfloat16)
        dy = torch.randn(asked.tokens, rows, dtype=torch.bfloat16)
        best = min(_timed(lambda x=x, dy=dy, w=weight: (functional.linear(x, w), dy @ w)) for _ in range(5))
        seconds, flops = seconds + count * best, flops + count * 4.0 * asked.tokens * rows * columns
    return {"gflops": round(flops / seconds / 1e9, 1), "flops_per_token": flops / asked.tokens, "tokens": asked.tokens}


def _timed(work: Any) -> float:
    began = time.perf_counter()
    for _ in range(10):
        work()
    return (time.perf_counter() - began) / 10


def _plain(recipe: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from fedloom.client.bundled import locate

    place = locate(recipe.model.name, None, weights=True, code=False, notify=lambda text: None)
    return AutoModelForCausalLM.from_pretrained(place.folder, dtype=torch.bfloat16)


def _recipe(asked: argparse.Namespace) -> Any:
    changes: dict[str, Any] = {
        "data": {"clients": asked.clients},
        "trainer": {"steps": asked.steps, "batch": asked.batch, "micro_tokens": asked.micro},
        "rounds": asked.rounds,
    }
    if asked.kind == "compiled":
        changes["model"] = {"compile": True}
    return harness.recipe(**changes)


def _steady(rounds: list[tuple[float, int]], losses: list[float], asked: argparse.Namespace) -> dict[str, Any]:
    """Return the rates of the rounds (seconds, tokens) after the first, and the mean loss of the last one."""
    counted = rounds[1:] or rounds
    seconds, samples = sum(s for s, _ in counted), len(counted) * asked.clients * asked.steps * asked.batch
    last = losses[-asked.clients * asked.steps :]
    return {
        "samples_per_second": round(samples / seconds, 3),
        "tokens_per_second": round(sum(t for _, t in counted) / seconds, 1),
        "final_loss": round(sum(last) / len(last), 4),
    }


KINDS = {
    "trl": ("TRL, as its users start it", trl, "system"),
    "trl-no-checkpointing": ("TRL, gradient checkpointing off", trl, "system"),
    "trl-fast": ("TRL, our allocator, checkpointing off", trl, "fast"),
    "ours": ("fedloom", ours, "fast"),
    "compiled": ("fedloom, layers compiled", ours, "fast"),
    "ours-system": ("fedloom, the system's allocator", ours, "system"),
}


def main() -> None:
    """Run every kind in a process of its own and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps of a client in a round")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--micro", type=int, default=1024, help="trainer.micro_tokens")
    parser.add_argument("--tokens", type=int, default=900, help="rows of the matrices whose rate is measured")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--kind", choices=[*KINDS, "peak"], help="run this one in this very process")
    asked = parser.parse_args()
    if asked.kind:
        found = peak(asked) if asked.kind == "peak" else KINDS[asked.kind][1](asked)
        print(json.dumps(found))
        return
    from fedloom import allocator

    knobs = [f"--{k}={getattr(asked, k)}" for k in ("rounds", "clients", "steps", "batch", "micro", "tokens")]
    fast = allocator.for_child()
    results = {}
    for kind in asked.only:
        title, _, memory = KINDS[kind]
        env = fast if memory == "fast" else SYSTEM
        print(f"{title} ...", file=sys.stderr, flush=True)
        results[kind] = {"title": title, **harness.child([__file__, "--kind", kind, *knobs], env)}
        print(json.dumps(results[kind]), file=sys.stderr, flush=True)
    _report(asked, results, harness.child([__file__, "--kind", "peak", *knobs], fast))


def _report(asked: argparse.Namespace, results: dict[str, Any], rate: dict[str, Any]) -> None:
    for found in results.values():
        achieved = found["tokens_per_second"] * rate["flops_per_token"] / 1e9
        found["share_of_matrix_rate"] = round(achieved / rate["gflops"], 3)
        if "trl" in results:
            found["times_trl"] = round(found["samples_per_second"] / results["trl"]["samples_per_second"], 2)
            found["memory_of_trl"] = round(found["peak_gb"] / results["trl"]["peak_gb"], 3)
    harness.save("speed", {"machine": harness.machine(), "asked": vars(asked), "matrix": rate, "results": results})


if __name__ == "__main__":
    main()
