"""The sandbox: cells compute and call the host; no attack takes effect outside their process."""

import asyncio
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from loopwright.envs.sandbox import (
    CellResult,
    CellStatus,
    SandboxUnavailable,
    Session,
    Zygote,
    seccomp,
)

T = TypeVar("T")
SECRET = "the-evaluator-knows-7319"
OK, ERROR, TIMEOUT, DIED, VIOLATION = CellStatus

# name: (cell, how it may end). {file} is a secret file, {folder} its folder, {pid} the host, {port}
# a listening port of the host.
ATTACKS: Mapping[str, tuple[str, set[CellStatus]]] = {
    "open a file": ("print(open('{file}').read())", {ERROR}),
    "open by os": ("import os; print(os.read(os.open('{file}', os.O_RDONLY), 99))", {ERROR}),
    "open by io": ("import io; print(io.FileIO('{file}').read())", {ERROR}),
    "open by pathlib": ("import pathlib; print(pathlib.Path('{file}').read_text())", {ERROR}),
    "open by loader": (
        "print(__import__('importlib.machinery').machinery.SourceFileLoader"
        "('x', '{file}').get_data('{file}'))",
        {ERROR},
    ),
    "dunder chain to os": (
        "for c in ().__class__.__base__.__subclasses__():\n"
        "  if c.__name__ == '_wrap_close':\n"
        "    print(c.__init__.__globals__['system']('cat {file}; touch {folder}/pwned'))",
        {OK, ERROR},
    ),
    "dunder chain to builtins": (
        "print([c for c in object.__subclasses__() if c.__name__ == 'catch_warnings'][0]()"
        "._module.__builtins__['open']('{file}').read())",
        {ERROR},
    ),
    "frames to the runner": (
        "import sys; f = sys._getframe()\n"
        "while f.f_back: f = f.f_back\n"
        "print(f.f_globals['os'].open('{file}', 0))",
        {ERROR},
    ),
    "the evaluator in memory": (
        "import gc; print([o for o in gc.get_objects() if 'evaluator-' 'knows' in repr(o)[:200]])",
        {OK, ERROR, TIMEOUT},
    ),
    "import from disk": ("import sqlite3", {ERROR}),
    "write a file": ("open('{folder}/pwned', 'w').write('x')", {ERROR}),
    "truncate a file": ("import os; os.truncate('{file}', 0)", {ERROR}),
    "remove a file": ("import os; os.unlink('{file}')", {ERROR}),
    "rename a file": ("import os; os.rename('{file}', '{folder}/pwned')", {ERROR}),
    "make a folder": ("import os; os.mkdir('{folder}/pwned')", {ERROR}),
    "change the mode": ("import os; os.chmod('{file}', 0)", {ERROR}),
    "list a folder": ("import os; print(os.listdir('{folder}'))", {ERROR}),
    "stat a file": ("import os; print(os.stat('{file}').st_size)", {ERROR}),
    "symlink": ("import os; os.symlink('{file}', '{folder}/pwned')", {ERROR}),
    "proc environ": ("print(open('/proc/{pid}/environ').read())", {ERROR}),
    "proc mem": ("open('/proc/{pid}/mem', 'r+b').write(b'x')", {ERROR}),
    "own proc": ("print(open('/proc/self/maps').read())", {ERROR}),
    "environment": ("import os; print(os.environ); assert not os.environ", {OK}),
    "fork": ("import os; os.fork()", {ERROR}),
    "fork bomb": (
        "import os\nwhile True:\n  try: os.fork()\n  except BlockingIOError: pass",
        {ERROR},
    ),
    "threads": (
        "import threading\nfor _ in range(99): threading.Thread(target=print).start()",
        {ERROR},
    ),
    "exec": ("import os; os.execv('/bin/sh', ['sh', '-c', 'touch {folder}/pwned'])", {ERROR}),
    "pipe": ("import os; os.pipe()", {ERROR}),
    "system": ("import os; assert os.system('touch {folder}/pwned') != 0", {OK, ERROR}),
    "spawn": ("import os; os.posix_spawn('/bin/true', ['true'], {{}})", {ERROR}),
    "kill the host": ("import os; os.kill({pid}, 9)", {ERROR}),
    "kill the parent": ("import os; os.kill(os.getppid(), 9)", {ERROR, OK}),
    "kill everything": ("import os; os.kill(-1, 9)", {ERROR}),
    "kill a group": ("import os; os.killpg(0, 9)", {ERROR}),
    "signal a thread": ("import signal, threading; signal.pthread_kill({pid}, 9)", {ERROR, DIED}),
    "alarm": ("import signal; signal.setitimer(signal.ITIMER_REAL, 0.01)", {ERROR, OK}),
    "connect": ("import socket; socket.create_connection(('127.0.0.1', {port}))", {ERROR}),
    "unix socket": ("import socket; socket.socket(socket.AF_UNIX)", {ERROR}),
    "listen": ("import socket; socket.socket().bind(('127.0.0.1', 0))", {ERROR}),
    "look a name up": ("import socket; socket.getaddrinfo('localhost', 80)", {ERROR}),
    "send a descriptor": (
        "import socket; s = socket.socket(fileno=3); socket.send_fds(s, [b'x'], [3])",
        {ERROR, DIED},
    ),
    "ptrace": (
        "import ctypes; print(ctypes.CDLL(None).ptrace(16, {pid}, 0, 0)); assert "
        "ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == -1",
        {OK, ERROR},
    ),
    "raw syscall open": (
        "import ctypes; assert ctypes.CDLL(None).syscall(2, b'{file}', 0) == -1",
        {OK, ERROR},
    ),
    "x32 syscall": (
        "import ctypes; assert ctypes.CDLL(None).syscall(0x40000002, b'{file}', 0) == -1",
        {OK, ERROR},
    ),
    "machine code": (
        "import mmap; mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
        {ERROR},
    ),
    "undo the limits": (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        {ERROR},
    ),
    "undo the filter": (
        "import ctypes; assert ctypes.CDLL(None).prctl(22, 0, 0, 0, 0) == -1",
        {OK, ERROR},
    ),
    "become root": ("import os; os.setuid(0)", {ERROR}),
    "chroot": ("import os; os.chroot('/')", {ERROR}),
    "mount by ctypes": (
        "import ctypes; assert ctypes.CDLL(None).mount(0, b'{folder}', b'tmpfs', 0, 0) == -1",
        {OK, ERROR},
    ),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(1 << 24))", {ERROR}),
    "one big block": ("bytearray(1 << 40)", {ERROR}),
    "big integer": ("9 ** 9 ** 9", {TIMEOUT, ERROR}),
    "endless loop": ("while True: pass", {TIMEOUT}),
    "loop that swallows": (
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        {TIMEOUT},
    ),
    "loop that ignores signals": (
        "import signal\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\nwhile True: pass",
        {TIMEOUT},
    ),
    "backtracking": ("import re; re.match('(a|a)*b', 'a' * 40)", {TIMEOUT}),
    "sleep": ("import time; time.sleep(3600)", {TIMEOUT}),
    "deep recursion": ("def f(): f()\nf()", {ERROR}),
    "deep structure": (
        "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        {ERROR, DIED, TIMEOUT},
    ),
    "giant output": ("for _ in range(10**5): print('y' * 1000)", {OK, TIMEOUT}),
    "giant line": ("print('y' * (1 << 26))", {OK}),
    "giant error": ("raise ValueError('y' * (1 << 24))", {ERROR}),
    "giant argument": ("apis.a.b(c='y' * (1 << 22))", {ERROR}),
    "many calls": ("for _ in range(10**6): apis.a.b()", {ERROR, TIMEOUT}),
    "exit": ("raise SystemExit(0)", {ERROR}),
    "exit at once": ("import os; os._exit(0)", {DIED}),
    "abort": ("import os; os.abort()", {DIED, ERROR}),
    "null pointer": ("import ctypes; ctypes.string_at(0)", {DIED, ERROR}),
    "close the socket": ("import os; os.close(3)", {DIED}),
    "garbage on the socket": ("import os; os.write(3, b'\\xff' * 64)", {VIOLATION, DIED}),
    "huge frame": ("import os; os.write(3, b'\\x7f\\xff\\xff\\xff')", {VIOLATION}),
    "forged frame": ("import os; os.write(3, b'\\x00\\x00\\x00\\x02[]')", {VIOLATION}),
    "forged call": (
        "import os, json; d = json.dumps({{'call': 3, 'args': 4}}).encode()\n"
        "os.write(3, len(d).to_bytes(4, 'big') + d)",
        {VIOLATION},
    ),
    "deep frame": (
        "import os; d = b'[' * 90000\nos.write(3, len(d).to_bytes(4, 'big') + d)",
        {VIOLATION, DIED},
    ),
    "surrogates": ("print('\\ud800'); raise ValueError('\\udfff')", {ERROR}),
    "not unicode arguments": ("apis.a.b(c='\\ud800')", {OK, ERROR}),
    "break the runner": (
        "import sys; sys.stdout.pieces = None; __builtins__.print = None",
        {DIED, ERROR, OK},
    ),
    "break json": ("import json; json.dumps = None; json.loads = None; apis.a.b()", {ERROR, DIED}),
}  # fmt: skip


