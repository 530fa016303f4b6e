"""Trackers beside the console and metrics.jsonl; each needs its own extra, and none of them can stop a run."""

from __future__ import annotations

import importlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any

from fedloom.tracking import Evaluated, Event, Plan, RoundReport, Sink, Step, Tracker, Warned
from fedloom.types import RecipeError

PATIENCE = 60.0
"""Seconds that a run waits for a tracker to open, and again for it to end."""
WAITING = 10_000
"""Events that may wait for a tracker; one that is further behind is given up."""


def open_all(trackers: Sequence[Tracker], folder: Path, recipe: Mapping[str, Any], tell: Sink | None) -> list[Guarded]:
    """Open the trackers of a run, each on a thread of its own, where its failures stay.

    Args:
        folder: the run folder.  recipe: the resolved recipe.  tell: is told, once each, which tracker failed and how.

    Raises:
        RecipeError: what a tracker needs is not installed, or one of its options is wrong.
    """
    told: Callable[[Event], None] = tell.on if tell else lambda event: None
    opened: list[Guarded] = []
    for one in trackers:
        opened.append(Guarded(one, lambda one=one: one.open(folder.name, folder, recipe), told))  # type: ignore[misc]
        try:
            opened[-1].start()
        except RecipeError as error:
            for other in opened[:-1]:
                other.__exit__(RecipeError, error, None)
            raise
    return opened


class Guarded(Sink):
    """A tracker behind a queue: its thread opens it, hands it the events and ends it.

    What it raises, or a hang, is told once; from then on it gets no more events.

    Args:
        tracker: whose name is told.  opener: returns its sink.  tell: takes the warning.  patience: in seconds.
    """

    def __init__(
        self,
        tracker: Tracker,
        opener: Callable[[], Sink],
        tell: Callable[[Event], None],
        patience: float = PATIENCE,
    ) -> None:
        self._name, self._opener, self._tell, self._patience = tracker.part_name, opener, tell, patience
        self._events: queue.Queue[Event | tuple[Any, Any, Any]] = queue.Queue(WAITING)
        self._opened = threading.Event()
        self._failed: BaseException | None = None
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {self._name}", daemon=True)

    def start(self) -> None:
        """Open the tracker; one that takes longer than the patience goes on opening while the run begins.

        Raises:
            RecipeError: it cannot be opened because of what the recipe says.
        """
        self._thread.start()
        with redirect_stdout(sys.stderr):  # standard output is for results alone
            done = self._opened.wait(self._patience)
        if isinstance(self._failed, RecipeError):
            raise self._failed
        if not done:
            self._tell(Warned(f"tracker {self._name}: not open after {self._patience:g} s; the run begins without it"))
        self._check()

    def on(self, event: Event) -> None:
        if isinstance(event, Step) or self._given_up:
            return  # steps are many, and no tracker wants them
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._give_up(f"is {WAITING} events behind")
        self._check()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._given_up:
            self._events.put((kind, error, trace))
            with redirect_stdout(sys.stderr):
                self._thread.join(self._patience)
            if self._thread.is_alive():
                self._give_up(f"has not ended after {self._patience:g} s")
        self._check()

    def _work(self) -> None:
        try:
            with _announced(self._opened):
                sink = self._opener()
            while isinstance(event := self._events.get(), Event):
                sink.on(event)
            sink.__exit__(*event)
        except BaseException as error:  # a library may even call sys.exit
            self._failed = error

    def _check(self) -> None:
        if self._failed is not None and not self._given_up:
            words = str(self._failed).strip().partition("\n")[0]
            self._give_up(f"failed: {type(self._failed).__name__}{': ' if words else ''}{words}")

    def _give_up(self, why: str) -> None:
        self._given_up = True
        self._tell(Warned(f"tracker {self._name} {why}; the run goes on without it (metrics.jsonl has everything)"))


@contextmanager
def _announced(event: threading.Event) -> Iterator[None]:
    """Set an event when the block is left in whatever way; a failure is kept by whoever runs the block."""
    try:
        yield
    finally:
        event.set()


