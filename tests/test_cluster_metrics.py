"""What a run logs can be read from Ray's Prometheus endpoint."""

import time
import urllib.request

import pytest

from loopwright.orchestrator.cluster import Needs, connect

_DEADLINE_S = 90.0


def test_metrics_and_events_reach_the_nodes_endpoint() -> None:
    ray = pytest.importorskip("ray")
    cluster = connect(
        "local",
        lambda resources: Needs(one_node_cpus=1),
        cpus=1,
        object_store_bytes=80 << 20,
        timeout_s=_DEADLINE_S,
        say=lambda text: None,
    )
    try:
        exported = cluster.tracker("demo")
        assert exported is not None
        exported.log(7, {"rollout/lag_max": 1.0, "engine/1/busy_frac": 0.25})
        exported.event("actor_lost", actor="rollout 1")
        (node,) = ray.nodes()
        page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        found = _until(page, wanted=4)
    finally:
        cluster.shutdown()
    assert found == {
        ("ray_loopwright_step", 'run="demo"', "7"),
        ("ray_loopwright_rollout_lag_max", 'run="demo"', "1"),
        ("ray_loopwright_engine_busy_frac", 'engine="1"', "0.25"),
        ("ray_loopwright_events_total", 'kind="actor_lost"', "1"),
    }


def _until(page: str, *, wanted: int) -> set[tuple[str, str, str]]:
    """(name, the label that tells, value) of our series, once there are `wanted` of them; Ray
    exports every few seconds."""
    ends = time.monotonic() + _DEADLINE_S
    found: set[tuple[str, str, str]] = set()
    while len(found) < wanted and time.monotonic() < ends:
        with urllib.request.urlopen(page, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        for line in lines:
            if line.startswith("ray_loopwright_"):
                name, value = line.partition("{")[0], line.rsplit(" ", 1)[1]
                labels = dict(part.split("=", 1) for part in _labels(line))
                key = "engine" if "engine_" in name else "kind" if "events" in name else "run"
                found.add((name, f"{key}={labels[key]}", f"{float(value):g}"))
        time.sleep(0.5)
    return found


def _labels(line: str) -> list[str]:
    return [part for part in line.partition("{")[2].rpartition("}")[0].split(",") if "=" in part]
