"""Trackers beside the console and metrics.jsonl; each needs its own extra."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fedloom.tracking import Evaluated, Event, RoundReport, Sink, Tracker
from fedloom.types import RecipeError


class Scalars(Sink):
    """Hands the scalars of rounds and evaluations to a library.

    Args:
        log: called with (name -> value, round).  close: called at the end.
    """

    def __init__(self, log: Callable[[Mapping[str, float], int], None], close: Callable[[], Any]) -> None:
        self.log, self.close = log, close

    def on(self, event: Event) -> None:
        match event:
            case RoundReport():
                speed = event.tokens / event.fit_seconds if event.fit_seconds else 0.0
                values = {"train_loss": event.loss, "tokens_per_second": speed, "bytes_up": float(event.bytes_up)}
                self.log(values, event.round)
            case Evaluated():
                where = "test" if event.final else "validation"
                prefix = f"{where}/{event.regime}/{event.evaluator}"
                self.log({f"{prefix}/{name}": value for name, value in event.metrics.items()}, event.round)
            case _:
                pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(
            f"trackers: {extra} is not installed; install it with: pip install 'fedloom[{extra}]'"
        ) from error


class TensorBoard(Tracker, name="tensorboard"):
    """Event files in the run folder, for `tensorboard --logdir`."""

    def open(self, name: str, folder: Path, recipe: Mapping[str, Any]) -> Sink:
        _library("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def log(values: Mapping[str, float], round_: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, round_)

        return Scalars(log, writer.close)


class Wandb(Tracker, name="wandb"):
    """Weights & Biases."""

    project: str = "fedloom"
    """Project that the run belongs to."""

    def open(self, name: str, folder: Path, recipe: Mapping[str, Any]) -> Sink:
        wandb = _library("wandb", "wandb")
        run = wandb.init(project=self.project, name=name, dir=str(folder), config=dict(recipe))
        return Scalars(lambda values, round_: run.log(dict(values), step=round_), run.finish)


class Trackio(Tracker, name="trackio"):
    """Trackio, a local tracker with wandb's interface."""

    project: str = "fedloom"
    """Project that the run belongs to."""

    def open(self, name: str, folder: Path, recipe: Mapping[str, Any]) -> Sink:
        trackio = _library("trackio", "trackio")
        trackio.init(project=self.project, name=name, config=dict(recipe))
        return Scalars(lambda values, round_: trackio.log(dict(values), step=round_), trackio.finish)


class Mlflow(Tracker, name="mlflow"):
    """MLflow, at the address that its own settings name."""

    experiment: str = "fedloom"
    """Experiment that the run belongs to."""

    def open(self, name: str, folder: Path, recipe: Mapping[str, Any]) -> Sink:
        mlflow = _library("mlflow", "mlflow")
        mlflow.set_experiment(self.experiment)
        mlflow.start_run(run_name=name)
        return Scalars(lambda values, round_: mlflow.log_metrics(dict(values), step=round_), mlflow.end_run)
