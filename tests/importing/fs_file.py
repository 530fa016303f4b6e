"""An FS-LLM file, and ways to change and import it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from fedloom.importing import Imported, convert

LORA = {"adapter_package": "peft", "adapter_method": "lora", "r": 4, "lora_alpha": 12, "lora_dropout": 0.05}
FS: dict[str, Any] = {
    "use_gpu": True,
    "device": 0,
    "seed": 3,
    "early_stop": {"patience": 2, "delta": 0.1},
    "federate": {
        "mode": "standalone", "client_num": 8, "total_round_num": 20, "sample_client_num": 4, "save_to": "x.ckpt",
        "save_freq": 5, "share_local_model": True, "method": "FedAvg", "ignore_weight": False, "use_ss": False,
    },
    "data": {
        "root": "data/", "type": "dolly-15k@llm", "splits": [0.9, 0.05, 0.05], "splitter": "lda",
        "splitter_args": [{"alpha": 0.3}],
    },
    "llm": {"tok_len": 200, "chat": {"max_len": 500}, "adapter": {"use": True, "args": [LORA]}},
    "dataloader": {"batch_size": 2},
    "model": {"type": "facebook/opt-125m@huggingface_llm"},
    "train": {
        "local_update_steps": 6, "batch_or_epoch": "batch", "is_enable_half": True,
        "optimizer": {"type": "SGD", "lr": 0.01, "weight_decay": 0.1},
    },
    "grad": {"grad_clip": 2.0, "grad_accum_count": 1},
    "criterion": {"type": "CrossEntropyLoss"},
    "trainer": {"type": "llmtrainer"},
    "eval": {"freq": 5, "metrics": ["loss"], "best_res_update_round_wise_key": "val_loss", "count_flops": False},
    "asyn": {"use": False, "min_received_num": 2},
}  # fmt: skip


def changed(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return {**tree, head: changed(tree.get(head, {}), rest, value) if rest else value}


def fs(**changes: Any) -> Imported:
    """Import the file above with keys changed, `a__b` standing for `a.b`."""
    tree: Mapping[str, Any] = FS
    for path, value in changes.items():
        tree = changed(tree, path.replace("__", "."), value)
    return convert(yaml.safe_dump(dict(tree)), "f.yaml")


def keys(found: Imported) -> set[str]:
    return {remark.key for remark in (*found.lost, *found.notes, *found.moot)}


def lost(found: Imported) -> dict[str, str]:
    return {remark.key: remark.why for remark in found.lost}
