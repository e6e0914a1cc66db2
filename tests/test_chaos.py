"""A run on Ray takes blows to every kind of process, some at once, while its environment leaks:
nothing finished is lost, nothing is trained twice, and it ends as if nothing had been.

The short version of benchmarks/chaos.py. Deaths of the driver: test_faults.py on Ray, and
test_resume_equality.py at exact points.
"""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopwright.actors.shared_memory import SEGMENT_FOLDER, SEGMENT_PREFIX
from loopwright.orchestrator.cli import DONE
from loopwright.orchestrator.replay import replay
from tests.blows import ACTORS, WORLD, Battered, Blow, at_point
from tests.driven_run import NAME, DrivenRun, build_policy, write_config

STEPS, P, K = 16, 4, 3
WORLD_FILE = Path(__file__).parent / "leaky_world.py"
ROLLOUT, WORKER, TRAINER = ACTORS["rollout actor"], ACTORS["environment worker"], ACTORS["trainer"]


@contextlib.contextmanager
def memory_of_a_worker(mib: int) -> Iterator[None]:
    """`ulimit -m` for everything started in this block."""
    before = resource.getrlimit(resource.RLIMIT_RSS)
    resource.setrlimit(resource.RLIMIT_RSS, (mib << 20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_RSS, before)


def leaked(run: DrivenRun) -> bool:
    """The worker was emptied and is back."""
    return bool(run.events("worker_memory")) and run.count("actor_back", WORKER) > 0


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_blows_to_every_process_and_a_leak_lose_nothing(tmp_path: Path) -> None:
    model = build_policy(tmp_path / "model")
    config = write_config(tmp_path, model, address="local", steps=STEPS, max_lag=1)
    options = f'target = "{WORLD_FILE}:Leaky", sessions = 4, call_timeout_s = 10.0'
    far_side = f'marker = "{tmp_path / "leaked"}", leak_mib = 480'
    overrides = (
        'environment.name="loopwright.envs.remote:ProcessEnv"',
        f"environment.options={{{options}, options = {{{far_side}}}}}",
        "run.infra_fault_limit=0.9",
        "environment.retries=5",
    )
    with memory_of_a_worker(640), Battered(config, *overrides, patience_s=240) as battered:
        run = battered.run
        run.wait("the leak to be found", lambda: leaked(run), timeout_s=240)
        battered.until_step()
        battered.strike(
            at_point("publish: bytes written, not committed"), Blow(kind=WORLD, how="SIGKILL")
        )
        battered.strike(
            Blow(kind="rollout actor", how="SIGSTOP"),
            Blow(kind="environment worker", how="SIGKILL"),
        )
        battered.strike(Blow(kind="trainer", how="SIGSTOP"))
        code, found = battered.over(120)
        assert code == DONE, run.errors()
        assert [cost.lost for cost in battered.costs] == [0] * 5
        assert (found.unused, found.twice, found.unknown) == ((), (), ())
        assert found.trained == STEPS * P * K
        assert sorted(run.ledger().trained) == list(range(1, STEPS + 1))
        assert run.summary()["restarts"] >= 4  # a busy machine may add some
        for actor in (ROLLOUT, TRAINER):
            seen = [e for e in run.events("actor_stuck") if e["actor"] == actor]
            assert any(e["state"] == "stopped by a signal" and e["stack"] for e in seen)
        told = run.events("worker_memory")[0]
        back = next(e for e in run.events("actor_back") if e["actor"] == WORKER)
        lost = [e for e in run.events("actor_lost") if e["actor"] == WORKER]
        assert lost[0]["unix_s"] > back["unix_s"] > told["unix_s"], "the leak was no loss"
        assert told["environment"].endswith("ProcessEnv") and told["children"] >= 1
        assert told["own_bytes"] + told["children_bytes"] > told["limit_bytes"] == 640 << 20
        assert "Traceback" not in run.errors() and "never retrieved" not in run.errors()
        assert run.processes() == []
        assert list(SEGMENT_FOLDER.glob(f"{SEGMENT_PREFIX}{NAME}-*")) == []
        assert all(step.equal for step in replay(run.folder))
