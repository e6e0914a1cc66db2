"""OpenTelemetry traces of a run: one trace a step, the loop's verbs and the episodes that came back
meanwhile as its spans.

    step ─┬─ take, train, publish, evaluate, checkpoint      as `time/<verb>_s` measures them
          └─ episode …                                       with task, attempt, reward, tokens

Where they go is OpenTelemetry's own affair (`OTEL_EXPORTER_OTLP_ENDPOINT`, default
http://localhost:4318). A step's trace is complete when the step is logged; what comes before the
first is step 0. Events of the run (restarts, faults) are events of the step's span.
"""

import importlib
import time
from collections.abc import Mapping
from typing import Any

_NANO = 1_000_000_000
_TOLD = ("rollout/reward_mean", "rollout/lag_max", "rollout/tokens", "train/loss", "eval/success")


class OtelTracker:
    """A tracker that draws spans. `exporter`: a span exporter of the SDK's; none: OTLP by HTTP."""

    def __init__(self, run_name: str, *, exporter: Any = None) -> None:
        """Raises `ImportError` where the SDK is not installed."""
        trace = importlib.import_module("opentelemetry.sdk.trace")
        resources = importlib.import_module("opentelemetry.sdk.resources")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        self._api = importlib.import_module("opentelemetry.trace")
        if exporter is None:
            otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
            exporter = otlp.OTLPSpanExporter()
        resource = resources.Resource.create(
            {"service.name": "loopwright", "loopwright.run": run_name}
        )
        self._provider = trace.TracerProvider(resource=resource)
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("loopwright")
        self._step: Any = None  # the span of the step under way
        self._last = 0  # step that was logged

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """End the span of a training step; an evaluation is told on the one under way."""
        span = self._under_way(time.time())
        for name in _TOLD:
            if name in metrics:
                span.set_attribute(name, metrics[name])
        if "time/train_s" in metrics:
            span.set_attribute("step", step)
            self._end()
        self._last = step

    def event(self, kind: str, **fields: Any) -> None:
        """An event of the step under way."""
        plain = {name: _plain(value) for name, value in fields.items()}
        self._under_way(time.time()).add_event(kind, plain)

    def span(self, name: str, seconds: float, attributes: Mapping[str, Any]) -> None:
        """Something that took so long has just ended."""
        now = time.time()
        step = self._under_way(now - seconds)
        context = self._api.set_span_in_context(step)
        span = self._tracer.start_span(
            name,
            context=context,
            start_time=round((now - seconds) * _NANO),
            attributes={key: _plain(value) for key, value in attributes.items()},
        )
        span.end(round(now * _NANO))

    def close(self) -> None:
        """Send what is held back."""
        if self._step is not None:
            self._end()
        self._provider.shutdown()

    def _under_way(self, began_unix_s: float) -> Any:
        if self._step is None:
            self._step = self._tracer.start_span(
                "step", start_time=round(began_unix_s * _NANO), attributes={"step": self._last}
            )
        return self._step

    def _end(self) -> None:
        self._step.end()
        self._step = None


def _plain(value: Any) -> str | bool | int | float:
    return value if isinstance(value, str | bool | int | float) else str(value)
