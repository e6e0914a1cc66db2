"""The far side of `ProcessEnv`: plays worlds in an interpreter that need not know Loopwright.

Run as a file by any Python from 3.9 on, standard library only. It loads `module:Class` and serves
sessions of it, one JSON object behind a length of four bytes each way, on the socket whose number
is its first argument. What a world must have, in plain data:

    spec() -> {"name", "version", "description", "max_turns", ...}     as `EnvSpec`
    tasks(split, seed) -> iterable of {"id", "seed", "scenario", ...}  as `Task`
    reset(task) -> {"messages": [{"role", "content"}], "tools": []}    as `Observation`
    step(text) -> {"messages", "terminated", "signals"}                as `Step`
    evaluate() -> {"reward", "success", "parts"}                       as `Verdict`
    oracle() -> iterable of text, drawn between steps                  optional
    close()                                                            optional

Methods may be coroutines. What they raise goes back as an error with its traceback.
"""

from __future__ import annotations  # the far side may be older than our own code

import asyncio
import ctypes
import importlib
import inspect
import itertools
import json
import os
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Iterator
from typing import Any

_LENGTH = struct.Struct("<I")
_LIMIT = 64 << 20  # bytes of one message
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when its parent dies, however that dies and whatever this one does
    just then (Linux; elsewhere the end of the socket has to do)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def read_exactly(connection: socket.socket, size: int) -> bytes | None:
    """`size` bytes, or None at the end of the socket."""
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read(connection: socket.socket) -> dict[str, Any] | None:
    """The next message, or None at the end."""
    head = read_exactly(connection, _LENGTH.size)
    if head is None:
        return None
    (size,) = _LENGTH.unpack(head)
    body = read_exactly(connection, size)
    return None if body is None else json.loads(body)


def write(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send one message; one that is no JSON becomes an error, so that the other side never waits in
    vain."""
    try:
        body = json.dumps(message).encode()
        if len(body) > _LIMIT:
            raise ValueError(f"{len(body)} bytes, limit {_LIMIT}")
    except (TypeError, ValueError) as error:
        problem = f"the answer is no plain data: {error}"
        body = json.dumps({"call": message.get("call"), "error": problem}).encode()
    connection.sendall(_LENGTH.pack(len(body)) + body)


class Sessions:
    """The worlds of this process, by session."""

    def __init__(self, cls: Any, options: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        self._make = lambda: cls(**options)
        self._loop = loop
        self._first = self._make()  # answers for all: spec and tasks; then the first session's
        self._worlds: dict[int, Any] = {}
        self._oracles: dict[int, Iterator[str]] = {}
        self._streams: dict[tuple[str, int], tuple[int, Any]] = {}

    def _run(self, value: Any) -> Any:
        return self._loop.run_until_complete(value) if inspect.isawaitable(value) else value

    def spec(self) -> dict[str, Any]:
        """What the world declares."""
        return dict(self._run(self._first.spec()))

    def tasks(self, split: str, seed: int, start: int, count: int) -> list[Any]:
        """Tasks `start` to `start + count` of a stream; fewer where it ends."""
        key = (split, seed)
        at, stream = self._streams.get(key, (0, None))
        if stream is None or at > start:
            at, stream = 0, iter(self._run(self._first.tasks(split, seed)))
        for _ in itertools.islice(stream, start - at):
            pass
        found = list(itertools.islice(stream, count))
        self._streams[key] = (start + len(found), stream)
        return found

    def reset(self, session: int, task: dict[str, Any]) -> Any:
        """Start a task in a session, a new one or one that has played before."""
        if session not in self._worlds:
            self._worlds[session] = self._make()
        self._oracles.pop(session, None)
        return self._run(self._worlds[session].reset(task))

    def step(self, session: int, action: str) -> Any:
        """One action."""
        return self._run(self._worlds[session].step(action))

    def evaluate(self, session: int) -> Any:
        """The grade now."""
        return self._run(self._worlds[session].evaluate())

    def oracle(self, session: int) -> str | None:
        """The oracle's next action; None when it has no more."""
        world = self._worlds[session]
        if session not in self._oracles:
            actions = world.oracle() if "oracle" in dir(world) else ()
            self._oracles[session] = iter(self._run(actions))
        return next(self._oracles[session], None)

    def close(self, session: int) -> None:
        """Forget a session."""
        self._oracles.pop(session, None)
        world = self._worlds.pop(session, None)
        if world is not None and "close" in dir(world):
            self._run(world.close())


def load(target: str) -> Any:
    """The class that `module:Class` or `path/to/file.py:Class` means."""
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        folder, file = os.path.split(os.path.abspath(place))
        sys.path.insert(0, folder)
        place = file[: -len(".py")]
    return getattr(importlib.import_module(place), name)


def main() -> None:
    """Load the world, then answer until the socket ends."""
    descriptor, target, options, parent = sys.argv[1:5]
    die_with_parent(int(parent))
    connection = socket.socket(fileno=int(descriptor))
    loop = asyncio.new_event_loop()
    try:
        sessions = Sessions(load(target), json.loads(options), loop)
        write(connection, {"call": 0, "value": {"pid": os.getpid(), "python": sys.version}})
    except Exception:  # noqa: BLE001 whatever the world raises goes back
        write(connection, {"call": 0, "error": traceback.format_exc()})
        return
    while True:
        message = read(connection)
        if message is None:
            return
        try:
            value = getattr(sessions, message["method"])(*message["arguments"])
            write(connection, {"call": message["call"], "value": value})
        except Exception:  # noqa: BLE001
            write(connection, {"call": message["call"], "error": traceback.format_exc()})


if __name__ == "__main__":
    main()
