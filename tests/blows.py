"""Blows against a run, one at a time, and what each of them cost: signals to every kind of process,
and deaths at exact points of a publish and of a checkpoint (kill_points/sitecustomize.py).

A `Battered` run is started again with `--resume` whenever its driver dies.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from loopwright.orchestrator.ledger import FILE, Audit, audit
from tests.driven_run import DrivenRun

POINTS = {  # of tests/kill_points, and whose process comes there
    "publish: before the first byte": "trainer",
    "publish: bytes written, not committed": "trainer",
    "publish: committed, not acknowledged": "rollout actor",
    "checkpoint: during the tensors": "trainer",
    "checkpoint: before the rename": "driver",
    "checkpoint: renamed, not in the ledger": "driver",
}
ACTORS = {
    "rollout actor": "rollout 0",
    "environment worker": "environment worker 0",
    "trainer": "trainer",
}
STOPPED_S = 30.0  # a driver, longer than its actors may be silent
WORLD, DRIVER = "world process", "driver"
KILL_POINTS = Path(__file__).parent / "kill_points"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """What is done to whom: "SIGKILL", "SIGSTOP", or death at a point."""

    kind: str
    how: str


def at_point(point: str) -> Blow:
    """The blow that kills whoever comes there."""
    return Blow(kind=POINTS[point], how=point)


@dataclass(slots=True, kw_only=True)
class Cost:
    """What a blow cost. Seconds; −1 where there is nothing to measure."""

    kind: str
    how: str
    step: int  # the last one before it
    detect_s: float = -1.0  # from the blow until the run says so
    recover_s: float = -1.0  # from there (driver: from `--resume`) until it serves again
    step_s: float = -1.0  # from the blow until one more step is on record
    finished: set[tuple[int, int]] = field(default_factory=set)  # (ticket, attempt) on record then
    lost: int = -1  # of these, due and in no step's batch in the end

    def row(self) -> dict[str, Any]:
        """For a table; how many were finished instead of which."""
        return asdict(self) | {"finished": len(self.finished)}


class Battered:
    """A run under blows. Use it as a block: leaving it ends every process."""

    def __init__(self, config: Path, *overrides: str, patience_s: float = 90.0) -> None:
        self._config = config
        self._overrides = overrides
        self._patience_s = patience_s
        self._points = config.parent / "points"
        self._points.mkdir(exist_ok=True)
        self.costs: list[Cost] = []
        self.unasked: list[str] = []  # deaths of the driver that nobody dealt
        self.run = self._start(resume=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: Any
    ) -> None:
        self.run.__exit__(kind, error, at)

    def strike(self, blow: Blow, *others: Blow) -> Cost:
        """Deal it, and wait until the run has got over it. `others` (of actors and worlds, by
        signal) are dealt in the same moment. What the first one cost."""
        costs = [self._begun(b) for b in (blow, *others)]
        if blow.how in POINTS:
            (self._points / "armed").write_text(blow.how)
        if blow.kind == DRIVER:
            self._driver(blow, costs[0])
        else:
            for end in [self._deal(b, c) for b, c in zip((blow, *others), costs, strict=True)]:
                end()
        self.costs += costs
        return costs[0]

    def until_step(self, more: int = 1) -> None:
        """So many more steps are on record."""
        step = self.run.steps()
        self._wait("another step", lambda: self.run.steps() >= step + more)

    def over(self, timeout_s: float) -> tuple[int, Audit]:
        """Let the run end; its exit code, and what its ledger says. Completes the costs."""
        code = self.run.finish(timeout_s)
        state = self.run.ledger()
        trained = {pair for pairs in state.trained.values() for pair in pairs}
        taken = {ticket for tickets in state.tickets.values() for ticket in tickets}
        for cost in self.costs:
            cost.lost = len({pair for pair in cost.finished if pair[0] in taken} - trained)
        return code, audit(self.run.folder / "ledger" / FILE)

    def _start(self, *, resume: bool) -> DrivenRun:
        path = [str(KILL_POINTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {"PYTHONPATH": os.pathsep.join(path), "LOOPWRIGHT_CHAOS": str(self._points)}
        return DrivenRun(self._config, *self._overrides, resume=resume, variables=variables)

    def _wait(self, what: str, happened: Callable[[], bool]) -> None:
        """Look until it has happened. A driver that ends meanwhile, and should not, is told of and
        goes on with `--resume`."""
        deadline = time.monotonic() + self._patience_s
        while not happened():
            code = self.run.process.poll()
            assert code != 0, f"the run is over before {what}"
            if code is not None:
                self.unasked.append(f"driver ended ({code}) before {what}: {self.run.reason()}")
                assert len(self.unasked) < 4, self.unasked
                self.run.__exit__()
                self.run = self._start(resume=True)
                deadline = time.monotonic() + 2 * self._patience_s
            told = [f"{e['kind']} {e.get('actor', '')}" for e in self.run.events()[-8:]]
            assert time.monotonic() < deadline, f"no {what} in time; events: {told}"
            time.sleep(0.05)

    def _busiest_world(self) -> int:
        """Of all worlds the one that computes most while we look: idle ones nobody would miss."""
        before = worlds(self.run.pid(ACTORS["environment worker"]))
        assert before, "no world runs in a process of its own: the environment is no ProcessEnv"
        spent: dict[int, int] = {}

        def one_computes() -> bool:
            after = worlds(self.run.pid(ACTORS["environment worker"]))
            spent.update({pid: after[pid] - before.get(pid, after[pid]) for pid in after})
            return max(spent.values()) > 0

        self._wait("a world to compute", one_computes)
        return max(spent, key=lambda pid: spent[pid])

    def _own_doing(self, what: str, happened: Callable[[], bool]) -> bool:
        """Wait for it; False if the driver went down meanwhile, which makes it moot."""
        known = len(self.unasked)
        self._wait(what, lambda: happened() or len(self.unasked) > known)
        return len(self.unasked) == known

    def _finished(self) -> set[tuple[int, int]]:
        """What is on record and certain to last: groups are flushed as wholes."""
        state = self.run.ledger()
        return {(t, k) for t in state.groups for k in state.rollouts.get(t, {})}

    def _fired(self) -> float:
        """Wait until the armed point is reached; when that was."""
        fired = self._points / "fired"
        # not through the run's own wait: it may be the driver that dies
        deadline = time.monotonic() + self._patience_s
        while not fired.exists():
            if time.monotonic() > deadline:
                raise AssertionError(f"nobody came to {(self._points / 'armed').read_text()!r}")
            time.sleep(0.02)
        when = float(fired.read_text().split()[0])
        fired.unlink()
        return when

    def _begun(self, blow: Blow) -> Cost:
        step = self.run.steps()
        return Cost(kind=blow.kind, how=blow.how, step=step, finished=self._finished())

    def _deal(self, blow: Blow, cost: Cost) -> Callable[[], None]:
        """Deal a blow to an actor or a world; what waits for the end of its consequences."""
        if blow.kind == WORLD:
            return self._world(blow, cost)
        return self._actor(ACTORS[blow.kind], blow, cost)

    def _actor(self, actor: str, blow: Blow, cost: Cost) -> Callable[[], None]:
        run = self.run
        lost, back = run.count("actor_lost", actor), run.count("actor_back", actor)
        began = time.time()
        if blow.how not in POINTS:
            os.kill(run.pid(actor), signal.Signals[blow.how])

        def end() -> None:
            at = self._fired() if blow.how in POINTS else began
            if self._own_doing(f"{actor} back", lambda: run.count("actor_back", actor) > back):
                told = [e for e in run.events("actor_lost") if e["actor"] == actor][lost]
                came = [e for e in run.events("actor_back") if e["actor"] == actor][back]
                cost.detect_s = told["unix_s"] - at
                cost.recover_s = came["unix_s"] - told["unix_s"]
            self.until_step()
            cost.step_s = time.time() - at

        return end

    def _world(self, blow: Blow, cost: Cost) -> Callable[[], None]:
        run = self.run
        faults = len(run.events("infra_fault"))
        victim = self._busiest_world()
        began = time.time()
        os.kill(victim, signal.Signals[blow.how])

        def end() -> None:
            what = "its episodes to be faults"
            found = self._own_doing(what, lambda: len(run.events("infra_fault")) > faults)
            if found:
                cost.detect_s = run.events("infra_fault")[faults]["unix_s"] - began
            self.until_step()
            cost.step_s = time.time() - began
            if found:
                cost.recover_s = cost.step_s - cost.detect_s

        return end

    def _driver(self, blow: Blow, cost: Cost) -> None:
        run, step = self.run, self.run.steps()
        began = time.time()
        if blow.how == "SIGSTOP":  # nobody notices: whoever stopped it continues it
            os.kill(run.process.pid, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            os.kill(run.process.pid, signal.SIGCONT)
            resumed = time.time()
        else:
            began = self._die(blow.how)
            self._end_actors()
            resumed = time.time()
            step = self.run.steps()
            self.run = self._start(resume=True)
        self._wait("another step", lambda: self.run.steps() > step)
        cost.step_s, cost.recover_s = time.time() - began, time.time() - resumed

    def _die(self, how: str) -> float:
        """The driver's death; when that was."""
        if how in POINTS:
            died = self._fired()
        else:
            died = time.time()
            os.kill(self.run.process.pid, signal.SIGKILL)
        self.run.process.wait(timeout=10)
        return died

    def _end_actors(self) -> None:
        """Ray ends the actors of a dead driver; two idle agents of it follow later."""
        actors = {self.run.pid(actor) for actor in ACTORS.values()}
        deadline = time.monotonic() + self._patience_s
        while left := actors & set(self.run.processes()):
            assert time.monotonic() < deadline, f"actors of the killed driver still run: {left}"
            time.sleep(0.1)
        self.run.__exit__()


def worlds(worker: int) -> dict[int, int]:
    """Processes that a worker started for its environments: CPU time so far, clock ticks."""
    found = {}
    for path in Path(f"/proc/{worker}/task").glob("*/children"):
        for pid in map(int, path.read_text().split()):
            with contextlib.suppress(OSError):  # it has just ended
                if b"shim.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    found[pid] = int(fields[11]) + int(fields[12])
    return found