def answer(name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """A world of one API, and of one that refuses."""
    if name == "refuse":
        return {"error": {"code": "not_found", "message": "no such thing"}}
    return {"value": {"name": name, "given": sorted(arguments)}}


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote(memory_bytes=128 << 20, output_chars=2000)
    yield made
    made.close()


def inside(zygote: Zygote, scene: Callable[[Session], Awaitable[T]]) -> T:
    """Run `scene` with a session of its own."""

    async def whole() -> T:
        session = zygote.session()
        try:
            return await scene(session)
        finally:
            session.close()

    return asyncio.run(whole())


def cells(zygote: Zygote, *codes: str) -> list[CellResult]:
    async def scene(session: Session) -> list[CellResult]:
        return [await session.run(code, answer, timeout_s=20) for code in codes]

    return inside(zygote, scene)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_changes_nothing_outside(name: str, zygote: Zygote, tmp_path: Path) -> None:
    code, endings = ATTACKS[name]
    secret = tmp_path / "evaluator.py"
    secret.write_text(SECRET)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        place = {"file": secret, "folder": tmp_path, "pid": os.getpid()}
        code = code.format(**place, port=server.getsockname()[1])

        async def scene(session: Session) -> CellResult:
            return await session.run(code, answer, timeout_s=0.4, max_calls=200)

        result = inside(zygote, scene)
        with pytest.raises(BlockingIOError):
            server.accept()
    if result.status is not TIMEOUT:  # a busy machine may be slower than the deadline
        assert result.status in endings, result
    assert SECRET not in result.output and len(result.output) < 5000
    result.output.encode()
    assert [p.name for p in tmp_path.iterdir()] == ["evaluator.py"]
    assert secret.read_text() == SECRET and secret.stat().st_mode & 0o400
    assert [r.output for r in cells(zygote, "40 + 2")] == ["42\n"]


def test_there_are_many_attacks() -> None:
    assert len(ATTACKS) >= 38


def test_variables_and_functions_are_kept(zygote: Zygote) -> None:
    results = cells(
        zygote,
        "import math\ndef double(x):\n    return 2 * x\ntotal = 3",
        "class P:\n    def __init__(self): self.v = total\nprint(double(P().v))",
        "[n for n in range(3)]",
        "1 / 0",
        "total",
    )
    assert [r.output for r in results[:3]] == ["", "6\n", "[0, 1, 2]\n"]
    assert results[3].status is ERROR and results[3].error == "ZeroDivisionError"
    assert "<cell 4> line 1" in results[3].output and "zygote" not in results[3].output
    assert results[4].output == "3\n"


def test_api_calls_are_answered_by_the_host(zygote: Zygote) -> None:
    results = cells(
        zygote,
        "r = apis.mail.send(to=1, text='x'); r['name'], r['given']",
        "try:\n    apis.refuse()\nexcept ApiError as e:\n    print(e.code, e)",
        "apis.refuse()",
        "apis.mail.send(1)",
        "apis.mail.send(x={1, 2})",
    )
    assert results[0].output == "('mail.send', ['text', 'to'])\n" and results[0].calls == 1
    assert results[1].output == "not_found not_found: no such thing\n"
    assert results[2].error == "ApiError" and results[3].error == results[4].error == "TypeError"


def test_syntax_errors_name_the_line(zygote: Zygote) -> None:
    (result,) = cells(zygote, "x = 1\ny = (")
    assert result.error == "SyntaxError" and "line 2: y = (" in result.output


def test_sessions_know_nothing_of_each_other(zygote: Zygote) -> None:
    async def scene(first: Session) -> list[CellResult]:
        second = zygote.session()
        try:
            await first.run("x = 1; import json; json.x = 2", answer)
            both = (first.run("x", answer), second.run("(hasattr(json, 'x'), x)", answer))
            return list(await asyncio.gather(*both))
        finally:
            second.close()

    results = inside(zygote, scene)
    assert results[0].output == "1\n" and results[1].error == "NameError"


def test_a_hanging_cell_does_not_hold_the_others(zygote: Zygote) -> None:
    async def scene(hanging: Session) -> list[str]:
        ended: list[str] = []

        async def play(session: Session, code: str) -> None:
            await session.run(code, answer, timeout_s=2)
            ended.append(code)

        quick = zygote.session()
        await asyncio.gather(play(hanging, "while True: pass"), play(quick, "1"))
        quick.close()
        return ended

    assert inside(zygote, scene) == ["1", "while True: pass"]


def test_a_killed_session_is_gone_and_a_new_one_begins_anew(zygote: Zygote) -> None:
    async def scene(session: Session) -> int:
        await session.run("x = 1", answer)
        result = await session.run("while True: pass", answer, timeout_s=0.2)
        assert "variables are lost" in result.output and not session.alive
        with pytest.raises(RuntimeError, match="has ended"):
            await session.run("x", answer)
        return session.pid

    pid = inside(zygote, scene)
    cells(zygote, "1")  # the zygote has handled what came before
    assert not Path(f"/proc/{pid}").exists()


def test_a_dead_zygote_is_replaced() -> None:
    zygote = Zygote()
    assert cells(zygote, "1")[0].output == "1\n"
    first = zygote.pid
    assert first is not None
    os.kill(first, 9)
    os.waitpid(first, 0)
    assert cells(zygote, "2")[0].output == "2\n" and zygote.pid != first
    zygote.close()


def test_nothing_outlives_a_killed_host(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys\n"
        "from loopwright.envs.sandbox import Zygote\n"
        "z = Zygote(); s = z.session(); print(z.pid, s.pid, flush=True)\n"
        "asyncio.run(s.run('while True: pass', dict, timeout_s=60))\n"
    )
    root = Path(__file__).resolve().parent.parent
    host = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root)
    assert host.stdout is not None
    pids = [int(pid) for pid in host.stdout.readline().split()]
    descriptors = [os.pidfd_open(pid) for pid in pids]
    host.kill()
    host.communicate(timeout=20)
    for descriptor in descriptors:  # of a process: readable once it has ended
        assert select.select([descriptor], [], [], 10)[0]
        os.close(descriptor)


