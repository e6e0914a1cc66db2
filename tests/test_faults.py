"""Processes are killed and hung, environments misbehave, disks are full: what the user sees, and
that nothing paid for is lost.

Real Ray, real processes, real signals, through the command line. A start on Ray takes long, so one
run takes several blows; what needs no processes runs in this one.
"""

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopwright.actors.shared_memory import SEGMENT_FOLDER, SEGMENT_PREFIX
from loopwright.algorithms.records import Rollout, decode
from loopwright.orchestrator.cli import DONE, FAILED, REFUSED, main
from loopwright.orchestrator.ledger import FILE, audit, read
from loopwright.orchestrator.replay import replay
from tests.driven_run import NAME, DrivenRun, build_policy, write_config

P, K = 4, 3  # groups per step, rollouts of a group
ROLLOUT, WORKER, TRAINER = "rollout 0", "environment worker 0", "trainer"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an untrained policy."""
    return build_policy(tmp_path_factory.mktemp("model"))


def assert_clean(folder: Path, steps: int, *, missing: int = 0) -> None:
    """Every step taken, each finished rollout trained exactly once, weights that follow from the
    ledger, no shared memory left."""
    found = audit(folder / "ledger" / FILE)
    assert (found.unused, found.twice, found.unknown) == ((), (), ())
    assert found.trained == steps * P * K - missing
    assert sorted(read(folder / "ledger" / FILE).trained) == list(range(1, steps + 1))
    assert list(SEGMENT_FOLDER.glob(f"{SEGMENT_PREFIX}{NAME}-*")) == []


class TestProcesses:
    """On Ray."""

    def test_a_killed_driver_takes_its_actors_along_and_goes_on_to_the_same_weights(
        self, tmp_path: Path, model: str
    ) -> None:
        (tmp_path / "undisturbed").mkdir()
        (tmp_path / "disturbed").mkdir()
        undisturbed = write_config(tmp_path / "undisturbed", model, steps=8)
        assert main(["train", str(undisturbed)]) == DONE
        config = write_config(
            tmp_path / "disturbed", model, environment="Slow", address="local", steps=8
        )
        with DrivenRun(config) as run:
            run.wait("step 3", lambda: run.steps() >= 3)
            actors = {run.pid(actor) for actor in (ROLLOUT, WORKER, TRAINER)}
            assert actors <= set(run.processes())
            os.kill(run.process.pid, signal.SIGKILL)
            run.process.wait(timeout=10)
            # Ray ends them; two idle agents of it follow a minute later, or when the block ends
            deadline = time.monotonic() + 30
            while actors & set(run.processes()) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not actors & set(run.processes())
        # the rest in this process, without Ray: where a run is played changes nothing
        assert train(config, "cluster.address=none", resume=True) == DONE
        assert_clean(run.folder, 8)
        expected = read(tmp_path / "undisturbed" / "runs" / NAME / "ledger" / FILE).checksums
        assert len(set(expected.values())) == 8, "each step changes the weights"
        others = run.events("infra_fault") + run.events("actor_lost")
        assert run.ledger().checksums == expected, f"nobody else was hit? {others}"

    def test_episodes_of_a_killed_engine_and_of_a_killed_worker_go_on_with_all_their_tokens(
        self, tmp_path: Path, model: str
    ) -> None:
        config = write_config(
            tmp_path, model, environment="Chatty", address="local", steps=7, max_lag=1
        )
        options = f'environment.options={{folder = "{tmp_path}"}}'
        # weights over the network: the chain of engines is formed anew without the dead one
        network = ("rollout.channel=delta", 'rollout.channel_options={carrier="collective"}')
        engines = ("rollout.engines=2", "rollout.concurrency=4")
        with DrivenRun(config, options, *engines, *network) as run:
            run.wait("step 1", lambda: run.steps() >= 1)
            os.kill(run.pid(WORKER), signal.SIGKILL)
            run.wait("step 3: what was in the making is trained on", lambda: run.steps() >= 3)
            assert _resumed(run), "a world was brought back"
            begun_again = _begun_again(tmp_path)
            assert begun_again, "worlds end with their worker"
            os.kill(run.pid(ROLLOUT), signal.SIGKILL)
            assert run.finish(240) == DONE, run.errors()
            assert run.count("actor_lost", "rollout 1") == 0, "the other one serves on"
            assert run.events("infra_fault") == []
            assert _begun_again(tmp_path) == begun_again, "no world ends with an engine"
            resumed = _resumed(run)
            for rollout in resumed:
                (context,) = rollout.contexts
                assert rollout.turns == 4 and rollout.saved_tokens <= rollout.generated_tokens
                assert (context.behavior_logprobs[context.action_mask] < 0).all()
            tasks = {r.task_id for r in resumed}
            assert tasks & set(begun_again), "of a lost worker"
            assert tasks - set(begun_again), "of a lost engine"
            counted = run.summary()["resumed"]
            assert counted["rollouts"] >= 1 and counted["saved_tokens"] >= 1
            assert run.summary()["mismatch"]["abs_max"] < 0.5, "their logprobs are the policy's"
            assert_clean(run.folder, 7)
            assert not (run.folder / "episodes").exists()
            assert all(step.equal for step in replay(run.folder))


def _resumed(run: DrivenRun) -> list[Rollout]:
    """The rollouts on record with tokens that outlived a process."""
    groups = run.ledger().rollouts.values()
    return [r for group in groups for r in map(decode, group.values()) if r.saved_tokens]


def _begun_again(folder: Path) -> list[str]:
    """Training tasks of which more worlds were begun than a group has."""
    lines = (folder / "begun.txt").read_text().splitlines()
    counts = Counter(line for line in lines if line.startswith("train"))
    return sorted(task for task, count in counts.items() if count > K)


Said = pytest.CaptureFixture[str]


def train(config: Path, *overrides: str, resume: bool = False) -> int:
    """`loopwright train` in this process."""
    arguments = [part for text in overrides for part in ("--set", text)]
    return main(["train", str(config), *arguments, *(["--resume"] if resume else [])])


def reason(said: Said) -> str:
    """The last line on stderr."""
    return said.readouterr().err.rstrip().rpartition("\n")[2]


class TestRefused:
    """Exit code 2, before anything is started, and nothing is left behind."""

    def test_all_problems_of_a_configuration_at_once(
        self, tmp_path: Path, model: str, capsys: Said
    ) -> None:
        config = write_config(tmp_path, model)
        code = train(config, "rollout.grup_size=4", 'run.steps="ten"', "trainer.lr=-1")
        assert code == REFUSED
        told = capsys.readouterr().err
        assert "3 problems" in told
        assert "rollout.grup_size" in told and "did you mean rollout.group_size?" in told
        assert "run.steps = 'ten'" in told and "trainer.lr = -1" in told
        assert not (tmp_path / "runs").exists()

    def test_a_missing_model(self, tmp_path: Path, capsys: Said) -> None:
        assert train(write_config(tmp_path, str(tmp_path / "nowhere"))) == REFUSED
        told = reason(capsys)
        assert "model.path" in told and "nowhere" in told and "config.json" in told
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            (
                ("rollout.engine=vllm", 'rollout.options={tokenizer="gpt2"}'),
                "rollout.options: vllm option 'tokenizer' cannot be set: tokens come and go as ids",
            ),
            (
                ("rollout.engine=vllm", 'rollout.options={dtype="bfloat16"}'),
                "vllm option 'dtype': set `dtype` of the engine instead",
            ),
            (("rollout.options={quantization=true}",), "rollout.engine = 'torch' has no options"),
            (("rollout.max_lag=-1",), "rollout.max_lag = -1"),
            (("rollout.top_p=0.9",), "recorded logprobs differ from the policy's"),
            (("rollout.group_size=1",), "compares rollouts of one task"),
            (("cluster.placement=colocated", "rollout.max_lag=1"), "colocated they take turns"),
        ],
    )
    def test_what_engine_and_trainer_cannot_agree_on(
        self,
        tmp_path: Path,
        model: str,
        capsys: Said,
        overrides: tuple[str, ...],
        expected: str,
    ) -> None:
        assert train(write_config(tmp_path, model), *overrides) == REFUSED
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()

    def test_an_environment_that_cannot_be_constructed(
        self, tmp_path: Path, model: str, capsys: Said
    ) -> None:
        config = write_config(tmp_path, model, environment="Unbuildable", address="local")
        assert train(config) == REFUSED
        told = reason(capsys)
        assert "Unbuildable" in told and "RuntimeError: no licence server" in told
        assert not (tmp_path / "runs").exists()

    def test_an_environment_that_is_not_there(
        self, tmp_path: Path, model: str, capsys: Said
    ) -> None:
        assert train(write_config(tmp_path, model, environment="Leters")) == REFUSED
        assert "did you mean Letters?" in reason(capsys)


class TestEnvironments:
    """A fault is no reward: retried, then left out; too many of them end the run."""

    def test_a_fault_that_passes_costs_nothing(self, tmp_path: Path, model: str) -> None:
        (tmp_path / "played").mkdir()
        options = f'environment.options={{folder = "{tmp_path / "played"}"}}'
        config = write_config(tmp_path, model, environment="Once")
        assert train(config, options, "run.infra_fault_limit=0.5") == DONE
        folder = tmp_path / "runs" / NAME
        assert "one lost packet" in (folder / "events.jsonl").read_text()
        assert_clean(folder, 4)

    @pytest.mark.parametrize(
        ("environment", "fault"),
        [
            ("Raising", "ConnectionError: the database is away"),
            ("NoNumber", "evaluate() gave reward nan"),
            ("Nonsense", "raised in reset"),
            ("Waiting", "timeout: 0.5 s passed in step"),
        ],
    )
    def test_a_fault_that_stays_is_left_out_of_its_group(
        self, tmp_path: Path, model: str, environment: str, fault: str
    ) -> None:
        config = write_config(tmp_path, model, environment=environment)
        limits = ["run.infra_fault_limit=0.9", "environment.retries=1"]
        assert train(config, *limits, "environment.episode_timeout_s=0.5") == DONE
        folder = tmp_path / "runs" / NAME
        assert fault in (folder / "events.jsonl").read_text()
        # tasks 5, 10 and 15 of the 16 fail for each of their three rollouts
        assert_clean(folder, 4, missing=3 * K)

    @pytest.mark.parametrize("where", ["reset", "step"])
    def test_too_many_faults_end_the_run_with_the_last_one(
        self, tmp_path: Path, model: str, capsys: Said, where: str
    ) -> None:
        config = write_config(tmp_path, model, environment="Raising")
        options = f'environment.options={{where = "{where}", every = 2}}'
        assert train(config, options, "environment.retries=1", "run.steps=20") == FAILED
        told = reason(capsys)
        assert "% of the last" in told and "run.infra_fault_limit is 20%" in told
        assert f"raised in {where}: ConnectionError: the database is away" in told

    def test_a_broken_task_is_quarantined_and_the_run_goes_on(
        self, tmp_path: Path, model: str
    ) -> None:
        assert train(write_config(tmp_path, model, environment="Broken")) == DONE
        folder = tmp_path / "runs" / NAME
        told = (folder / "events.jsonl").read_text()
        assert "task_quarantined" in told and "its goal cannot be reached" in told
        assert_clean(folder, 4, missing=K)


class TestFullDisk:
    """The disk takes no more: the run ends and says what is safe; with room, `--resume` ends it."""

    @pytest.mark.parametrize(
        ("named", "limit_bytes", "checkpoint_every"),
        [("ledger.frames", 12_000, 0), ("step-2", 60_000, 2)],
    )
    def test_what_cannot_be_written_is_named(
        self,
        tmp_path: Path,
        model: str,
        capsys: Said,
        named: str,
        limit_bytes: int,
        checkpoint_every: int,
    ) -> None:
        config = write_config(tmp_path, model, environment="Filling", steps=8)
        overrides = (
            f'environment.options={{folder = "{tmp_path}", limit_bytes = {limit_bytes}}}',
            f"run.checkpoint_every={checkpoint_every}",
        )
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            assert train(config, *overrides) == FAILED
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        told = reason(capsys)
        assert named in told and "File too large" in told and "--resume" in told
        assert train(config, *overrides, resume=True) == DONE
        assert_clean(tmp_path / "runs" / NAME, 8)

    @pytest.mark.parametrize("named", ["metrics.jsonl", "events.jsonl", "summary.partial"])
    def test_what_else_a_run_writes_is_named(
        self, tmp_path: Path, model: str, capsys: Said, named: str
    ) -> None:
        """Each of these files alone is on a device that is full."""
        config = write_config(tmp_path, model)
        folder = tmp_path / "runs" / NAME
        folder.mkdir(parents=True)
        (folder / named).symlink_to("/dev/full")
        assert train(config) == FAILED
        told = reason(capsys)
        assert named.partition(".")[0] in told and "No space left on device" in told
        assert "--resume" in told
        (folder / named).unlink()
        assert train(config, resume=True) == DONE
        assert_clean(folder, 4)

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
    def test_a_small_file_system_that_fills_up(self, tmp_path: Path, model: str) -> None:
        config = write_config(tmp_path, model, environment="Slow", steps=8)
        (tmp_path / "runs").mkdir()
        with mounted(tmp_path / "runs", 256):
            with DrivenRun(config) as run:
                run.wait("step 3", lambda: run.steps() >= 3)
                filler = tmp_path / "runs" / "filler"
                with filler.open("wb") as file:
                    free = os.statvfs(filler)
                    os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_bsize)
                assert run.finish() == FAILED
                told = run.reason()
                assert "No space left on device" in told and "--resume" in told
                filler.unlink()
            with DrivenRun(config, resume=True) as run:
                assert run.finish() == DONE, run.errors()
            assert_clean(run.folder, 8)


@contextlib.contextmanager
def mounted(folder: Path, size_mib: int) -> Iterator[None]:
    """A file system of its own at `folder`; skips where mounting is not permitted."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"mounting is not permitted: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
