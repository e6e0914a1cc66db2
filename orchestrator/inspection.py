"""Looking at a process from outside: does it live, what is it doing, where is it stuck.

`py-spy` (Ray brings it) reads the stack of a Python process out of its memory. It is asked not to
pause the process, because it cannot pause one that is stopped already, which is a case to be found.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk or a device",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "dead",
    "X": "dead",
}
_OWN = f"{os.sep}loopwright{os.sep}", str(Path(__file__).resolve().parent.parent) + os.sep
_FRAMES_TOLD = 3  # in one line of text
_LINES_KEPT = 200
_BUSY_SHARE = 0.05  # of a CPU
_BUSY_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where a process lives. `begun` (clock ticks after boot) tells it from a later one with the
    same number."""

    pid: int
    host: str
    begun: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was seen of a process."""

    state: str = ""  # empty: not seen
    stack: tuple[str, ...] = ()  # all threads, innermost frame first; the telling one is first
    why_not: str = ""  # there is no stack

    def __str__(self) -> str:
        """One line."""
        frames = [line.strip() for line in self.stack if line.startswith(" ")][:_FRAMES_TOLD]
        told = f"in {' < '.join(frames)}" if frames else f"no stack: {self.why_not}"
        return f"{self.state}, {told}" if self.state else told


def home() -> Home:
    """Of this process."""
    return Home(pid=os.getpid(), host=socket.gethostname(), begun=_stat(os.getpid())[1])


def lives_here(where: Home) -> bool:
    """Whether the process is on this machine and has not ended."""
    if where.host != socket.gethostname():
        return False
    state, begun = _stat(where.pid)
    return begun == where.begun and state not in ("", "Z", "X")


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What a process has done so far."""

    cpu_s: float
    io_bytes: int  # read and written, whoever had to wait for it

    def busy_since(self, before: "Effort", seconds: float) -> bool:
        """Whether it has worked in these seconds: more than the threads that only keep it in touch
        do, of which there are always some."""
        cpu_s, io_bytes = self.cpu_s - before.cpu_s, self.io_bytes - before.io_bytes
        return cpu_s > _BUSY_SHARE * seconds or io_bytes > _BUSY_BYTES


def effort(where: Home) -> Effort | None:
    """Of a process that lives on this machine; None for others."""
    if not lives_here(where):
        return None
    io = {}
    with contextlib.suppress(OSError):  # permitted to its own user only
        lines = Path(f"/proc/{where.pid}/io").read_text().splitlines()
        io = {name: int(count) for name, count in (line.split(":") for line in lines)}
    try:
        fields = Path(f"/proc/{where.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    ticks = int(fields[11]) + int(fields[12])
    return Effort(
        cpu_s=ticks / os.sysconf("SC_CLK_TCK"), io_bytes=io.get("rchar", 0) + io.get("wchar", 0)
    )


def look(where: Home, *, timeout_s: float = 10.0, py_spy: str = "") -> Look:
    """State and stack of a process, without disturbing it. Takes about 0.1 s; never raises.

    `py_spy`: the program; empty: the one of this Python, else of PATH.
    """
    if where.host != socket.gethostname():
        command = f"py-spy dump --nonblocking --pid {where.pid}"
        return Look(why_not=f"it runs on {where.host}; there, `{command}` shows its stack")
    state, begun = _stat(where.pid)
    if begun != where.begun:
        return Look(state="dead", why_not=f"process {where.pid} has ended")
    told = _STATES.get(state, state)
    if where.pid == os.getpid():
        return Look(state=told, stack=_own_stack())
    program = py_spy or _py_spy()
    if not program:
        return Look(state=told, why_not="py-spy is not installed")
    command_line = [program, "dump", "--nonblocking", "--json", "--pid", str(where.pid)]
    try:
        done = subprocess.run(
            command_line, capture_output=True, text=True, timeout=timeout_s, check=True
        )
        return Look(state=told, stack=_lines(json.loads(done.stdout)))
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.partition("Stack backtrace")[0].split())
        remedy = "; allow it SYS_PTRACE" if "ermission" in reason else ""
        return Look(state=told, why_not=f"py-spy: {reason or error}{remedy}")
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Look(state=told, why_not=f"py-spy: {error}")


def _py_spy() -> str:
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy") or ""


def _stat(pid: int) -> tuple[str, int]:
    """State and begin of a process; ("", 0) where there is none, or no /proc to ask."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])


def _lines(threads: list[dict[str, Any]]) -> tuple[str, ...]:
    """Threads in which our own code runs come first, one that computes before one that waits."""

    def rank(thread: dict[str, Any]) -> tuple[bool, bool, bool]:
        own = any(_is_own(frame["filename"]) for frame in thread["frames"])
        return not own, not thread["owns_gil"], not thread["active"]

    found = []
    for thread in sorted(threads, key=rank):
        found.append(f"thread {thread['thread_name'] or thread['thread_id']}:")
        for frame in thread["frames"]:
            found.append(f"  {frame['name']} ({frame['short_filename']}:{frame['line']})")
    return tuple(found[:_LINES_KEPT])


def _is_own(filename: str) -> bool:
    return any(part in filename for part in _OWN)


def _own_stack() -> tuple[str, ...]:
    found, main = [], threading.main_thread().ident
    for thread, frame in sorted(sys._current_frames().items(), key=lambda pair: pair[0] != main):
        found.append(f"thread {thread}:")
        for one in reversed(traceback.extract_stack(frame)):
            found.append(f"  {one.name} ({Path(one.filename).name}:{one.lineno})")
    return tuple(found[:_LINES_KEPT])
