"""Recipe: one tree of parts that says everything about a run; YAML and `key=value` in, one validated record out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from fedloom import trackers as _trackers  # noqa: F401 - registers the shipped trackers
from fedloom.algorithms import Algorithm
from fedloom.algorithms.fedavg import FedAvg
from fedloom.attacks import Attack
from fedloom.checkpoint import Checkpointing
from fedloom.client import ada_lora as _ada_lora  # noqa: F401 - registers the adapter
from fedloom.client import dora as _dora  # noqa: F401 - registers the adapter
from fedloom.client import full as _full  # noqa: F401 - registers the adapter
from fedloom.client import ia3 as _ia3  # noqa: F401 - registers the adapter
from fedloom.client import lora_sb as _lora_sb  # noqa: F401 - registers the adapter
from fedloom.client import p_tuning as _p_tuning  # noqa: F401 - registers the adapter
from fedloom.client import prefix_tuning as _prefix_tuning  # noqa: F401 - registers the adapter
from fedloom.client import prompt_tuning as _prompt_tuning  # noqa: F401 - registers the adapter
from fedloom.client import rslora as _rslora  # noqa: F401 - registers the adapter
from fedloom.client.adapters import Adapter, Lora
from fedloom.client.models import Model
from fedloom.client.objectives import Objective, Sft
from fedloom.client.trainer import Trainer
from fedloom.data.federation import Data
from fedloom.evaluate import Evaluator
from fedloom.evaluate.loss import Loss
from fedloom.parts import Record
from fedloom.runtime import processes as _processes  # noqa: F401 - registers the runtime
from fedloom.runtime.base import Runtime
from fedloom.runtime.local import LocalRuntime
from fedloom.server import robust as _robust  # noqa: F401 - registers the shipped rules
from fedloom.server.aggregate import Aggregator, Mean
from fedloom.server.optim import ServerOptimizer, ServerSgd
from fedloom.server.sampling import Sampler, Uniform
from fedloom.tracking import Tracker
from fedloom.types import RecipeError, suggest
from fedloom.wire.transforms import Transform

SUFFIXES = (".yaml", ".yml")
RESUMABLE = (
    "rounds",
    "evaluate",
    "adapt_steps",
    "adapt_lr",
    "early_stop",
    "checkpoint",
    "trackers",
    "compare",
    "budget",
)
"""Keys that a resume may change: none of them touches the training of the rounds that are already done."""


class ServerSection(Record):
    """The recipe's `server:` section."""

    optimizer: ServerOptimizer = ServerSgd()
    lr: PositiveFloat = 1.0
    """Server learning rate; with sgd, 1 is plain averaging."""
    aggregator: Aggregator = Mean()


class EarlyStop(Record):
    """Stop when an evaluator has not improved for a while."""

    evaluator: str
    """Name of an entry of `evaluate` that runs in the course of the run (`every` > 0)."""
    patience: PositiveInt = 5
    """Evaluations without improvement after which the run stops."""
    delta: NonNegativeFloat = 0.0
    """Smallest change that counts as an improvement."""


