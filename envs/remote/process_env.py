"""An environment in a Python of its own: for packages whose requirements clash with ours, worlds
that must not share a process, and code that uses a core, crashes or leaks.

    [environment]
    name = "process"
    options = { python = "/opt/worlds/bin/python", target = "my_world:World", sessions = 1 }

The far side (`shim.py`) needs nothing but the standard library; `environment` instead of `target`
names one of Loopwright's own. Each instance here is one session; up to `sessions` of them share a
process, and there are at most `processes`. A process that dies, hangs or grows beyond
`memory_bytes` is killed, its episodes are infrastructure faults (played again), and the next
session gets a new one. Processes end with this one, however it ends.
"""

import asyncio
import contextlib
import json
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
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
from loopwright.envs.remote.world_process import WorldProcess

_OWN = Path(__file__).with_name("own_world.py")
_TASKS_AT_ONCE = 64


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
        target: str = "",
        environment: str = "",
        python: str = "",
        options: Mapping[str, Any] | None = None,
        sessions: int = 1,
        processes: int = 0,
        memory_bytes: int = 0,
        start_timeout_s: float = 120.0,
        call_timeout_s: float = 60.0,
    ) -> None:
        """`target` is `module:Class` or `file.py:Class` over there, or `environment` is what
        `registry.load` takes; `options` go to its constructor. 0 `processes`, 0 `memory_bytes`: no
        limit.

        The first instance starts an interpreter at once: a world that does not load is an error
        here. Later ones start theirs, if they need one, at their first `reset`.
        """
        if bool(target) == bool(environment) or (target and ":" not in target):
            raise EnvError(
                f"options.target = {target!r}, options.environment = {environment!r}: give "
                "one of them; for target, expected module:Class or file.py:Class"
            )
        numbers = (("sessions", sessions - 1), ("processes", processes))
        for name, value in (*numbers, ("memory_bytes", memory_bytes)):
            if value < 0:
                raise EnvError(f"options.{name} is too small: {value}")
        self._python, self._target = python or sys.executable, target or f"{_OWN}:World"
        self._options = dict(options or {})
        if environment:
            self._options = {"environment": environment, "options": self._options}
        self._where = target or environment
        self._sessions, self._processes, self._memory_bytes = sessions, processes, memory_bytes
        self._start_timeout_s, self._call_timeout_s = start_timeout_s, call_timeout_s
        self._key = json.dumps([self._python, self._target, self._options], sort_keys=True)
        self._session = 0  # none yet
        self._process: WorldProcess | None = None
        self._place: weakref.finalize[..., ProcessEnv] | None = None
        if self._key not in ProcessEnv._specs:
            try:
                ProcessEnv._specs[self._key] = spec_from(self._ask("spec"), self._where)
            except EnvError:
                self._leave()
                raise
        spec = ProcessEnv._specs[self._key]
        most = processes * sessions or spec.max_concurrency
        self.spec: EnvSpec = replace(spec, max_concurrency=most)

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """The world's own stream, drawn some at a time."""
        start = 0
        while found := self._ask("tasks", split, seed, start, _TASKS_AT_ONCE):
            for data in found:
                yield task_from(data, self.spec.name, split, f"{self._where}: tasks")
            start += len(found)

    async def reset(self, task: Task) -> Observation:
        """Start the task, in a new process if this session's is gone or too big."""
        process = self._process
        if process is not None and 0 < self._memory_bytes < process.resident_bytes():
            process.kill(f"grew beyond {self._memory_bytes} bytes")
        if process is None or process.broken:
            process = self._join()
        # Others may wait for the same start; who gives up leaves by `close`.
        await asyncio.shield(asyncio.wrap_future(process.started))
        process.check()
        data = await self._call("reset", self._session, plain(task))
        return observation_from(data, f"{self._where}: reset")

    async def step(self, action: str) -> Step:
        """One action over there."""
        data = await self._call("step", self._session, action)
        return step_from(data, f"{self._where}: step")

    async def evaluate(self) -> Verdict:
        """The grade over there."""
        data = await self._call("evaluate", self._session)
        return verdict_from(data, f"{self._where}: evaluate")

    def oracle(self) -> Iterator[str]:
        """The world's own oracle, one action at a time."""
        while (action := self._ask("oracle", self._session)) is not None:
            yield str(action)

    async def close(self) -> None:
        """End the session; with its last session a process ends. Idempotent."""
        process = self._process
        if process is not None and process.started.done() and not process.broken:
            with contextlib.suppress(RemoteError):  # the process ends all the same
                await self._call("close", self._session)
        self._leave()

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._process is None:
            raise RemoteError(f"{self._where}: {method} before reset")
        return await self._process.call(method, *arguments, timeout_s=self._call_timeout_s)

    def _ask(self, method: str, *arguments: Any) -> Any:
        process = self._process or self._join()
        process.started.result()
        process.check()
        return process.call_and_wait(method, *arguments, timeout_s=self._call_timeout_s)

    def _join(self) -> WorldProcess:
        """Take a place for one session in a process with room, or in a new one that begins to
        start. Raises `RemoteError` where there is none."""
        self._leave()
        with ProcessEnv._guard:
            alive = [p for p in ProcessEnv._running[self._key] if not p.broken]
            process = next((p for p in alive if p.sessions < self._sessions), None)
            if process is None and 0 < self._processes <= len(alive):
                raise RemoteError(
                    f"{self._where}: {self._processes} processes of {self._sessions} session(s) "
                    "are full; this worker plays more at once than it declares"
                )
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
    why = "no session is left in it"
    with guard:
        process.sessions -= 1
        last = process.sessions == 0 and not process.broken
        if last:
            process.broken = why  # nobody joins it any more
    if last:  # outside: it waits for the process, and others may want a place meanwhile
        process.kill(why)
