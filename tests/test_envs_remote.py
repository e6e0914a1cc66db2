"""Environments elsewhere: in an interpreter of their own, and behind HTTP. They keep every rule of
the kit, and what dies, hangs or leaks over there costs an episode, not the worker."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loopwright.envs.conformance import check
from loopwright.envs.protocol import EnvError
from loopwright.envs.registry import RegistryError, load
from loopwright.envs.remote import HttpEnv, ProcessEnv
from loopwright.envs.remote.http_env import TOKEN_VARIABLE
from loopwright.envs.remote.plain import RemoteError
from loopwright.orchestrator.cli import main

ROOT = Path(__file__).resolve().parent.parent
WORLDS = ROOT / "tests" / "plain_world.py"
_DEADLINE_S = 60.0


def moody(**options: object) -> ProcessEnv:
    """A world that does what its actions say."""
    return ProcessEnv(f"{WORLDS}:Moody", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        ({"target": f"{WORLDS}:Echo", "options": {"highest": 97}}, 1),
        ({"target": f"{WORLDS}:Echo", "sessions": 32, "options": {"highest": 97}}, 2),
        ({"environment": "officeworld", "sessions": 32}, 2),
    ],
    ids=["one each", "shared", "one of ours"],
)
def test_a_world_in_its_own_process_keeps_every_rule(options: dict[str, Any], tasks: int) -> None:
    assert asyncio.run(check(lambda: load("process", options), tasks_per_split=tasks)) == []


def test_finite_streams_end_and_tasks_repeat() -> None:
    env = ProcessEnv(f"{WORLDS}:Echo")
    first = list(env.tasks("train", 3))
    assert len(first) == 150 and first == list(env.tasks("train", 3))
    assert {t.split for t in first} == {"train"} and first != list(env.tasks("train", 4))
    asyncio.run(env.close())


def test_what_a_world_raises_comes_back_with_its_traceback_and_it_goes_on() -> None:
    async def play() -> None:
        env = moody()
        task = next(env.tasks("train", 0))
        await env.reset(task)
        with pytest.raises(RemoteError, match=r"(?s)step raised.*in step.*a bad mood"):
            await env.step("raise")
        with pytest.raises(RemoteError, match="no plain data"):
            await env.step("odd")
        assert not (await env.step("nothing")).terminated
        await env.close()
        await env.close()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("action", "why"), [("die", "its process ended during step"), ("hang", "no answer to step")]
)
def test_a_world_that_dies_or_hangs_is_replaced_at_the_next_episode(action: str, why: str) -> None:
    async def play() -> None:
        env = moody(call_timeout_s=5.0 if action == "die" else 0.5)
        task = next(env.tasks("train", 0))
        await env.reset(task)
        before = int((await env.step("pid")).observation.messages[0].content)
        with pytest.raises(RemoteError, match=why):
            await env.step(action)
        with pytest.raises(RemoteError, match=why):  # and says so until it is reset
            await env.step("nothing")
        assert not _alive(before)
        await env.reset(task)
        after = int((await env.step("pid")).observation.messages[0].content)
        assert after != before
        await env.close()
        assert not _alive(after)

    asyncio.run(play())


def test_a_world_that_leaks_is_replaced_at_the_next_episode() -> None:
    async def play() -> None:
        env = moody(memory_bytes=48 << 20)
        task = next(env.tasks("train", 0))
        await env.reset(task)
        before = int((await env.step("pid")).observation.messages[0].content)
        await env.reset(task)  # small enough
        assert int((await env.step("pid")).observation.messages[0].content) == before
        await env.step("grow")
        await env.reset(task)
        assert int((await env.step("pid")).observation.messages[0].content) != before
        await env.close()

    asyncio.run(play())


def test_sessions_share_a_process_and_do_not_meet() -> None:
    async def play() -> None:
        envs = [moody(sessions=2) for _ in range(3)]
        task = next(envs[0].tasks("train", 0))
        for env in envs:
            await env.reset(task)
        pids = [(await e.step("pid")).observation.messages[0].content for e in envs]
        assert len(set(pids)) == 2
        for env in envs:
            await env.close()
        assert not any(_alive(int(pid)) for pid in pids)

    asyncio.run(play())


def test_nothing_is_left_when_the_worker_is_killed() -> None:
    """Not even a world that spins and never looks at its socket."""
    program = (
        "import asyncio, sys\n"
        "from loopwright.envs.remote import ProcessEnv\n"
        "async def play():\n"
        f"    env = ProcessEnv({str(WORLDS) + ':Moody'!r})\n"
        "    await env.reset(next(env.tasks('train', 0)))\n"
        "    print((await env.step('pid')).observation.messages[0].content, flush=True)\n"
        "    await env.step('spin')\n"
        "asyncio.run(play())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        world = int(worker.stdout.readline())
        assert _alive(world)
        worker.send_signal(signal.SIGKILL)
        worker.wait(_DEADLINE_S)
    _wait_until_gone(world)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"target": f"{WORLDS}:Broken"}, "(?s)loading raised.*missing_package"),
        ({"target": f"{WORLDS}:Nothing"}, "has no attribute 'Nothing'"),
        ({"target": "no_such_module:World"}, "No module named 'no_such_module'"),
        ({"target": "World"}, "expected module:Class"),
        ({"target": "a:B", "python": "/no/such/python"}, "set options.python"),
        ({"target": "a:B", "sessions": 0}, "options.sessions"),
    ],
)
def test_what_cannot_load_is_said_at_once(options: dict[str, object], why: str) -> None:
    with pytest.raises(EnvError, match=why):
        load("process", options)


@contextmanager
def served(name: str, *arguments: str, token: str = "") -> Iterator[str]:
    """The address of `loopwright envs serve` in a process of its own."""
    command = [sys.executable, "-m", "loopwright.orchestrator", "envs", "serve", name]
    environment = os.environ | ({TOKEN_VARIABLE: token} if token else {})
    with subprocess.Popen(
        [*command, "--port", "0", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split(" at ")[1].split(";")[0]
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(_DEADLINE_S)


def test_a_served_environment_keeps_every_rule() -> None:
    with served("officeworld", "--option", "action_format=call", "--sessions", "64") as url:
        assert asyncio.run(check(lambda: load(url), tasks_per_split=1)) == []


def test_a_server_asks_for_its_token_and_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    with served("officeworld", "--sessions", "1", token="secret") as url:
        monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
        with pytest.raises(RemoteError, match="401: this server wants its token"):
            HttpEnv(url)
        monkeypatch.setenv(TOKEN_VARIABLE, "secret")

        async def play() -> None:
            one, two = HttpEnv(url), HttpEnv(url)
            task = next(one.tasks("train", 0))
            await one.reset(task)
            with pytest.raises(RemoteError, match="1 sessions are open"):
                await two.reset(task)
            await one.close()
            await two.reset(task)
            await two.close()

        asyncio.run(play())
    with pytest.raises(RemoteError, match=r"is `loopwright envs serve` running\?"):
        HttpEnv(url)


def test_addresses_that_are_none_and_open_doors_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RemoteError, match="expected http://host:port"):
        load("http://")
    with pytest.raises(RegistryError, match="unknown option"):
        load("http://127.0.0.1:1", {"nonsense": 1})
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert main(["envs", "serve", "officeworld", "--host", "0.0.0.0"]) == 2
    assert TOKEN_VARIABLE in capsys.readouterr().err


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def _wait_until_gone(pid: int) -> None:
    ends = time.monotonic() + _DEADLINE_S
    while _alive(pid):
        assert time.monotonic() < ends, f"process {pid} is still there"
        time.sleep(0.02)


def test_what_is_dropped_without_close_leaves_no_process_and_no_thread() -> None:
    async def pid() -> int:
        env = moody()
        await env.reset(next(env.tasks("train", 0)))
        return int((await env.step("pid")).observation.messages[0].content)

    threads = threading.active_count()
    world = asyncio.run(pid())
    gc.collect()
    _wait_until_gone(world)
    assert threading.active_count() <= threads
