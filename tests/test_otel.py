"""Traces of a run: what they say, and that a whole run sends them where it is told to."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loopwright.orchestrator.cli import DONE
from loopwright.orchestrator.otel import OtelTracker
from loopwright.orchestrator.recorder import Recorder
from loopwright.orchestrator.trackers import Trackers
from tests.tiny_run import train


def test_a_step_is_a_trace_of_its_verbs_and_episodes() -> None:
    kept = InMemorySpanExporter()
    tracker = OtelTracker("demo", exporter=kept)
    recorder = Recorder(Trackers(spans={"otel": tracker}))
    with recorder.timed("start_actors"):
        pass
    tracker.log(1, {"time/train_s": 0.5, "rollout/reward_mean": 0.25})
    tracker.span("episode", 2.0, {"task": "t-1", "attempt": 3, "reward": 1.0})
    with recorder.timed("publish"):
        recorder.event("actor_lost", actor="trainer", why=ValueError("gone"))
    tracker.log(2, {"eval/success": 0.5})  # an evaluation ends no step
    tracker.log(2, {"time/train_s": 0.5})
    tracker.close()
    spans = {(s.name, s.attributes.get("step", -1)): s for s in kept.get_finished_spans()}
    first, second = spans["step", 1], spans["step", 2]
    assert first.resource.attributes["loopwright.run"] == "demo"
    assert first.attributes["rollout/reward_mean"] == 0.25
    assert second.attributes["eval/success"] == 0.5
    episode, publish = spans["episode", -1], spans["publish", -1]
    assert spans["start_actors", -1].parent.span_id == first.context.span_id
    assert episode.parent.span_id == publish.parent.span_id == second.context.span_id
    assert first.context.trace_id != second.context.trace_id == episode.context.trace_id
    assert (episode.end_time - episode.start_time) / 1e9 == pytest.approx(2.0, abs=1e-3)
    assert dict(episode.attributes) == {"task": "t-1", "attempt": 3, "reward": 1.0}
    (event,) = second.events
    assert event.name == "actor_lost"
    assert dict(event.attributes) == {"actor": "trainer", "why": "gone"}


def test_a_tracer_that_fails_is_left_out_and_the_run_goes_on() -> None:
    class Failing(OtelTracker):
        def span(self, name: str, seconds: float, attributes: Any) -> None:
            calls.append(name)
            raise OSError("no route")

    calls: list[str] = []
    tracker = Failing("demo", exporter=InMemorySpanExporter())
    recorder = Recorder(Trackers(spans={"otel": tracker}))
    for _ in range(3):
        with recorder.timed("take"):
            pass
    assert calls == ["take"]
    tracker.close()


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP endpoint on this machine: its address, and what it was sent."""
    got: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_run_sends_its_traces(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as (address, got):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        code, _ = train(tmp_path, policy, 'run.trackers=["otel"]', "run.steps=2")
        assert code == DONE
    spans = [s for r in got for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans]
    steps = [s for s in spans if s.name == "step"]
    assert len(steps) >= 2
    assert {"take", "train", "publish", "evaluate", "checkpoint"} <= {s.name for s in spans}
    assert sum(s.name == "episode" for s in spans) >= 2 * 2 * 4
    known = {s.span_id for s in steps}
    assert all(s.parent_span_id in known for s in spans if s.name != "step")
