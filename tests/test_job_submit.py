"""`ray job submit` against a head of our own: found, run, stopped, resumed, failed, refused."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
_DEADLINE_S = 240  # of one job, on a machine with other things to do
_SMALL = (
    "warm_start.demonstrations=0",
    "run.eval_every=0",
    "run.checkpoint_every=0",
    "environment.max_turns=4",
    "environment.max_new_tokens=12",
    "rollout.groups_per_step=2",
    "rollout.group_size=3",
    "evaluation.tasks=3",
    "trainer.minibatches=2",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A Ray head on this machine, and how to talk to its job API."""

    address: str
    environment: dict[str, str]  # with the token
    folder: Path

    def submit(self, job: str, *arguments: str, stop_at: str = "") -> int:
        """Submit `python -m orchestrator train configs/quickstart.toml …` from the checkout and
        follow it to its end; the submitter's exit code. `ray job stop` once `stop_at` is logged."""
        command = ["job", "submit", "--address", self.address, "--submission-id", job]
        command += ["--working-dir", ".", "--", "python", "-m", "orchestrator", "train"]
        command += ["configs/quickstart.toml", *arguments]
        with subprocess.Popen(
            [_ray(), *command],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as submitter:
            alarm = threading.Timer(_DEADLINE_S, submitter.kill)
            alarm.start()
            assert submitter.stdout is not None
            for line in submitter.stdout:
                if stop_at and line.startswith(stop_at):
                    stop_at = ""
                    self.run("job", "stop", "--address", self.address, job)
            code = submitter.wait()
            alarm.cancel()
        return code

    def run(self, *arguments: str) -> None:
        """One `ray …` command that must succeed."""
        subprocess.run(
            [_ray(), *arguments],
            env=self.environment,
            check=True,
            capture_output=True,
            timeout=_DEADLINE_S,
        )

    def ask(self, path: str) -> Any:
        """GET from the job API, with the token."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{self.address}{path}", headers=token)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ended(self, job: str) -> tuple[str, list[str]]:
        """A job's status and the lines of its log."""
        logs = self.ask(f"/api/jobs/{job}/logs")["logs"]
        return self.ask(f"/api/jobs/{job}")["status"], logs.strip().splitlines()


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held until all are known, so they differ."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with 3 CPUs that asks for a token; its own process group ends with the tests."""
    dashboard, agent = _free_ports(2)
    temporary = Path(tempfile.mkdtemp(prefix="lw-", dir="/tmp"))  # socket paths must stay short
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",  # the grace period is the head's to give
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    options = {
        "num-cpus": 3,
        "port": 0,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "object-store-memory": 100_000_000,
        "temp-dir": temporary / "ray",
    }
    command = [_ray(), "start", "--head", "--block"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with (temporary / "head.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    alarm = threading.Timer(_DEADLINE_S, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        started = any("Ray runtime started" in line for line in process.stdout)
        assert started, f"ray start ended: {(temporary / 'head.log').read_text()[-2000:]}"
        alarm.cancel()
        yield Head(
            address=f"http://127.0.0.1:{dashboard}", environment=environment, folder=temporary
        )
    finally:
        alarm.cancel()
        _end(process)
        shutil.rmtree(temporary, ignore_errors=True)


def _end(head: "subprocess.Popen[str]") -> None:
    """SIGTERM lets the head end its own processes; whoever of its group is left is killed."""
    head.terminate()
    try:
        head.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        head.kill()
    try:
        os.killpg(head.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _settings(head: Head, policy: str, name: str, *more: str) -> list[str]:
    values = (*_SMALL, f"model.path={policy}", f"run.dir={head.folder}/runs", f"run.name={name}")
    return [part for value in (*values, *more) for part in ("--set", value)]


def test_without_the_token_the_job_api_refuses(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=60)
    assert refused.value.code == 401
    assert head.ask("/api/jobs/") == []


def test_a_stopped_job_leaves_a_checkpoint_and_the_next_one_finishes(
    head: Head, policy: str
) -> None:
    settings = _settings(head, policy, "stopped")
    head.submit("stopped", *settings, "--set", "run.steps=500", stop_at="step 2/")
    status, log = head.ended("stopped")
    assert status == "STOPPED"
    assert any(line.startswith("Ray ") and ", found, 3 CPUs" in line for line in log), log
    assert any("go on with --resume" in line for line in log), log[-5:]
    folder = head.folder / "runs" / "stopped"
    (checkpoint,) = (folder / "checkpoints").iterdir()
    reached = int(checkpoint.name.removeprefix("step-"))
    assert reached >= 2

    code = head.submit("resumed", *settings, "--set", f"run.steps={reached + 1}", "--resume")
    status, log = head.ended("resumed")
    assert (code, status) == (0, "SUCCEEDED"), log[-5:]
    steps = [line.split()[1] for line in log if line.startswith("step ") and "reward" in line]
    assert steps == [f"{reached + 1}/{reached + 1}"]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["complete"], summary["steps"]) == (True, reached + 1)


def test_a_job_that_fails_says_why_on_its_last_line(head: Head, policy: str) -> None:
    settings = _settings(head, policy, "too-big", "rollout.engines=3")
    code = head.submit("too-big", *settings, "--set", "cluster.start_timeout_s=4")
    status, log = head.ended("too-big")
    assert code != 0 and status == "FAILED"
    assert log[-1].startswith("loopwright: the Ray cluster made no room within 4 s for 4 CPUs on")
    assert "its nodes have 3 CPUs" in log[-1] and "rollout.engines" in log[-1]
    assert "exit code 1" in head.ask("/api/jobs/too-big")["message"]


def _submit(head: Head, capture: list[str], folder: Path, *arguments: str) -> int:
    """`loopwright submit` in `folder`; what it and the job print goes to `capture`."""
    done = subprocess.run(
        [sys.executable, "-m", "loopwright.orchestrator", "submit", *arguments],
        cwd=folder,
        env=head.environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
    )
    capture[:] = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    return done.returncode


def test_a_users_project_is_submitted_and_the_same_command_goes_on_with_it(
    head: Head, policy: str, tmp_path: Path
) -> None:
    """A folder with a configuration, and a package beside it that the cluster has never seen."""
    project = tmp_path / "project"
    project.mkdir()
    package = tmp_path / "elsewhere" / "loopwright_pantry"
    shutil.copytree(ROOT / "examples" / "my_env" / "loopwright_pantry", package)
    (project / "my.toml").write_text(
        '[run]\nname = "mine"\n[environment]\nname = "loopwright_pantry:Pantry"\n'
    )
    settings = _settings(head, policy, "mine")
    command = ["my.toml", "--address", head.address, "--package", str(package), *settings]
    command += ["--set", "environment.max_context=256", "--metadata", "owner=me"]
    log: list[str] = []
    assert _submit(head, log, project, *command, "--set", "run.steps=1") == 0, log[-5:]
    assert head.ask("/api/jobs/mine")["metadata"]["owner"] == "me"
    assert _submit(head, log, project, *command, "--set", "run.steps=2") == 0, log[-5:]
    assert "job mine had ended (SUCCEEDED): its run goes on" in log
    summary = json.loads((head.folder / "runs" / "mine" / "summary.json").read_text())
    assert (summary["complete"], summary["steps"]) == (True, 2)


def test_what_cannot_work_is_refused_before_anything_is_sent(head: Head, tmp_path: Path) -> None:
    log: list[str] = []

    def refused(*arguments: str, address: str = head.address) -> str:
        assert _submit(head, log, tmp_path, *arguments, "--address", address) == 2, log
        return log[-1]

    absolute = ("--set", f"run.dir={tmp_path}")
    assert "an absolute path that every node sees" in refused("quickstart")
    assert "expected the head's dashboard" in refused("quickstart", *absolute, address="head:1")
    nobody = f"http://127.0.0.1:{_free_ports(1)[0]}"
    assert "no Ray dashboard answers" in refused("quickstart", *absolute, address=nobody)
    wrong = head.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    stranger = Head(address=head.address, environment=wrong, folder=head.folder)
    assert _submit(stranger, log, tmp_path, "quickstart", *absolute, "--address", head.address) == 2
    assert "the token in RAY_AUTH_TOKEN is not its" in log[-1]
    misspelt = refused("quickstart", *absolute, "--set", "environment.name=oficeworld")
    assert "did you mean officeworld?" in misspelt
    assert "no __init__.py there" in refused("quickstart", *absolute, "--package", str(tmp_path))
    assert "expected KEY=VALUE" in refused("quickstart", *absolute, "--metadata", "mine")
