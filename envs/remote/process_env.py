"""An environment in a Python of its own: for packages whose requirements clash with ours, worlds
that must not share a process, and code that crashes or leaks.

    [environment]
    name = "process"
    options = { python = "/opt/worlds/bin/python", target = "my_world:World", sessions = 1 }

The far side (`shim.py`) needs nothing but the standard library. Each instance here is one session;
up to `sessions` of them share a process. A process that dies, hangs or grows beyond `memory_bytes`
is killed, its episodes are infrastructure faults (played again), and the next session gets a new
one. Processes end with this one, however it ends.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

from loopwright.envs.protocol import EnvError, EnvSpec, Observation, Step, Task, Verdict
from loopwright.envs.remote.plain import (
    RemoteError,
    observation_from,
    plain,
    spec_from,
    step_from,
    task_from,
    verdict_from,
)

_SHIM = Path(__file__).with_name("shim.py")
_LENGTH = struct.Struct("<I")
_TASKS_AT_ONCE = 64
_GRACE_S = 5.0  # for a killed process to be gone


class WorldProcess:
    """One interpreter and its socket. Calls are made one at a time, in order, by a thread of its
    own: the far side has one thread too, so blocking calls cost nothing, and the oracle can ask
    without an event loop."""

    def __init__(self, python: str, target: str, options: dict[str, Any], timeout_s: float) -> None:
        """Start it and wait for its world. Raises `RemoteError` with the far side's traceback."""
        self.where = f"{target} in {python}"
        self.sessions = 0
        self.broken = ""  # why no further call can be made
        self._calls = count(1)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="world-process")
        # In that thread: Linux ties "die with your parent" to the thread that started the child.
        started = self._thread.submit(self._start, python, target, json.dumps(options), timeout_s)
        started.result()

    async def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """One call. Raises `RemoteError`; a process that hangs or died is killed."""
        return await asyncio.wrap_future(self._submit(method, arguments, timeout_s))

    def call_and_wait(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """The same for callers without an event loop."""
        return self._submit(method, arguments, timeout_s).result()

    def resident_bytes(self) -> int:
        """Memory of the process; 0 if that cannot be told here."""
        try:
            statm = Path(f"/proc/{self._child.pid}/statm").read_text()
        except OSError:
            return 0
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def kill(self, why: str) -> None:
        """No further calls; the process is gone when this returns."""
        self.broken = self.broken or why
        self._child.kill()
        self._child.wait(_GRACE_S)
        self._connection.close()
        self._thread.shutdown(wait=False)

    def _submit(self, method: str, arguments: tuple[Any, ...], timeout_s: float) -> "Future[Any]":
        try:
            return self._thread.submit(self._call, method, arguments, timeout_s)
        except RuntimeError:  # killed, and its thread with it
            raise RemoteError(f"{self.where}: {self.broken}") from None

    def _start(self, python: str, target: str, options: str, timeout_s: float) -> None:
        self._connection, theirs = socket.socketpair()
        descriptor = theirs.fileno()
        command = [python, str(_SHIM), str(descriptor), target, options, str(os.getpid())]
        try:
            self._child = subprocess.Popen(
                command, pass_fds=(descriptor,), stdin=subprocess.DEVNULL, stdout=sys.stderr
            )
        except OSError as error:
            self._connection.close()
            raise RemoteError(
                f"environment process {python!r}: {error.strerror}; set options.python to an "
                "interpreter that has the environment's packages"
            ) from error
        finally:
            theirs.close()
        self._receive(0, timeout_s, "loading")

    def _call(self, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        if self.broken:
            raise RemoteError(f"{self.where}: {self.broken}")
        call = next(self._calls)
        message = {"call": call, "method": method, "arguments": arguments}
        body = json.dumps(message).encode()
        self._connection.settimeout(timeout_s)
        try:
            self._connection.sendall(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            self.kill(f"its process ended before {method}")
            raise RemoteError(f"{self.where}: {self.broken}") from error
        return self._receive(call, timeout_s, method)

    def _receive(self, call: int, timeout_s: float, what: str) -> Any:
        self._connection.settimeout(timeout_s)
        try:
            (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
            answer = json.loads(self._exactly(size))
        except TimeoutError:
            self.kill(f"no answer to {what} within {timeout_s:g} s")
            raise RemoteError(f"{self.where}: {self.broken}") from None
        except OSError:
            self.kill(f"its process ended during {what}")
            raise RemoteError(f"{self.where}: {self.broken}") from None
        if answer.get("call") != call:
            self.kill(f"answered call {answer.get('call')} instead of {call}")
            raise RemoteError(f"{self.where}: {self.broken}")
        if "error" in answer:
            raise RemoteError(f"{self.where}: {what} raised\n{answer['error']}")
        return answer["value"]

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._connection.recv(min(size, 1 << 20))
            if not part:
                raise ConnectionResetError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class ProcessEnv:
    """One session of a world in another interpreter."""

    # Of this process, by what runs in them: interpreters that have room for sessions, and specs.
    _running: ClassVar[dict[str, list[WorldProcess]]] = defaultdict(list)
    _specs: ClassVar[dict[str, EnvSpec]] = {}
    # Reentrant: a collection of garbage may give places back while one is being taken.
    _guard: ClassVar[threading.RLock] = threading.RLock()
    _names: ClassVar[Iterator[int]] = count(1)

    def __init__(
        self,
        target: str,
        python: str = "",
        options: Mapping[str, Any] | None = None,
        sessions: int = 1,
        memory_bytes: int = 0,
        start_timeout_s: float = 120.0,
        call_timeout_s: float = 60.0,
    ) -> None:
        """`target` is `module:Class` or `file.py:Class` over there, `options` go to its
        constructor; `memory_bytes` 0 means no limit.

        The first instance starts an interpreter at once: a world that does not load is an error
        here. Later ones start theirs, if they need one, at their first `reset`.
        """
        if ":" not in target:
            raise EnvError(f"options.target = {target!r}: expected module:Class or file.py:Class")
        for name, value in (("sessions", sessions - 1), ("memory_bytes", memory_bytes)):
            if value < 0:
                raise EnvError(f"options.{name} is too small: {value}")
        self._python, self._target = python or sys.executable, target
        self._options = dict(options or {})
        self._sessions, self._memory_bytes = sessions, memory_bytes
        self._start_timeout_s, self._call_timeout_s = start_timeout_s, call_timeout_s
        self._key = json.dumps([self._python, target, self._options], sort_keys=True)
        self._session = 0  # none yet
        self._process: WorldProcess | None = None
        self._place: weakref.finalize[..., ProcessEnv] | None = None
        if self._key not in ProcessEnv._specs:
            ProcessEnv._specs[self._key] = spec_from(self._ask("spec"), target)
        self.spec: EnvSpec = ProcessEnv._specs[self._key]

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """The world's own stream, drawn some at a time."""
        start = 0
        while found := self._ask("tasks", split, seed, start, _TASKS_AT_ONCE):
            for data in found:
                yield task_from(data, self.spec.name, split, f"{self._target}: tasks")
            start += len(found)

    async def reset(self, task: Task) -> Observation:
        """Start the task, in a new process if this session's is gone or too big."""
        process = self._process
        if process is not None and 0 < self._memory_bytes < process.resident_bytes():
            process.kill(f"grew beyond {self._memory_bytes} bytes")
        if process is None or process.broken:
            await asyncio.to_thread(self._join)
        data = await self._call("reset", self._session, plain(task))
        return observation_from(data, f"{self._target}: reset")

    async def step(self, action: str) -> Step:
        """One action over there."""
        data = await self._call("step", self._session, action)
        return step_from(data, f"{self._target}: step")

    async def evaluate(self) -> Verdict:
        """The grade over there."""
        data = await self._call("evaluate", self._session)
        return verdict_from(data, f"{self._target}: evaluate")

    def oracle(self) -> Iterator[str]:
        """The world's own oracle, one action at a time."""
        while (action := self._ask("oracle", self._session)) is not None:
            yield str(action)

    async def close(self) -> None:
        """End the session; with its last session a process ends. Idempotent."""
        if self._process is not None and not self._process.broken:
            with contextlib.suppress(RemoteError):  # the process ends all the same
                await self._call("close", self._session)
        self._leave()

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._process is None:
            raise RemoteError(f"{self._target}: {method} before reset")
        return await self._process.call(method, *arguments, timeout_s=self._call_timeout_s)

    def _ask(self, method: str, *arguments: Any) -> Any:
        process = self._process or self._join()
        return process.call_and_wait(method, *arguments, timeout_s=self._call_timeout_s)

    def _join(self) -> WorldProcess:
        """Take a place for one session in a process with room, or in a new one."""
        self._leave()
        with ProcessEnv._guard:
            alive = [p for p in ProcessEnv._running[self._key] if not p.broken]
            process = next((p for p in alive if p.sessions < self._sessions), None)
            if process is None:
                process = WorldProcess(
                    self._python, self._target, self._options, self._start_timeout_s
                )
                alive.append(process)
            process.sessions += 1
            ProcessEnv._running[self._key] = alive
        self._session, self._process = next(ProcessEnv._names), process
        # An instance that is dropped without `close` gives its place back too.
        self._place = weakref.finalize(self, _give_back, process, ProcessEnv._guard)
        return process

    def _leave(self) -> None:
        """Give the place back."""
        self._process = None
        if self._place is not None:
            self._place()
            self._place = None


def _give_back(process: WorldProcess, guard: threading.RLock) -> None:
    """One session less; with its last one a process ends."""
    with guard:
        process.sessions -= 1
        if process.sessions == 0 and not process.broken:
            process.kill("no session is left in it")
