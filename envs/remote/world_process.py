"""One interpreter that plays worlds, seen from here: its process, its socket, its end."""

import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

from loopwright.envs.remote.plain import RemoteError

_SHIM = Path(__file__).with_name("shim.py")
_LENGTH = struct.Struct("<I")
_GRACE_S = 5.0  # for a killed process to be gone


class WorldProcess:
    """One interpreter and its socket. Calls are made one at a time, in order, by a thread of its
    own: the far side has one thread too, so blocking calls cost nothing, and the oracle can ask
    without an event loop."""

    def __init__(self, python: str, target: str, options: dict[str, Any], timeout_s: float) -> None:
        """Begin to start it. `started` is done when its world is loaded, or `broken` says why it is
        not, with the far side's traceback."""
        self.where = f"{target} in {python}"
        self.sessions = 0
        self.broken = ""  # why no further call can be made
        self._calls = count(1)
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._ending = threading.RLock()  # a collection of garbage may end another one meanwhile
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="world-process")
        # In that thread: Linux ties "die with your parent" to the thread that started the child.
        self.started: Future[None] = self._thread.submit(
            self._start, python, target, json.dumps(options), timeout_s
        )

    async def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """One call. Raises `RemoteError`; a process that hangs or died is killed."""
        return await asyncio.wrap_future(self._submit(method, arguments, timeout_s))

    def call_and_wait(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """The same for callers without an event loop."""
        return self._submit(method, arguments, timeout_s).result()

    def check(self) -> None:
        """Raises `RemoteError` if it can make no further call."""
        if self.broken:
            raise RemoteError(f"{self.where}: {self.broken}")

    def resident_bytes(self) -> int:
        """Memory of the process; 0 if that cannot be told here."""
        pid = self._child.pid if self._child is not None else 0
        try:
            statm = Path(f"/proc/{pid}/statm").read_text()
        except OSError:
            return 0
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def kill(self, why: str) -> None:
        """No further calls; the process is gone when this returns, or never comes up."""
        with self._ending:
            self.broken = self.broken or why
            if self._child is not None:
                self._child.kill()
                self._child.wait(_GRACE_S)
            if self._connection is not None:
                self._connection.close()
        self._thread.shutdown(wait=False)

    def _submit(self, method: str, arguments: tuple[Any, ...], timeout_s: float) -> "Future[Any]":
        try:
            return self._thread.submit(self._call, method, arguments, timeout_s)
        except RuntimeError:  # killed, and its thread with it
            raise RemoteError(f"{self.where}: {self.broken}") from None

    def _start(self, python: str, target: str, options: str, timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        descriptor = theirs.fileno()
        command = [python, str(_SHIM), str(descriptor), target, options, str(os.getpid())]
        with theirs, self._ending:
            if not self.broken:  # somebody still waits for it
                try:
                    self._child = subprocess.Popen(
                        command, pass_fds=(descriptor,), stdin=subprocess.DEVNULL, stdout=sys.stderr
                    )
                except OSError as error:
                    self.broken = (
                        f"environment process {python!r}: {error.strerror}; set options.python to "
                        "an interpreter that has the environment's packages"
                    )
            if self.broken:
                ours.close()
                return
            self._connection = ours
        try:
            self._receive(0, timeout_s, "loading")
        except RemoteError as error:
            self.kill(str(error).removeprefix(f"{self.where}: "))

    def _call(self, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        self.check()
        call = next(self._calls)
        message = {"call": call, "method": method, "arguments": arguments}
        body = json.dumps(message).encode()
        assert self._connection is not None, "it has started"
        try:
            self._connection.settimeout(timeout_s)
            self._connection.sendall(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            self.kill(f"its process ended before {method}")
            raise RemoteError(f"{self.where}: {self.broken}") from error
        return self._receive(call, timeout_s, method)

    def _receive(self, call: int, timeout_s: float, what: str) -> Any:
        assert self._connection is not None, "it has started"
        try:
            self._connection.settimeout(timeout_s)
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
        assert self._connection is not None, "it has started"
        parts = []
        while size:
            part = self._connection.recv(min(size, 1 << 20))
            if not part:
                raise ConnectionResetError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
