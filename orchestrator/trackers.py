"""Where metrics and events go: files, the console, TensorBoard, Weights & Biases, MLflow,
OpenTelemetry (otel.py).

Files and console belong to the run: if they fail, the run says so and stops. The others are guests:
the first failure of each is a warning, after which it is left out, and the run goes on.
"""

import contextlib
import importlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TextIO

from loopwright.orchestrator.console import Console
from loopwright.orchestrator.otel import OtelTracker

_logger = logging.getLogger(__name__)


class TrackerError(Exception):
    """A tracker that is not installed or cannot write; the text says the remedy."""


class Tracker(Protocol):
    """One place where a run is recorded."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step. Names are `group/name`."""
        ...

    def event(self, kind: str, **fields: Any) -> None:
        """Record that something happened once. Where there is no place for it, nothing happens."""
        ...

    def close(self) -> None:
        """Write what is held back and let go."""
        ...


class JsonlTracker:
    """`metrics.jsonl` and `events.jsonl` in the run directory, one object a line, each written at
    once and whole or not at all.

    Every line has `unix_s`, the seconds since 1970. Numbers that are not finite become null. A
    resumed run appends.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # no buffer: what a full disk did not take would fail again when the file is closed
            self._metrics = (folder / "metrics.jsonl").open("ab", buffering=0)
            self._events = (folder / "events.jsonl").open("ab", buffering=0)
        except OSError as error:
            raise TrackerError(f"cannot write in {folder}: {error.strerror}") from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append to `metrics.jsonl`. Raises `TrackerError` if the disk does not take it."""
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._write(self._metrics, {"step": step, **finite})

    def event(self, kind: str, **fields: Any) -> None:
        """Append to `events.jsonl`. Values that JSON does not know are written as text."""
        self._write(self._events, {"kind": kind, **fields})

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._events.close()

    def _write(self, file: FileIO, record: Mapping[str, Any]) -> None:
        line = json.dumps({"unix_s": round(self._clock(), 3), **record}, default=str) + "\n"
        rest = memoryview(line.encode())
        whole = os.fstat(file.fileno()).st_size
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), whole)
            raise TrackerError(
                f"cannot write {file.name}: {error.strerror}; free space, then go on with --resume"
            ) from error


class SpanTracker(Tracker, Protocol):
    """One that also wants to know how long each thing took."""

    def span(self, name: str, seconds: float, attributes: Mapping[str, Any]) -> None:
        """Something that took so long has just ended."""
        ...


class TensorboardTracker:
    """Scalars for TensorBoard below `folder`."""

    def __init__(self, folder: Path) -> None:
        summary = _import("tensorboard.summary", extra="tensorboard")
        self._writer = summary.Writer(str(folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def event(self, kind: str, **fields: Any) -> None:
        """TensorBoard has no place for events; they are in `events.jsonl`."""

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases; signing in and offline mode are its own (`WANDB_MODE`)."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        wandb = _import("wandb", extra="wandb")
        self._run = wandb.init(
            project="loopwright", name=name, dir=str(folder), config=dict(config), resume="allow"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log under the metric names as they are."""
        self._run.log(dict(metrics), step=step)

    def event(self, kind: str, **fields: Any) -> None:
        """Keep the latest event of each kind in the run's summary."""
        self._run.summary[f"event/{kind}"] = {k: str(v) for k, v in fields.items()}

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowTracker:
    """A run of MLflow; the server is its own affair (`MLFLOW_TRACKING_URI`)."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._mlflow = _import("mlflow", extra="mlflow")
        self._mlflow.set_experiment("loopwright")
        self._mlflow.start_run(run_name=name)
        flat = {f"{t}.{k}": v for t, values in config.items() for k, v in values.items()}
        self._mlflow.log_params(flat)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log under the metric names as they are."""
        self._mlflow.log_metrics(dict(metrics), step=step)

    def event(self, kind: str, **fields: Any) -> None:
        """Set a tag with the latest event of each kind."""
        self._mlflow.set_tag(f"event.{kind}", json.dumps(fields, default=str))

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class Trackers:
    """All trackers of a run as one. `console` shows phases and progress, if there is one.

    `own` trackers may stop the run; `guests`, by name, may not.
    """

    def __init__(
        self,
        own: Iterable[Tracker] = (),
        guests: Mapping[str, Tracker] | None = None,
        console: Console | None = None,
        spans: Mapping[str, SpanTracker] | None = None,
    ) -> None:
        """`spans` are guests too."""
        self._spans = dict(spans or {})
        self._own = [*own, *([console] if console is not None else [])]
        self._guests: dict[str, Tracker] = {**(guests or {}), **self._spans}
        self._console = console

    def join(self, name: str, guest: Tracker) -> None:
        """One more guest, that could not be there from the beginning."""
        self._guests[name] = guest

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the metrics to every tracker."""
        self._each(lambda tracker: tracker.log(step, metrics))

    def event(self, kind: str, **fields: Any) -> None:
        """Hand the event to every tracker."""
        self._each(lambda tracker: tracker.event(kind, **fields))

    def span(self, name: str, seconds: float, **attributes: Any) -> None:
        """Something that took so long has just ended."""
        for guest, tracker in self._spans.items():
            if guest in self._guests:
                self._try(guest, partial(tracker.span, name, seconds, attributes))

    def phase(self, text: str) -> None:
        """Show what the run is doing now."""
        if self._console is not None:
            self._console.phase(text)

    def progress(self, text: str, done: int, total: int) -> None:
        """Show how far `text` has come."""
        if self._console is not None:
            self._console.progress(text, done, total)

    def close(self) -> None:
        """Close every tracker, the console last, so that its last state stays on the screen."""
        self._each(lambda tracker: tracker.close())

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, guest in list(self._guests.items()):
            self._try(name, partial(do, guest))
        for tracker in self._own:
            do(tracker)

    def _try(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception:  # whatever it raises, the run is worth more than its record there
            _logger.warning("tracker %s failed, left out from here on", name, exc_info=True)
            del self._guests[name]


def open_trackers(
    names: Iterable[str],
    folder: Path,
    *,
    run_name: str,
    total_steps: int,
    config: Mapping[str, Any],
    out: TextIO | None = None,
) -> Trackers:
    """The trackers `names` (`run.trackers`) for the run directory `folder`.

    `config` is the configuration by table, for those that store it.

    Raises:
        TrackerError: one is not installed or cannot write; before anything else is started.
    """
    own: list[Tracker] = []
    guests: dict[str, Tracker] = {}
    spans: dict[str, SpanTracker] = {}
    chosen = list(names)
    for name in chosen:
        if name == "jsonl":
            own.append(JsonlTracker(folder))
        elif name == "tensorboard":
            guests[name] = TensorboardTracker(folder / "tensorboard")
        elif name == "wandb":
            guests[name] = WandbTracker(folder, run_name, config)
        elif name == "mlflow":
            guests[name] = MlflowTracker(run_name, config)
        elif name == "otel":
            _import("opentelemetry.exporter.otlp.proto.http", extra="otel")
            spans[name] = OtelTracker(run_name)
    shown = "console" in chosen
    console = Console(name=run_name, total_steps=total_steps, out=out) if shown else None
    return Trackers(own, guests, console, spans)


def _import(module: str, *, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrackerError(
            f"tracker {extra!r} needs {module} ({error}); pip install 'loopwright[{extra}]'"
        ) from error
