"""A training run as its user has it: the command line in a process of its own, watched through the
files it writes, its actors found by the process ids it records.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from loopwright.actors.tiny_model import build_tiny_policy
from loopwright.orchestrator.ledger import FILE, LedgerState, read

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / "tests" / "fault_envs.py"
NAME = f"faults-{os.getpid()}"  # of every run here: its shared memory is told from other sessions'
_MARK = "LOOPWRIGHT_TEST_RUN"  # in the environment of the driver and all it starts

CONFIG = """
[run]
name = "{name}"
dir = "{dir}"
steps = {steps}
eval_every = 0
checkpoint_every = 2
trackers = ["jsonl"]
max_restarts = 12

[model]
path = "{model}"

[environment]
name = "{environments}:{environment}"
max_new_tokens = 6
max_context = 96
episode_timeout_s = 20

[rollout]
group_size = 3
groups_per_step = 4
max_lag = {max_lag}
concurrency = 1         # one sequence at a time: the same tokens whatever else is played

[evaluation]
tasks = 4

[cluster]
address = "{address}"
cpus = 2
ping_every_s = 1
hang_timeout_s = 6
"""


def build_policy(folder: Path) -> str:
    """An untrained policy of 32 hidden units; its folder."""
    words = ["write 0 1 2 3 4 5 6", "abcde fghij klmno pqrst uvwxyz", "0123456789 .,;:!?"]
    return str(
        build_tiny_policy(
            words,
            folder,
            hidden_size=32,
            layers=2,
            heads=2,
            kv_heads=2,
            intermediate_size=64,
            vocab_size=300,
            max_context=96,
            seed=0,
        )
    )


def write_config(
    folder: Path,
    model: str,
    *,
    environment: str = "Letters",
    address: str = "none",
    steps: int = 4,
    max_lag: int = 0,
) -> Path:
    """A configuration whose runs lie in `folder`/runs/faults."""
    path = folder / "faults.toml"
    path.write_text(
        CONFIG.format(
            name=NAME,
            dir=folder / "runs",
            model=model,
            environments=ENVIRONMENTS,
            environment=environment,
            address=address,
            steps=steps,
            max_lag=max_lag,
        )
    )
    return path


class DrivenRun:
    """`loopwright train CONFIG` in a session of its own; leaving the block ends what is left."""

    def __init__(
        self,
        config: Path,
        *overrides: str,
        resume: bool = False,
        variables: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
    ) -> None:
        """`variables` are added to the environment of the driver, and so of all it starts. `within`
        prefixes the command (a network namespace's)."""
        self.folder = config.parent / "runs" / NAME
        self._mark = f"{config}-{time.monotonic_ns()}"
        self._errors = config.parent / f"errors-{time.monotonic_ns()}.txt"
        command = [*within, sys.executable, "-m", "orchestrator", "train", str(config)]
        for override in overrides:
            command += ["--set", override]
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, "--resume"] if resume else command,
                cwd=ROOT,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    _MARK: self._mark,
                    **(variables or {}),
                },
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=30)

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        """All events so far, or those of one kind, oldest first."""
        return [e for e in _lines(self.folder / "events.jsonl") if kind in ("", e["kind"])]

    def metrics(self) -> list[dict[str, Any]]:
        """All of `metrics.jsonl` so far."""
        return _lines(self.folder / "metrics.jsonl")

    def steps(self) -> int:
        """The newest step in `metrics.jsonl`."""
        return max((int(m["step"]) for m in self.metrics()), default=0)

    def ledger(self) -> LedgerState:
        """The ledger as it is."""
        path = self.folder / "ledger" / FILE
        return read(path) if path.exists() else LedgerState()

    def pid(self, actor: str) -> int:
        """Process id of the actor's present life."""
        found = [e["pid"] for e in self.events("actor_up") if e["actor"] == actor]
        return int(found[-1])

    def count(self, kind: str, actor: str) -> int:
        """How many events of `kind` there are about `actor`."""
        return sum(e["actor"] == actor for e in self.events(kind))

    def wait(self, what: str, happened: Callable[[], bool], timeout_s: float = 240.0) -> float:
        """Look until it has `happened`; seconds it took. Fails when the run ends before, or at the
        deadline."""
        started = time.monotonic()
        while not happened():
            if self.process.poll() is not None and not happened():
                code = self.process.poll()
                raise AssertionError(f"ended ({code}) before {what}: {self.errors()[-2000:]}")
            if time.monotonic() - started > timeout_s:
                raise AssertionError(f"no {what} in {timeout_s:g} s; events: {self.events()[-8:]}")
            time.sleep(0.02)
        return time.monotonic() - started

    def finish(self, timeout_s: float = 120.0) -> int:
        """Wait for the end; the exit code."""
        return self.process.wait(timeout=timeout_s)

    def errors(self) -> str:
        """All of stderr so far."""
        return self._errors.read_text()

    def reason(self) -> str:
        """The last line on stderr."""
        return self.errors().rstrip().rpartition("\n")[2]

    def summary(self) -> dict[str, Any]:
        """`summary.json`."""
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found

    def processes(self) -> list[int]:
        """Every living process that descends from the driver, itself included."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    marked = f"{_MARK}={self._mark}".encode() in (entry / "environ").read_bytes()
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue  # it has ended, or is another user's
                if marked and state != "Z":
                    found.append(int(entry.name))
        return found


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # a last line without its end is still being written
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]
