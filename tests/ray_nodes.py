"""A Ray cluster of two nodes on this machine, each with a network of its own, and a link between
them that can be cut.

    namespace a ── veth ── bridge ── veth ── namespace b
    head, driver           (namespace s)     worker node

Needs root and network namespaces; without, both nodes share this machine's loopback, and there is
no link to cut. Ray asks everyone for a token.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.driven_run import build_policy, write_config

_DEADLINE_S = 120
_MARK = "LOOPWRIGHT_TEST_NODE"  # in the environment of a node and all it starts
_ADDRESSES = {"a": "10.231.77.1", "b": "10.231.77.2"}


CPUS = {"a": 6, "b": 2}
# Driver, trainer, an engine and two workers fill node a; the other engine has room on b alone.
SPREAD = (
    "environment.workers=2",
    "rollout.engines=2",
    "rollout.threads=2",
    "trainer.threads=3",
    "rollout.concurrency=4",
    "run.checkpoint_every=0",
)


def spread_run(folder: Path, steps: int) -> tuple[Path, tuple[str, ...]]:
    """Configuration and overrides of a run that needs both nodes."""
    config = write_config(
        folder,
        build_policy(folder / "model"),
        environment="Chatty",
        address="auto",
        steps=steps,
        max_lag=1,
    )
    return config, (f'environment.options={{folder = "{folder}", pause_s = 0.1}}', *SPREAD)


@dataclass(slots=True, kw_only=True)
class Network:
    """Namespaces a and b, joined by a bridge in a third one; none of it touches this machine's own
    network."""

    prefix: str

    def within(self, node: str) -> list[str]:
        """What a command is prefixed with to run on `node`."""
        return ["ip", "netns", "exec", f"{self.prefix}{node}"]

    def address(self, node: str) -> str:
        """Of `node`."""
        return _ADDRESSES[node]

    def build(self) -> str:
        """Why that is not permitted here; empty if it is done."""
        p, s = self.prefix, f"{self.prefix}s"
        commands = [f"netns add {p}{name}" for name in "abs"]
        commands += [f"-n {s} link add bridge type bridge", f"-n {s} link set bridge up"]
        for node, address in _ADDRESSES.items():
            commands += [
                f"-n {p}{node} link add eth type veth peer name to-{node} netns {s}",
                f"-n {s} link set to-{node} master bridge up",
                f"-n {p}{node} addr add {address}/24 dev eth",
                f"-n {p}{node} link set lo up",
                f"-n {p}{node} link set eth up",
            ]
        for command in commands:
            done = _ip(command)
            if done.returncode:
                self.remove()
                return f"ip {command}: {done.stderr.strip()}"
        return ""

    def cut(self) -> None:
        """Nothing passes any more; either side keeps its address, and packets vanish."""
        assert _ip(f"-n {self.prefix}s link set to-b down").returncode == 0

    def heal(self) -> None:
        """As before."""
        assert _ip(f"-n {self.prefix}s link set to-b up").returncode == 0

    def remove(self) -> None:
        """Delete all three, with what is in them."""
        for name in "abs":
            _ip(f"netns del {self.prefix}{name}")


def _ip(command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["ip", *command.split()], capture_output=True, text=True, check=False, timeout=20
    )


@dataclass(slots=True, kw_only=True)
class RayNodes:
    """Head and worker node."""

    folder: Path
    network: Network | None  # None: `why_not`
    why_not: str
    settings: Mapping[str, str] = field(default_factory=dict)  # RAY_… of both nodes
    environment: dict[str, str] = field(default_factory=dict)  # of whoever talks to the cluster
    _port: int = 0
    _started: int = 0

    def within(self, node: str) -> list[str]:
        """What a command is prefixed with to run on `node`."""
        return self.network.within(node) if self.network else []

    def start_head(self, cpus: int) -> None:
        """Node a, and all of a cluster."""
        address = self.network.address("a") if self.network else "127.0.0.1"
        self._port = _free_port()
        self.environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("RAY_", _MARK))
        } | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # by default 15: a busy machine has no time for them
            "RAY_ADDRESS": f"{address}:{self._port}",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            **self.settings,
        }
        self._start(
            "a",
            f"--head --port={self._port} --node-ip-address={address} --include-dashboard=false "
            f"--temp-dir={self.folder / 'ray'} --num-cpus={cpus}",
        )

    def start_worker(self, cpus: int) -> None:
        """Node b, or its next life."""
        address = self.network.address("b") if self.network else "127.0.0.1"
        self._start(
            "b",
            f"--address={self.environment['RAY_ADDRESS']} --node-ip-address={address} "
            f"--num-cpus={cpus}",
        )

    def processes(self, node: str = "") -> list[int]:
        """Every living process of a node, or of both."""
        wanted = f"{_MARK}={self.folder}/{node}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if wanted in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
        return found

    def kill(self, node: str = "") -> list[int]:
        """SIGKILL for everything on a node: its raylet, its agents, and the actors there. Who that
        was."""
        killed = self.processes(node)
        for pid in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return killed

    def close(self) -> None:
        """End all of it."""
        for _ in range(3):  # what a dying process had just started
            if not self.kill():
                break
        if self.network is not None:
            self.network.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, node: str, options: str) -> None:
        """Ray gives a node 30 s to register; a machine with other things to do gets a second
        try."""
        said = self._try(node, options)
        if said:
            self.kill(node)
            said = self._try(node, options)
        assert not said, f"ray start of {node} ended: {said}"

    def _try(self, node: str, options: str) -> str:
        """What it said if it ended."""
        self._started += 1
        log = self.folder / f"{node}-{self._started}.log"
        command = [*self.within(node), str(Path(sys.executable).with_name("ray")), "start"]
        command += ["--block", "--object-store-memory=100000000", *options.split()]
        with log.open("w") as errors:
            process = subprocess.Popen(
                command,
                env=self.environment | {_MARK: f"{self.folder}/{node}"},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        alarm = threading.Timer(_DEADLINE_S, process.kill)
        alarm.start()
        assert process.stdout is not None
        started = any("Ray runtime started" in line for line in process.stdout)
        alarm.cancel()
        if not started:
            return log.read_text()[-2000:]
        threading.Thread(target=process.communicate, daemon=True).start()  # its pipe stays empty
        return ""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def ray_nodes(**settings: str) -> Iterator[RayNodes]:
    """The cluster, with nothing started in it yet. `settings` go into the environment of its
    processes."""
    folder = Path(tempfile.mkdtemp(prefix="lw-", dir="/tmp"))  # socket paths must stay short
    network = Network(prefix=f"lw{os.getpid() % 100000}")
    why_not = network.build()
    nodes = RayNodes(
        folder=folder,
        network=None if why_not else network,
        why_not=why_not,
        settings=settings,
    )
    try:
        yield nodes
    finally:
        nodes.close()