class Recipe(Record):
    """Everything about a run."""

    model: Model = Model(name="smollm2-135m")
    adapter: Adapter = Lora()
    objective: Objective = Sft()
    data: Data = Data()
    trainer: Trainer = Trainer()
    algorithm: Algorithm = FedAvg()
    sampler: Sampler = Uniform()
    server: ServerSection = ServerSection()
    transforms: tuple[Transform, ...] = ()
    """Ordered chain around every update."""
    attacks: tuple[Attack, ...] = ()
    runtime: Runtime = LocalRuntime()
    checkpoint: Checkpointing = Checkpointing()
    init: Path | None = None
    """PEFT folder of an adapter to start from."""
    evaluate: tuple[Evaluator, ...] = (Loss(),)
    trackers: tuple[Tracker, ...] = ()
    """Trackers beside the console and metrics.jsonl."""
    rounds: PositiveInt = 10
    early_stop: EarlyStop | None = None
    compare: tuple[Literal["local", "centralized"], ...] = ()
    """Further regimes to train on the same split."""
    budget: Literal["equal_tokens", "equal_rounds"] = "equal_tokens"
    """What the compared regimes share: trained tokens (all local clients together), or rounds and steps."""
    adapt_steps: NonNegativeInt = 0
    """Steps that every client takes on its own rows, from the adapter that it would use, before it is measured once
    more at the end, as a regime of its own (`federated adapted`, `unseen adapted`); 0: none."""
    adapt_lr: PositiveFloat | None = None
    """Learning rate of these steps, constant; null: the trainer's."""
    seed: int = Field(default=0, ge=0)

    @field_validator("trackers", mode="before")
    @classmethod
    def _console_is_always_there(cls, value: Any) -> Any:
        return [one for one in value if one != "console"] if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        problems = [*self.algorithm.conflicts(self), *self.adapter.conflicts(self), *self.runtime.conflicts(self)]
        problems += self._early_stop_problems()
        problems += self._federation_problems()
        names = [one.part_name for one in self.evaluate]
        problems += [f"evaluate: {name!r} is there twice" for name in sorted(set(names)) if names.count(name) > 1]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _federation_problems(self) -> Iterable[str]:
        """Yield which parts of the server's and the client's half do not go together."""
        algorithm, server, name = self.algorithm, self.server, f"algorithm={self.algorithm.part_name}"
        yield from self._crowd_problems()
        if algorithm.mirrored and self.transforms:
            named = ", ".join(one.part_name for one in self.transforms)
            yield (
                f"transforms={named}: with {name}, clients and server both keep {algorithm.mirrored} by adding up the "
                "changes that are sent, and would part where a transform alters them; set transforms=[]"
            )
        if algorithm.needs_lora and not self.adapter.pairs:
            yield f"{name} works on LoRA factors, which adapter={self.adapter.part_name} has not; set adapter=lora"
        yield from self._core_problems()
        if isinstance(self.adapter, Lora) and self.adapter.ranks and not algorithm.mixed_ranks:
            able = ", ".join(sorted(n for n, a in Algorithm.known.items() if getattr(a, "mixed_ranks", False)))
            yield f"{name} needs one rank at all clients; remove adapter.ranks, or set algorithm to one of: {able}"
        if algorithm.own_combine and server.aggregator != Mean():
            yield (
                f"server.aggregator={server.aggregator.part_name}: {name} combines updates itself "
                f"({algorithm.own_combine}); set server.aggregator=mean"
            )
        if algorithm.own_step and (server.optimizer != ServerSgd() or server.lr != 1):
            yield (
                f"server.optimizer={server.optimizer.part_name}, server.lr={server.lr:g}: {name} applies what was "
                f"combined itself ({algorithm.own_step}); set server.optimizer=sgd and server.lr=1"
            )
        if server.aggregator.products and not self.adapter.pairs:
            yield (
                f"server.aggregator.distance=product compares products of LoRA factors, which adapter="
                f"{self.adapter.part_name} has not; set server.aggregator.distance=factors, or adapter=lora"
            )

    def _crowd_problems(self) -> Iterable[str]:
        """Yield what does not go with the number of clients that train; it is asked once more with the rows at hand."""
        data, clients = self.data, self.data.training_clients()
        if not clients:
            return  # the rows tell, or none would train, which is refused where they are given out
        where = f"data.clients={data.clients}" + (f", data.unseen={data.unseen:g}" if data.unseen else "")
        yield from (f"{where}: {problem}" for problem in self.algorithm.check_clients(clients))
        with suppress(RecipeError):  # a cohort that cannot be drawn is refused where the clients are known
            yield from self.server.aggregator.conflicts(len(self.sampler.cohort(0, [""] * clients, self.seed)))

    def _core_problems(self) -> Iterable[str]:
        algorithm, adapter = self.algorithm, self.adapter
        if algorithm.needs_core and not adapter.core:
            yield (
                f"algorithm={algorithm.part_name} trains R of B R A alone, which adapter={adapter.part_name} has not; "
                "set adapter=lora-sb"
            )
        if adapter.core and not algorithm.needs_core:
            able = ", ".join(sorted(n for n, a in Algorithm.known.items() if getattr(a, "needs_core", False)))
            yield (
                f"adapter={adapter.part_name} has frozen factors, which algorithm={algorithm.part_name} would send "
                f"and average every round; set algorithm={able}, or adapter=lora"
            )

    def _early_stop_problems(self) -> Iterable[str]:
        if self.early_stop is None:
            return
        running = [one.part_name for one in self.evaluate if one.every > 0 and one.judges]
        if self.early_stop.evaluator not in running:
            hint = suggest(self.early_stop.evaluator, running)
            yield (
                f"early_stop.evaluator: {self.early_stop.evaluator!r} is not evaluated in the course of the run{hint} "
                f"on items of its own (with every > 0: {', '.join(running) or 'none'})"
            )

    def resolved(self) -> Self:
        """Return the recipe with every `auto` of the model replaced by what it stands for on this machine.

        The others depend on the data and the free memory: `settle` replaces them once both are known.
        """
        return self.model_copy(update={"model": self.model.resolved()})

    def judge(self) -> Evaluator | None:
        """Return the evaluator by which early stop and the best checkpoint judge; None: none runs between rounds."""
        running = [one for one in self.evaluate if one.every > 0 and one.judges]
        if self.early_stop is not None:
            return next(one for one in running if one.part_name == self.early_stop.evaluator)
        return next(iter(running), None)

    def dump(self) -> dict[str, Any]:
        """Return the recipe as plain values; `Recipe.model_validate` reads them back."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the recipe as YAML in the order of its keys."""
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True, width=120)