class Scalars(Sink):
    """Hands the scalars of rounds and evaluations to a library.

    Names are train/REGIME/METRIC and SPLIT/REGIME/EVALUATOR/METRIC, since the compared regimes count the same rounds.

    Args:
        log: called with (name -> value, round).  close: called at the end; True: the run finished.
    """

    def __init__(self, log: Callable[[Mapping[str, float], int], None], close: Callable[[bool], Any]) -> None:
        self.log, self.close, self.regime = log, close, "federated"

    def on(self, event: Event) -> None:
        match event:
            case Plan():
                self.regime = event.regime
            case RoundReport():
                self.log({f"train/{self.regime}/{name}": value for name, value in _of(event).items()}, event.round)
            case Evaluated():
                where = "test" if event.final else "validation"
                prefix = f"{where}/{event.regime}/{event.evaluator}"
                self.log({f"{prefix}/{name}": value for name, value in event.metrics.items()}, event.round)
            case _:
                pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(kind is None)


def _of(report: RoundReport) -> dict[str, float]:
    values = {
        "loss": report.loss,
        "tokens_per_second": report.tokens / report.fit_seconds if report.fit_seconds else 0.0,
        "bytes_down": float(report.bytes_down),
        "bytes_up": float(report.bytes_up),
        "clients": float(len(report.clients)),
        "rejected": float(len(report.rejected)),
        "seconds": report.seconds,
    }
    error = report.aggregation_error
    return values if error is None else {**values, "aggregation_error": error}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a recipe as dotted keys and texts, for libraries that list settings."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found


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
            writer.flush()  # a disk that is full shows here, not when the run is long over

        return Scalars(log, lambda finished: writer.close())


class Wandb(Tracker, name="wandb"):
    """Weights & Biases; WANDB_MODE=offline keeps everything in the run folder."""

    project: str = "fedloom"
    """Project that the run belongs to."""

    def open(self, name: str, folder: Path, recipe: Mapping[str, Any]) -> Sink:
        wandb = _library("wandb", "wandb")
        run = wandb.init(project=self.project, name=name, dir=str(folder), config=dict(recipe))
        # its own step must never go back, which rounds do when the next regime begins
        run.define_metric("round")
        run.define_metric("*", step_metric="round")
        return Scalars(
            lambda values, round_: run.log({**values, "round": round_}),
            lambda finished: run.finish(exit_code=0 if finished else 1),
        )


class Trackio(Tracker, name="trackio"):
    """Trackio, a local tracker with wandb's interface."""

    project: str = "fedloom"
    """Project that the run belongs to."""

    def open(self, name: str, folder: Path, recipe: Mapping[str, Any]) -> Sink:
        trackio = _library("trackio", "trackio")
        trackio.init(project=self.project, name=name, config=dict(recipe))
        return Scalars(
            lambda values, round_: trackio.log({**values, "round": round_}), lambda finished: trackio.finish()
        )


class Mlflow(Tracker, name="mlflow"):
    """MLflow, at the address that its own settings name (MLFLOW_TRACKING_URI)."""

    experiment: str = "fedloom"
    """Experiment that the run belongs to."""

    def open(self, name: str, folder: Path, recipe: Mapping[str, Any]) -> Sink:
        mlflow = _library("mlflow", "mlflow")
        client = mlflow.MlflowClient()
        found = client.get_experiment_by_name(self.experiment)
        experiment = client.create_experiment(self.experiment) if found is None else found.experiment_id
        run = client.create_run(experiment, run_name=name).info.run_id
        for key, text in flat(recipe).items():
            client.log_param(run, key, text)

        def log(values: Mapping[str, float], round_: int) -> None:
            now = int(time.time() * 1000)
            client.log_batch(run, metrics=[mlflow.entities.Metric(k, v, now, round_) for k, v in values.items()])

        return Scalars(log, lambda finished: client.set_terminated(run, "FINISHED" if finished else "FAILED"))
