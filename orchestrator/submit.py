"""`loopwright submit`: check everything that can be checked here, then `ray job submit`."""

import argparse
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loopwright.configs.load import Loaded, load, presets
from loopwright.envs import registry
from loopwright.envs.protocol import EnvError
from loopwright.orchestrator.faults import Refused

ABOUT = """Check a configuration and a cluster, then run the one on the other as a Ray job.

  loopwright submit quickstart --address http://127.0.0.1:8265 --set run.dir=/data/runs
  loopwright submit my.toml --address http://head:8265 --id agent --package ../my_env
  loopwright submit my.toml --address http://head:8265 --id agent     after it ended: goes on

The working directory goes along (what .gitignore and .rayignore name stays). In a checkout of
Loopwright the job runs that code; elsewhere the loopwright that is installed on the cluster. The
job begins the run in run.dir/run.name, or goes on with it if it is there."""
_TIMEOUT_S = 20.0
_OVER = {"SUCCEEDED", "FAILED", "STOPPED"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `loopwright submit`, beside CONFIG and --set."""
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", ""),
        metavar="URL",
        help="the cluster's dashboard, such as http://127.0.0.1:8265 (or RAY_API_SERVER_ADDRESS)",
    )
    parser.add_argument(
        "--id", default="", help="submission id; default: run.name. One that has ended is replaced"
    )
    parser.add_argument(
        "--working-dir", default=".", type=Path, metavar="DIR", help="what goes along; default: ."
    )
    parser.add_argument(
        "--package",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a Python package of yours that every worker can import (repeatable)",
    )
    parser.add_argument(
        "--metadata",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="kept with the job and shown in the dashboard (repeatable)",
    )
    parser.add_argument("--no-wait", action="store_true", help="do not follow the job's log")


def execute(arguments: argparse.Namespace) -> int:
    """Check, submit, follow; the job's exit code, or 2 if it was refused here."""
    working_dir = arguments.working_dir.resolve()
    config_argument, loaded = _config(arguments, working_dir)
    config = loaded.config
    if not Path(config.run.dir).is_absolute():
        raise Refused(
            f"run.dir = {config.run.dir!r}: a job runs in a temporary copy of the working "
            "directory, expected an absolute path that every node sees: --set run.dir=/data/runs"
        )
    packages = [_package(path) for path in arguments.package]
    _check_environment(loaded, working_dir, packages)
    metadata = {"loopwright_run": config.run.name} | dict(_pair(m) for m in arguments.metadata)
    api = JobApi(arguments.address)
    api.check()
    identity = arguments.id or config.run.name
    api.make_way(identity)
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    command += ["--address", api.address, "--submission-id", identity]
    command += ["--working-dir", str(working_dir), "--metadata-json", json.dumps(metadata)]
    if packages:
        modules = {"py_modules": [str(path) for path in packages]}
        command += ["--runtime-env-json", json.dumps(modules)]
    if arguments.no_wait:
        command.append("--no-wait")
    command += ["--", *entrypoint(working_dir, config_argument, arguments.overrides)]
    print(f"submitting {identity} to {api.address}: {' '.join(command[command.index('--') + 1 :])}")
    return subprocess.run(command, check=False).returncode


def entrypoint(working_dir: Path, config: str, overrides: list[str]) -> list[str]:
    """What the job runs: the checkout's own code if the working directory is one, else what is
    installed on the cluster."""
    is_checkout = (working_dir / "loopwright.py").is_file() and (
        working_dir / "orchestrator" / "loop.py"
    ).is_file()
    command = ["python", "-m", "orchestrator"] if is_checkout else ["loopwright"]
    settings = [part for override in overrides for part in ("--set", override)]
    return [*command, "train", config, *settings, "--auto-resume"]


def _config(arguments: argparse.Namespace, working_dir: Path) -> tuple[str, Loaded]:
    """CONFIG as the job will name it, and as it reads here."""
    loaded = load(arguments.config, arguments.overrides)
    for warning in loaded.warnings:
        print(f"loopwright: note: {warning}", file=sys.stderr)
    if arguments.config in presets():
        return arguments.config, loaded
    path = Path(arguments.config).resolve()
    if not path.is_relative_to(working_dir):
        raise Refused(
            f"{path} lies outside of the working directory {working_dir}, which is all that goes "
            "along: move it there, or choose another --working-dir"
        )
    return path.relative_to(working_dir).as_posix(), loaded


def _package(path: Path) -> Path:
    resolved = path.resolve()
    if not (resolved / "__init__.py").is_file():
        raise Refused(
            f"--package {path}: no __init__.py there; give the folder of the package itself, whose "
            "name is what is imported"
        )
    return resolved


def _check_environment(loaded: Loaded, working_dir: Path, packages: list[Path]) -> None:
    """Construct the environment as a worker will, with the working directory on the path. One that
    is registered by a package of the cluster alone is not known here: that is a note."""
    environment = loaded.config.environment
    added = [str(working_dir), *(str(path.parent) for path in packages)]
    sys.path[:0] = added
    try:
        registry.load(environment.name, dict(environment.options))
    except EnvError as error:
        if ":" not in environment.name and "did you mean" not in str(error):
            print(f"loopwright: note: not checked here: {error}", file=sys.stderr)
            return
        raise Refused(f"environment.name = {environment.name!r}: {error}") from error
    except Exception as error:  # the constructor is plugin code
        raise Refused(
            f"environment.name = {environment.name!r}: {type(error).__name__}: {error}"
        ) from error
    finally:
        for entry in added:
            sys.path.remove(entry)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise Refused(f"--metadata {text!r}: expected KEY=VALUE")
    return key, value


class JobApi:
    """The job API of a Ray head, over HTTP, with the token of `RAY_AUTH_TOKEN`."""

    def __init__(self, address: str) -> None:
        """Raises `Refused` for what is no address."""
        if not address.startswith(("http://", "https://")):
            raise Refused(
                f"--address {address!r}: expected the head's dashboard, such as "
                "http://127.0.0.1:8265 (kubectl port-forward brings it here)"
            )
        self.address = address.rstrip("/")

    def check(self) -> None:
        """The head answers, takes our token, asks for one, and runs our version of Ray."""
        theirs = str(self._ask("/api/version")["ray_version"])
        ours = version("ray")
        if theirs != ours:
            raise Refused(
                f"{self.address} runs Ray {theirs}, here is {ours}: jobs need the same version on "
                "both sides"
            )
        if self._open_to_everyone():
            print(
                f"loopwright: note: {self.address} asks for no token: whoever reaches it can run "
                "code there. Start the head with RAY_AUTH_MODE=token",
                file=sys.stderr,
            )

    def make_way(self, identity: str) -> None:
        """Forget a job of this id that has ended. Raises `Refused` if it still runs."""
        jobs = {job.get("submission_id"): job for job in self._ask("/api/jobs/")}
        job = jobs.get(identity)
        if job is None:
            return
        if job["status"] not in _OVER:
            raise Refused(
                f"job {identity} is {job['status']}: follow it with `ray job logs -f {identity}`, "
                "stop it, or choose another --id and run.name"
            )
        self._ask(f"/api/jobs/{identity}", method="DELETE")
        print(f"job {identity} had ended ({job['status']}): its run goes on")

    def _open_to_everyone(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/api/jobs/", timeout=_TIMEOUT_S):
                return True
        except urllib.error.HTTPError:
            return False

    def _ask(self, path: str, method: str = "GET") -> Any:
        token = os.environ.get("RAY_AUTH_TOKEN", "")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"{self.address}{path}", headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                what = "the token in RAY_AUTH_TOKEN is not its" if token else "it wants a token"
                raise Refused(
                    f"{self.address}: {what}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on the "
                    "head"
                ) from error
            raise Refused(f"{self.address}{path}: HTTP {error.code} {error.reason}") from error
        except (OSError, ValueError) as error:
            raise Refused(
                f"{self.address}: no Ray dashboard answers within {_TIMEOUT_S:g} s ({error}); is "
                "the head up, and the port forwarded?"
            ) from error