def shipped() -> dict[str, str]:
    """Return the shipped recipes and override files: name -> YAML text."""
    folder = resources.files("fedloom") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(SUFFIXES)), key=lambda f: f.name)
    return {f.name.rpartition(".")[0]: f.read_text(encoding="utf-8") for f in files}


def load(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    set_files: Sequence[str] = (),
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        recipe: a shipped name, a YAML file, or the mapping itself.
        overrides: `key=value` texts; the key is a dotted path, the value is YAML.
        set_files: shipped names or YAML files whose keys are laid over the recipe before `overrides`.
        settings: a mapping that is laid over last.

    Raises:
        RecipeError: something is unknown, not allowed or does not fit together; all such problems at once.
    """
    tree = dict(recipe) if isinstance(recipe, Mapping) else _read(str(recipe), "recipe")
    for name in set_files:
        tree = overlay(tree, _read(name, "override file"))
    for text in overrides:
        override(tree, text)
    tree = overlay(tree, settings)
    return validate(tree, "recipe" if isinstance(recipe, Mapping) else str(recipe))


def validate(tree: Mapping[str, Any], name: str) -> Recipe:
    """Return the recipe of a tree of plain values.

    Raises:
        RecipeError: with every problem on a line of its own.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_line(one["loc"], one["msg"], one["input"]) for one in error.errors(include_url=False)]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise RecipeError(f"{name}: {count}\n" + "\n".join(f"  {line}" for line in lines)) from None


def _line(loc: Sequence[str | int], message: str, got: Any) -> str:
    where = ".".join(str(part) for part in loc) or "recipe"
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    simple = isinstance(got, str | int | float | bool) or got is None
    return f"{where}: {message}" + (f" (got {got!r})" if simple and "there is no" not in message else "")


def overlay(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tree` with the keys of `over` laid on top; mappings merge unless they name another part."""
    merged = dict(tree)
    for key, value in over.items():
        old = merged.get(key)
        old = {"name": old} if isinstance(old, str) and isinstance(value, Mapping) else old
        same = (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("name", old.get("name")) == old.get("name")
        )
        merged[key] = overlay(old, value) if same and isinstance(old, Mapping) else value
    return merged


def override(tree: dict[str, Any], text: str) -> None:
    """Set one `dotted.path=value` in a tree of plain values, in place; branches on the way are replaced by copies.

    A bare part name on the way becomes `{name: ...}`; a number is an index into a list.

    Raises:
        RecipeError: the text has no `=`, the value is no YAML, or the path leads through a plain value.
    """
    path, equals, raw = text.partition("=")
    if not equals or not path:
        raise RecipeError(f"{text!r} is not of the form key=value, such as rounds=3 or trainer.lr=1e-3")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise RecipeError(f"{text!r}: the value is not YAML ({error})") from error
    *parents, last = path.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        child = _child(node, key, ".".join(parents[: depth + 1]))
        child = {} if child is None else {"name": child} if isinstance(child, str) else child
        if not isinstance(child, dict | list):
            raise RecipeError(f"{text!r}: {'.'.join(parents[: depth + 1])} is {child!r} and has no keys of its own")
        child = child.copy()  # the tree may share it with the mapping that a caller keeps
        _put(node, key, child)
        node = child
    _child(node, last, path)
    _put(node, last, value)


def _child(node: Any, key: str, path: str) -> Any:
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise RecipeError(f"{path}: the list has {len(node)} entries, numbered from 0; got {key!r}")
        return node[int(key)]
    return node.get(key)


def _put(node: Any, key: str, value: Any) -> None:
    node[int(key) if isinstance(node, list) else key] = value


class _Loader(yaml.SafeLoader):
    """Reads YAML of plain values and refuses a key that stands twice in one mapping, of which the last would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping's keys and values."""
        seen = set[str]()
        for key, _ in node.value:
            if key.value in seen:
                raise RecipeError(f"line {key.start_mark.line + 1}: the key {key.value!r} is there twice; keep one")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read(name: str, kind: str) -> dict[str, Any]:
    known = shipped()
    path = Path(name)
    if name in known:
        text = known[name]
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{kind} {name}: not UTF-8 text ({error}); save it as UTF-8") from error
    elif path.is_dir() and (path / "recipe.yaml").is_file():
        raise RecipeError(
            f"{name} is a run folder; repeat it with {path / 'recipe.yaml'}, or go on with --resume {name}"
        )
    else:
        looked = "no such file" if path.suffix in SUFFIXES or len(path.parts) > 1 else "no such name or file"
        raise RecipeError(
            f"{kind} {name!r}: {looked}{suggest(name, known)}; fedloom list recipes shows the shipped ones"
        )
    try:
        tree = yaml.load(text, _Loader)
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise RecipeError(f"{name}: {where}not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{name}: expected a mapping of recipe keys, got {type(tree).__name__}")
    return tree