def test_a_machine_without_a_filter_is_refused_with_the_reason() -> None:
    with pytest.raises(SandboxUnavailable, match=r"no filter for 'riscv64'.*JSON tool calls"):
        Zygote(machine="riscv64").session()


def simulate(code: bytes, arch: int, number: int, third: int = 0) -> int:
    """What a filter returns for a system call: an interpreter of the four instructions used."""
    data = struct.pack("<IIQ6Q", number, arch, 0, 0, 0, third, 0, 0, 0)
    program = list(struct.iter_unpack("HBBI", code))
    value = at = 0
    while True:
        operation, yes, no, constant = program[at]
        at += 1
        if operation == 0x20:
            value = struct.unpack_from("<I", data, constant)[0]
        elif operation == 0x15:
            at += yes if value == constant else no
        elif operation == 0x45:
            at += yes if value & constant else no
        else:
            assert operation == 0x06
            return int(constant)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_allows_its_list_and_nothing_else(machine: str) -> None:
    code, arch = seccomp.program(machine), seccomp.AUDIT_ARCH[machine]
    column = list(seccomp.AUDIT_ARCH).index(machine)
    allowed = {numbers[column] for numbers in seccomp.SYSCALLS.values()}
    guarded = {numbers[column] for numbers in seccomp.WITHOUT_EXEC.values()}
    assert len(code) // 8 < 256 and len(allowed) == len(seccomp.SYSCALLS)
    for number in (*range(600), 0x40000000, 0x40000001, 0xFFFFFFFF):
        wanted = seccomp.ALLOW if number in allowed | guarded else seccomp.REFUSE
        assert simulate(code, arch, number, third=3) == wanted
        if number in guarded:
            assert simulate(code, arch, number, third=7) == seccomp.REFUSE
        assert simulate(code, arch ^ 1, number) == seccomp.KILL
