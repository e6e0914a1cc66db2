"""The host's side of the sandbox: one zygote per process, one session per episode."""

import asyncio
import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

from loopwright.envs.protocol import EnvError

MAX_FRAME_BYTES = 1 << 20
START_TIMEOUT_S = 30.0  # for the zygote to come up, and for a fork
_ZYGOTE = Path(__file__).with_name("zygote.py")
_PASSED_ON = ("LD_LIBRARY_PATH",)  # what Python may need to start; sessions see nothing of it
Answer = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
"""(API name, arguments) → `{"value": …}` or `{"error": {"code": …, "message": …}}`; never raises
for what the cell sent."""


class SandboxUnavailable(EnvError):
    """This machine cannot confine code; nothing is run. The text says why."""


class CellStatus(StrEnum):
    """How a cell ended. After the last three its session is gone, and its variables with it."""

    OK = "ok"
    ERROR = "error"  # it raised
    TIMEOUT = "timeout"  # killed at the deadline
    DIED = "died"  # it ended its own process, or was killed for memory or CPU time
    VIOLATION = "violation"  # it broke the protocol: killed


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """What one cell did."""

    status: CellStatus
    output: str  # what it printed, then its traceback; encodable as UTF-8
    error: str = ""  # name of the exception, "PermissionError" for a refused system call
    calls: int = 0  # API calls it made


class Zygote:
    """A process that forks confined sessions. `memory_bytes`: what a session may allocate;
    `cpu_s`: of its whole life; `output_chars`: kept of what a cell prints; `machine`: whose filter
    (default: this one's)."""

    def __init__(
        self,
        *,
        memory_bytes: int = 256 << 20,
        cpu_s: int = 120,
        output_chars: int = 8000,
        machine: str = "",
    ) -> None:
        self._settings = {
            "memory_bytes": memory_bytes,
            "cpu_s": cpu_s,
            "output_chars": output_chars,
            "machine": machine,
            "frame_bytes": MAX_FRAME_BYTES,
        }
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, None before the first session."""
        return self._process.pid if self._process is not None else None

    def session(self) -> "Session":
        """A new session, a few milliseconds. Raises `SandboxUnavailable` with the reason."""
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            try:
                pid = self._fork(theirs)
            except OSError as error:
                self._stop()  # it died: one new one is tried
                try:
                    pid = self._fork(theirs)
                except OSError as again:
                    ours.close()
                    raise SandboxUnavailable(f"the zygote does not fork: {again}") from error
            except SandboxUnavailable:
                ours.close()
                raise
        ours.setblocking(False)
        return Session(self, ours, pid)

    def kill(self, pid: int) -> None:
        """End a session's process, whatever it is doing."""
        with self._lock, contextlib.suppress(OSError):
            if self._control is not None:
                self._control.send(b"K%d" % pid)

    def close(self) -> None:
        """End the zygote and all its sessions."""
        with self._lock:
            self._stop()

    def _fork(self, theirs: socket.socket) -> int:
        if self._control is None:
            self._start()
        assert self._control is not None, "_start() made it"
        socket.send_fds(self._control, [b"F"], [theirs.fileno()])
        answer = self._control.recv(64)
        if not answer:
            raise BrokenPipeError("it closed its control socket")
        return int(answer)

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fd = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", _ZYGOTE, str(fd), json.dumps(self._settings)],
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            )
        ours.settimeout(START_TIMEOUT_S)
        self._control = ours
        hello = ours.recv(4096)
        reason = json.loads(hello)["refused"] if hello else "the zygote did not come up"
        if reason:
            self._stop()
            raise SandboxUnavailable(
                f"code cannot be confined here: {reason}. Code actions need Linux on x86-64 or "
                "aarch64 with seccomp filters; JSON tool calls work everywhere"
            )

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()  # it kills its children and exits
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


class Session:
    """One confined interpreter. Variables live from cell to cell until it is closed or killed."""

    def __init__(self, zygote: Zygote, channel: socket.socket, pid: int) -> None:
        self._zygote = zygote
        self._socket = channel
        self._buffer = bytearray()
        self.pid = pid
        self.alive = True

    async def run(
        self, code: str, answer: Answer, *, timeout_s: float = 5.0, max_calls: int = 1000
    ) -> CellResult:
        """Run a cell, answering its API calls. Never raises for what the cell does."""
        if not self.alive:
            raise RuntimeError("this session has ended; open another one")
        calls = 0
        try:
            async with asyncio.timeout(timeout_s):
                await self._send({"run": code})
                while True:
                    frame = await self._receive()
                    if "call" not in frame:
                        return _ended(frame, calls)
                    name, arguments = frame["call"], frame["args"]
                    if not isinstance(name, str) or not isinstance(arguments, dict):
                        raise ValueError("not a call")
                    calls += 1
                    await self._send(
                        answer(name, arguments) if calls <= max_calls else _too_many(max_calls)
                    )
        except TimeoutError:
            told = f"killed after {timeout_s:g} s"
            return self._gone(CellStatus.TIMEOUT, told, calls)
        except (EOFError, OSError):
            return self._gone(CellStatus.DIED, "the interpreter ended", calls)
        except (ValueError, KeyError, TypeError, RecursionError):
            return self._gone(CellStatus.VIOLATION, "killed: it broke the protocol", calls)
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """End the interpreter. May be called again."""
        if self.alive:
            self.alive = False
            self._socket.close()
            self._zygote.kill(self.pid)

    def _gone(self, status: CellStatus, told: str, calls: int) -> CellResult:
        self.close()
        text = f"[{told}; its variables are lost, the next cell begins anew]"
        return CellResult(status=status, output=text, error=status.value, calls=calls)

    async def _send(self, frame: Mapping[str, Any]) -> None:
        data = json.dumps(frame).encode()
        message = len(data).to_bytes(4, "big") + data
        try:
            sent = self._socket.send(message)
        except BlockingIOError:
            sent = 0
        if sent < len(message):
            await asyncio.get_running_loop().sock_sendall(self._socket, message[sent:])

    async def _receive(self) -> dict[str, Any]:
        size = int.from_bytes(await self._exactly(4), "big")
        if size > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {size} bytes")
        frame = json.loads(await self._exactly(size))
        if not isinstance(frame, dict):
            raise ValueError("not a frame")
        return frame

    async def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            piece = await asyncio.get_running_loop().sock_recv(self._socket, 1 << 16)
            if not piece:
                raise EOFError
            self._buffer += piece
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data


def _ended(frame: Mapping[str, Any], calls: int) -> CellResult:
    error = str(frame["error"])
    return CellResult(
        status=CellStatus.ERROR if error else CellStatus.OK,
        output=str(frame["end"]).encode(errors="replace").decode(),
        error=error[:100].encode(errors="replace").decode(),
        calls=calls,
    )


def _too_many(limit: int) -> Mapping[str, Any]:
    message = f"a cell may make {limit} API calls"
    return {"error": {"code": "too_many_calls", "message": message}}


def shared_zygote() -> Zygote:
    """This process's zygote with the default limits, started at its first session."""
    return _zygote_of(os.getpid())


@lru_cache(maxsize=1)
def _zygote_of(_pid: int) -> Zygote:
    zygote = Zygote()
    atexit.register(zygote.close)
    return zygote
