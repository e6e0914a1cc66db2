"""Console and trackers: what is shown and written, and what a failing tracker may do to a run."""

import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loopwright.orchestrator.console import Console, duration, success_text
from loopwright.orchestrator.trackers import (
    JsonlTracker,
    TensorboardTracker,
    TrackerError,
    Trackers,
    open_trackers,
)

STEP = {
    "rollout/reward_mean": 0.4125,
    "rollout/lag_max": 1.0,
    "rollout/lag_mean": 0.25,
    "engine/0/tokens_per_s": 1234.0,
    "engine/1/tokens_per_s": 990.4,
    "queue/ready_groups": 3.0,
    "time/take_s": 1.5,
    "time/train_s": 2.0,
    "time/train_forward_s": 1.0,
    "time/elapsed_s": 50.0,
    "fault/infra_total": 2.0,
}


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Broken:
    """A tracker whose server is away; it counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.asked += 1
        raise ConnectionError("no server")

    def event(self, kind: str, **fields: Any) -> None:
        self.asked += 1

    def close(self) -> None:
        self.asked += 1


def test_a_pipe_gets_one_line_per_step() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(name="demo", total_steps=4, out=out, clock=clock)
    console.log(1, STEP)
    clock.now = 30.0
    console.log(1, {"eval/success": 0.5, "time/evaluate_s": 9.0})
    console.log(2, STEP)
    console.close()
    first, _, second = out.getvalue().splitlines()
    assert first.startswith("step 1/4  reward 0.412  policy lag mean 0.25, max 1")
    assert "0: 1,234, 1: 990" in second
    assert "seconds take 1.5, train 2.0  faults" in second  # not the evaluation's, no parts
    assert "infra 2" in second
    assert second.endswith("30s, about 1m00s left")  # 30 s a step, two to go
    assert "\x1b" not in out.getvalue()


def test_the_colour_of_the_data_is_shown_where_it_is_reported() -> None:
    out = io.StringIO()
    console = Console(name="demo", total_steps=4, out=out, clock=Clock())
    more = {
        "train/ratio_clipped_frac": 0.125,
        "train/mismatch_capped_frac": 0.02,
        "train/mismatch_ess_frac": 0.9,
        "train/mismatch_kl_k3_mean": 0.0123,
        "rollout/cancelled": 3.0,
        "rollout/cancelled_tokens_mean": 410.0,
        "trainer/idle_frac": 0.25,
        "engine/0/idle_frac": 0.5,
    }
    console.log(1, STEP | more)
    console.close()
    told = out.getvalue()
    assert "off-policy mismatch KL 0.0123, 12.5% clipped, 2.0% capped, 90% effective" in told
    assert "left out 3 cancelled after 410 tokens, 0 discarded" in told
    assert "idle trainer 25%, engine 0 50%" in told


def test_success_tells_cloning_from_rl() -> None:
    assert success_text([]) == ""
    assert success_text([(0, 0.0)]) == "0%"
    assert success_text([(0, 0.0), (0, 0.31)]) == "0% → 31%"
    assert success_text([(0, 0.0), (0, 0.31), (10, 0.5), (20, 0.78)]) == "0% → 31% → 78%"
    assert success_text([(0, 0.31), (20, 0.78)]) == "31% → 78%"


def test_an_evaluation_is_a_line_of_its_own() -> None:
    out = io.StringIO()
    console = Console(name="demo", total_steps=4, out=out, clock=Clock())
    console.log(0, {"eval/success": 0.25, "time/evaluate_s": 3.0})
    console.log(2, {"eval/success": 0.5})
    assert out.getvalue().splitlines() == [
        "step 0/4  held-out success 25.0% (25%)",
        "step 2/4  held-out success 50.0% (25% → 50%)",
    ]


def test_progress_is_thinned_where_lines_stay() -> None:
    out = io.StringIO()
    console = Console(name="demo", total_steps=4, out=out, clock=Clock())
    console.phase("starting Ray")
    for _ in range(2):  # the second evaluation is reported like the first
        for done in range(101):
            console.progress("evaluate", done, 100)
    lines = out.getvalue().splitlines()
    assert lines[0] == "starting Ray …"
    assert lines[1:] == [f"evaluate {n}/100" for n in (20, 40, 60, 80, 100)] * 2


def test_a_terminal_gets_a_dashboard() -> None:
    out = Terminal()
    console = Console(name="demo", total_steps=4, out=out, clock=Clock())
    console.log(0, {"eval/success": 0.25})
    console.log(3, STEP)
    console.event("actor_lost", name="rollout-0")
    console.close()
    shown = out.getvalue()
    for text in ("loopwright · demo", "3 of 4", "25%", "1,234", "ready groups 3", "rollout-0"):
        assert text in shown


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (3900, "1h05m")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_jsonl_is_readable_line_by_line_and_appended_to(tmp_path: Path) -> None:
    for step in (1, 2):
        tracker = JsonlTracker(tmp_path, clock=lambda: 5.0)
        tracker.log(step, {"train/loss": float("nan"), "rollout/reward_mean": 0.5})
        tracker.event("checkpoint", step=step, path=tmp_path)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close: flushed
        assert json.loads(lines[-1]) == {
            "unix_s": 5.0,
            "step": step,
            "train/loss": None,
            "rollout/reward_mean": 0.5,
        }
        tracker.close()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [1, 2]
    assert events[0]["path"] == str(tmp_path)


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackerError, match=r"cannot write in .*file"):
        JsonlTracker(tmp_path / "file" / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker = JsonlTracker(tmp_path)
    with pytest.raises(TrackerError, match=r"No space left on device; free space, then .*--resume"):
        tracker.log(1, {"train/loss": 1.0})


def test_a_failing_guest_is_left_out_after_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    trackers = Trackers([JsonlTracker(tmp_path)], {"remote": broken})
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            trackers.log(step, {"train/loss": 1.0})
        trackers.close()
    assert broken.asked == 1
    assert [record.getMessage() for record in caplog.records] == [
        "tracker remote failed, left out from here on"
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_tensorboard_writes_what_its_own_reader_reads(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = TensorboardTracker(tmp_path)
    tracker.log(1, {"train/loss": 1.5})
    tracker.log(2, {"train/loss": 0.5})
    tracker.close()
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    values = [float(t.float_val[0]) for t in (e.tensor_proto for e in events.Tensors("train/loss"))]
    assert values == [1.5, 0.5]


def test_open_trackers_shows_and_writes(tmp_path: Path) -> None:
    out = io.StringIO()
    trackers = open_trackers(
        ["console", "jsonl"], tmp_path, run_name="demo", total_steps=4, config={}, out=out
    )
    trackers.phase("starting Ray")
    trackers.log(1, STEP)
    trackers.event("checkpoint", step=1)
    trackers.close()
    assert out.getvalue().startswith("starting Ray …\nstep 1/4")
    assert (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "events.jsonl").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_tracker_names_its_extra(tmp_path: Path, name: str) -> None:
    try:
        __import__(name)
    except ImportError:
        with pytest.raises(TrackerError, match=rf"loopwright\[{name}\]"):
            open_trackers([name], tmp_path, run_name="demo", total_steps=1, config={})
    else:
        pytest.skip(f"{name} is installed")
