"""Exports of a finished run: PEFT folder, merged model folder, hub upload; each with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedloom import __version__, baselog
from fedloom.client.bundled import Notify, ignore
from fedloom.client.identity import stamp
from fedloom.outcome import read_summary, summed
from fedloom.reopen import Reopened, reopen
from fedloom.types import ModelError


def adapter(run: Path, out: Path, checkpoint: str | None, client: str | None, notify: Notify = ignore) -> None:
    """Write the adapter as a PEFT folder with a model card.

    Args:
        run: the run folder.  out: the folder to write.
        checkpoint, client: which adapter, as `reopen.read_adapter` says.
        notify: is told of what takes long, and of what could not be checked.

    Raises:
        ModelError: there is no such adapter, or the model is not the one that the run trained it on.
    """
    opened = reopen(run, checkpoint, client, notify)
    params = opened.params
    if baselog.is_dense(opened.base):
        raise ModelError(
            f"{run}: {opened.recipe.algorithm.part_name} changed the base weights by more than an adapter can hold; "
            "export the whole model with --to merged"
        )
    if opened.base:
        params = summed(opened.base, params, opened.recipe.adapter.scale)
    opened.attached.save(out, params, opened.loaded.base.name)
    stamp(out, opened.loaded.base)
    (out / "README.md").write_text(card(run, opened, "peft"), encoding="utf-8")


def merged(run: Path, out: Path, checkpoint: str | None, client: str | None, notify: Notify = ignore) -> None:
    """Write the base with the adapter added to its weights as a plain model folder; arguments as for `adapter`."""
    opened = reopen(run, checkpoint, client, notify)
    state = opened.attached.merged(opened.loaded.model, opened.params)
    model = type(opened.loaded.model)(opened.loaded.model.config).to(opened.loaded.model.dtype)
    model.load_state_dict(state)
    model.save_pretrained(out)
    opened.loaded.tokenizer.save_pretrained(out)
    (out / "README.md").write_text(card(run, opened, "transformers"), encoding="utf-8")


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to a hub repository and return its address.

    Raises:
        ModelError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"fedloom {__version__}"))
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"upload to {repo} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}\n"
            f"the folder is ready in {folder}; log in with `hf auth login`, check the network (HF_HUB_OFFLINE), "
            f"then upload it with: hf upload {repo} {folder}"
        ) from error


def _portable(value: Any) -> Any:
    """Return a recipe's values with absolute paths cut to their last part: a card is read on other machines."""
    if isinstance(value, Mapping):
        return {key: _portable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_portable(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def card(run: Path, opened: Reopened, library: str) -> str:
    """Return a model card: base, method, data and measured results."""
    recipe, summary = opened.recipe, read_summary(run) or {"metrics": {}}
    rows = [
        f"| {regime} | {evaluator} | {metric} | {value:.4g} |"
        for regime, found in summary["metrics"].items()
        for evaluator, metrics in found.items()
        for metric, value in metrics.items()
        if value is not None and not metric.endswith(("_worst10", "_variance"))
    ]
    what = f"{recipe.algorithm.part_name}, {recipe.rounds} rounds, {recipe.adapter.part_name} ({opened.label})"
    lines = [
        "---",
        f"base_model: {_portable(opened.loaded.base.name)}",
        f"library_name: {library}",
        f"tags: [federated-learning, {recipe.adapter.part_name}, fedloom]",
        "---",
        f"# {run.name}",
        "",
        f"Fine-tuned with fedloom {__version__}: {what}.",
        "",
        f"- data: {summary.get('source', recipe.data.source.part_name)}",
        f"- clients: {summary.get('clients', recipe.data.clients)}",
        f"- trained tokens: {summary.get('trained_tokens', 0):,}",
        "",
        "| regime | evaluator | metric | value |",
        "|---|---|---|---|",
        *rows,
        "",
        "```yaml",
        yaml.safe_dump(_portable(recipe.dump()), sort_keys=False, allow_unicode=True).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"
