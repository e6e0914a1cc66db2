"""A run that was killed again and again is the run that was not: same rollouts trained, each once,
and weights that are equal to the bit at every step.

Whole runs in one process (`cluster.address = "none"`), synchronous, killed by SIGKILL from outside
at random steps, and from within at exact points of a publish and of a checkpoint. The processes are
forked from one that has imported everything, so that a death costs no import. The same on Ray is in
test_faults.py and benchmarks/chaos.py.
"""

import importlib.util
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loopwright.actors.shared_memory import SEGMENT_FOLDER, SEGMENT_PREFIX
from loopwright.orchestrator.cli import DONE, main
from loopwright.orchestrator.ledger import FILE, audit, read
from tests.blows import KILL_POINTS, POINTS
from tests.driven_run import NAME, build_policy, write_config

STEPS, P, K = 12, 4, 3  # steps, groups per step, rollouts of a group
OURS_AND_SLOW = ("loopwright.", "torch", "transformers", "tokenizers", "safetensors", "matplotlib")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, int]]:
    """The policy, and the checksum of each version of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    model = build_policy(folder / "model")
    assert main(["train", str(write_config(folder, model, steps=STEPS))]) == DONE
    checksums = read(folder / "runs" / NAME / "ledger" / FILE).checksums
    assert len(set(checksums.values())) == STEPS, "each step changes the weights"
    return model, checksums


def _train(config: str, resume: bool, points: str) -> None:
    """The child: a run whose exit code is the process's."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 for as long as it lives
    os.environ["LOOPWRIGHT_CHAOS"] = points
    spec = importlib.util.spec_from_file_location("kill_points", KILL_POINTS / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # from here on it listens
    sys.exit(main(["train", config, *(["--resume"] if resume else [])]))


class Killed:
    """A run in processes that are killed."""

    def __init__(self, folder: Path, model: str) -> None:
        self._config = write_config(folder, model, steps=STEPS)
        self.folder = folder / "runs" / NAME
        self.points = folder / "points"
        self.points.mkdir()
        self._context = multiprocessing.get_context("forkserver")
        # all that the undisturbed run has imported, also what it imports late
        known = sorted(name for name in sys.modules if name.startswith(OURS_AND_SLOW))
        self._context.set_forkserver_preload(known)

    def steps(self) -> int:
        """The newest step in `metrics.jsonl`."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(True) if path.exists() else []
        return max((json.loads(x)["step"] for x in lines if x.endswith("\n")), default=0)

    def go(self, until: Callable[[], bool] = lambda: False) -> int:
        """Start or go on, and kill it when that is the case; its exit code, −9 when killed."""
        resume = (self.folder / "config.toml").exists()
        process = self._context.Process(
            target=_train, args=(str(self._config), resume, str(self.points))
        )
        process.start()
        deadline = time.monotonic() + 240
        while process.is_alive() and not until():
            assert time.monotonic() < deadline, f"step {self.steps()} after 240 s"
            process.join(0.005)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join(10)
        return process.exitcode or 0

    def assert_equal(self, checksums: dict[int, int]) -> None:
        """It is over, and nothing in it tells of the deaths but its events."""
        found = audit(self.folder / "ledger" / FILE)
        assert (found.unused, found.twice, found.unknown) == ((), (), ())
        assert found.trained == STEPS * P * K
        assert read(self.folder / "ledger" / FILE).checksums == checksums
        assert list(SEGMENT_FOLDER.glob(f"{SEGMENT_PREFIX}{NAME}-*")) == []


def test_killed_at_five_random_steps(
    tmp_path: Path, undisturbed: tuple[str, dict[int, int]]
) -> None:
    model, checksums = undisturbed
    run = Killed(tmp_path, model)
    for step in sorted(random.Random(11).sample(range(1, STEPS - 1), 5)):
        assert run.go(lambda step=step: run.steps() >= step) == -signal.SIGKILL
    assert run.go() == DONE
    run.assert_equal(checksums)


def test_killed_at_every_point_of_publish_and_checkpoint(
    tmp_path: Path, undisturbed: tuple[str, dict[int, int]]
) -> None:
    model, checksums = undisturbed
    run = Killed(tmp_path, model)
    assert run.go(lambda: run.steps() >= 1) == -signal.SIGKILL
    for point in POINTS:
        (run.points / "armed").write_text(point)
        assert run.go() == -signal.SIGKILL, f"nothing came to {point!r}"
        (run.points / "fired").unlink()
    assert run.go() == DONE
    run.assert_equal(checksums)
