"""The zygote: a small Python that has imported what cells may use, and forks a confined child per
session. Run by its path with `python -I -S`; standard library only, and it knows nothing of worlds.

Control socket (packets): `F` with a session's socket attached → fork, answer the pid; `K<pid>` →
kill and reap it; end of file → kill all children and exit. Session socket (frames of 4 length bytes
and JSON): `{"run": code}` → any number of `{"call": name, "args": {…}}`, each answered by
`{"value": …}` or `{"error": {…}}` → `{"end": …}`.
"""

import ast
import bisect
import builtins
import calendar
import collections
import contextlib
import copy
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import gc
import heapq
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import random
import re
import resource
import signal
import socket
import statistics
import string
import sys
import textwrap
import time
import traceback
import types
import typing
import uuid
from pathlib import Path

PRELOADED = (bisect, calendar, collections, contextlib, copy, dataclasses, datetime, decimal, enum,
             fractions, functools, heapq, io, itertools, math, operator, random, re, statistics,
             string, textwrap, time, typing, uuid)  # fmt: skip
_TRACE_LINES = 12
Settings = dict[str, typing.Any]  # of session.Zygote, as JSON
Frame = dict[str, typing.Any]


class ApiError(Exception):
    """An API call that the world refused. `code` is its category."""

    def __init__(self, error: Frame) -> None:
        super().__init__(f"{error.get('code', 'error')}: {error.get('message', '')}")
        self.code = error.get("code")


class _Channel:
    """Frames over the session's socket."""

    def __init__(self, fd: int, frame_bytes: int) -> None:
        self._fd = fd
        self._frame_bytes = frame_bytes

    def receive(self) -> Frame:
        size = int.from_bytes(self._exactly(4), "big")
        frame: Frame = json.loads(self._exactly(size))
        return frame

    def send(self, frame: Frame) -> None:
        data = json.dumps(frame).encode()
        if len(data) > self._frame_bytes:
            raise ValueError(f"a message of {len(data)} bytes, at most {self._frame_bytes}")
        data = len(data).to_bytes(4, "big") + data
        while data:
            data = data[os.write(self._fd, data) :]

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = os.read(self._fd, size - len(data))
            if not piece:
                os._exit(0)  # the host closed the session
            data += piece
        return data


class _Output(io.TextIOBase):
    """What a cell prints, up to a number of characters."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.pieces: list[str] = []
        self.size = self.dropped = 0

    def clear(self) -> None:
        self.pieces.clear()
        self.size = self.dropped = 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        kept = text[: max(0, self.limit - self.size)]
        self.pieces.append(kept)
        self.size += len(kept)
        self.dropped += len(text) - len(kept)
        return len(text)


class _Name:
    """`apis`, `apis.mail`, `apis.mail.send`: a dotted name that can be called by keywords."""

    _channel: _Channel
    _path: str

    def __init__(self, channel: _Channel, path: str) -> None:
        self._channel = channel
        self._path = path

    def __getattr__(self, name: str) -> "_Name":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(self._channel, f"{self._path}.{name}" if self._path else name)

    def __repr__(self) -> str:
        return f"<api {self._path}>"

    def __call__(self, *positional: object, **arguments: object) -> typing.Any:
        if positional:
            raise TypeError(f"apis.{self._path} takes keyword arguments only")
        self._channel.send({"call": self._path, "args": arguments})
        reply = self._channel.receive()
        if "error" in reply:
            raise ApiError(reply["error"])
        return reply["value"]


def _execute(code: str, name: str, space: dict[str, typing.Any]) -> None:
    """Run a cell; the value of a last expression is printed, as in a notebook."""
    tree = ast.parse(code, name)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, name, "exec"), space)
        return
    tree.body.pop()
    exec(compile(tree, name, "exec"), space)
    value = eval(compile(ast.Expression(last.value), name, "eval"), space)
    if value is not None:
        print(repr(value))


def _told(error: BaseException) -> str:
    """The traceback as the cell's author needs it: frames of cells only."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith("<cell")
    ]
    lines = [f"  {f.filename} line {f.lineno}, in {f.name}" for f in frames[-_TRACE_LINES:]]
    if isinstance(error, SyntaxError):
        lines = [f"  line {error.lineno}: {(error.text or '').strip()[:200]}"]
    text = str(error)[:2000]
    return "\n".join(["Traceback:", *lines, f"{type(error).__name__}: {text}"])


def _serve(fd: int, settings: Settings) -> None:
    """Run cells until the host hangs up."""
    channel, output = _Channel(fd, settings["frame_bytes"]), _Output(settings["output_chars"])
    sys.stdout = sys.stderr = output
    space = {"__name__": "__main__", "__builtins__": builtins, "apis": _Name(channel, ""),
             "ApiError": ApiError}  # fmt: skip
    for count in itertools.count(1):
        code = channel.receive()["run"]
        output.clear()
        failure, told = "", ""
        try:
            _execute(code, f"<cell {count}>", space)
        except BaseException as error:  # noqa: BLE001 whatever a cell raises is its result
            failure = type(error).__name__
            told = "\n" + _told(error)
        text = "".join(map(str, output.pieces))
        note = f"\n[{output.dropped} more characters]" if output.dropped else ""
        channel.send({"end": text + note + told[: settings["output_chars"]], "error": failure})


def _become_child(session: int, settings: Settings, seccomp: types.ModuleType) -> None:
    """Everything a session's process gives up, in the order that still works."""
    os.dup2(session, 3)
    os.closerange(4, 4096)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.environ.clear()
    seccomp.die_with_parent()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + settings["memory_bytes"]
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, settings["cpu_s"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 8),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    seccomp.confine(settings["machine"])


def _fork(session: int, settings: Settings, seccomp: types.ModuleType) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _become_child(session, settings, seccomp)
            _serve(3, settings)
        finally:
            os._exit(1)
    return pid


def _probe(settings: Settings, seccomp: types.ModuleType) -> str:
    """Why no process can be confined here, or nothing: tried in a child."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            seccomp.confine(settings["machine"])
            os.write(writer, b"ok")
        except BaseException as error:  # noqa: BLE001 the reason goes to the host
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    told = os.read(reader, 1000).decode()
    os.close(reader)
    os.waitpid(pid, 0)
    return "" if told == "ok" else told or "the probe was killed by its filter"


def main() -> None:
    """Serve the control socket (its descriptor and the settings are the arguments)."""
    control = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    spec = importlib.util.spec_from_file_location("seccomp", Path(__file__).with_name("seccomp.py"))
    assert spec is not None and spec.loader is not None, "the file stands beside this one"
    seccomp = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seccomp)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host, which then hangs up
    control.send(json.dumps({"refused": _probe(settings, seccomp)}).encode())
    gc.collect()
    gc.freeze()  # children share these pages as long as nobody touches them
    children: set[int] = set()
    while True:
        message, fds, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            break
        if message[:1] == b"F":
            pid = _fork(fds[0], settings, seccomp)
            os.close(fds[0])
            children.add(pid)
            control.send(str(pid).encode())
        elif (pid := int(message[1:])) in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            children.discard(pid)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
