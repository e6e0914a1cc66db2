"""The adapter to MCP servers, with the real client: over stdio to a server of the real package and
to one in nothing but the standard library, over HTTP to the real one."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loopwright.envs.adapters.mcp_tools import McpTools
from loopwright.envs.conformance import RULES, Kit, check
from loopwright.envs.protocol import EnvError
from loopwright.envs.registry import load
from loopwright.envs.remote.plain import RemoteError

HERE = Path(__file__).parent
PANTRY = [sys.executable, str(HERE / "mcp_pantry_server.py")]
PLAIN = [sys.executable, "-S", "-E", str(HERE / "mcp_plain_server.py")]
COUNT: dict[str, Any] = {"server": PLAIN, "job": f"{HERE}/mcp_jobs.py:Count"}
FETCH: dict[str, Any] = {
    "job": f"{HERE}/mcp_jobs.py:Fetch",
    "tools": ["look", "take"],
}
_DEADLINE_S = 60.0


def act(name: str, **arguments: object) -> str:
    from loopwright.envs.actions import Call, render_action

    return render_action(Call(name=name, arguments=arguments), "json")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A real server over streamable HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen(
        [*PANTRY, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        assert any("running on" in line for line in server.stderr)
        # a server logs what fails, and stands still once nobody reads it
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield f"http://127.0.0.1:{port}/mcp"
        server.terminate()


def test_a_server_over_http_conforms(address: str) -> None:
    options = {**FETCH, "server": address}
    assert asyncio.run(check(lambda: load("mcp", options), tasks_per_split=1)) == []


@pytest.mark.parametrize("rule", ["oracle_solves", "survives_text", "interleaved"])
def test_a_server_over_stdio_keeps_the_rule(rule: str) -> None:
    """Those that a process for each episode could break; all of them: `envs check`."""

    async def findings() -> list[tuple[str, str]]:
        tasks = [next(load("mcp", COUNT).tasks(split, 0)) for split in ("train", "test")]
        kit = Kit(factory=lambda: load("mcp", COUNT), tasks=tasks[:1], seed=0)
        return [found async for found in RULES[rule](kit)]

    assert asyncio.run(findings()) == []


def test_a_connection_that_is_used_again_plays_the_same() -> None:
    async def replies(env: McpTools) -> list[str]:
        tasks = env.tasks("train", 0)
        seen = []
        for _ in range(3):
            await env.reset(next(tasks))
            step = await env.step(act("add", by=3))
            seen.append(step.observation.messages[0].content)
        await env.close()
        return seen

    assert asyncio.run(replies(McpTools(**COUNT, connection="instance"))) == ["3", "3", "3"]
    assert asyncio.run(replies(McpTools(**COUNT))) == ["3", "3", "3"]


def test_an_episode_with_the_real_server_over_stdio() -> None:
    async def play() -> None:
        env = McpTools(**FETCH, server=PANTRY)
        opening = await env.reset(next(env.tasks("train", 0)))
        tools = {t["function"]["name"]: t["function"] for t in opening.tools}
        assert list(tools) == ["look", "take", "finish"]
        assert tools["look"]["description"] == "What lies on a shelf, 1 to 6."
        assert tools["look"]["parameters"]["required"] == ["shelf"]
        signals = {}
        for action in (
            "hm",
            act("tak", item="x"),
            act("look"),
            act("look", shelf=9),
            act("take", item="\\ud800"),
            '{"name": "take", "arguments": {"item": "\\ud800"}}',
        ):
            step = await env.step(action)
            assert step.observation.messages[0].role == "tool"
            signals[action] = dict(step.signals)
        assert [*map(list, signals.values())] == [
            ["policy_fault/parse"],
            ["tool_error/unknown_tool"],
            ["tool_error/failed"],
            ["tool_error/failed"],
            ["tool_error/failed"],
            ["policy_fault/parse"],
        ]
        for action in env.oracle():
            step = await env.step(action)
        assert step.terminated and (await env.evaluate()).success
        await env.close()
        await env.close()

    asyncio.run(play())


def test_arguments_that_the_job_fixes_are_hidden_and_cannot_be_forged(address: str) -> None:
    async def play() -> None:
        mine, other = (McpTools(**FETCH, server=address) for _ in range(2))
        task = next(mine.tasks("train", 0))
        opening = await mine.reset(task)
        await other.reset(task)
        assert "world" not in str(opening.tools)
        theirs = other._live().fixed["world"]
        await mine.step(act("take", item="tea", world=theirs))
        assert await other._live().call("taken", world=theirs) == ""
        await mine.close()
        await other.close()

    asyncio.run(play())


@pytest.mark.parametrize(("how", "why"), [("die", "failed"), ("hang", "no answer to")])
def test_a_server_that_dies_or_hangs_is_a_fault_and_is_replaced(how: str, why: str) -> None:
    async def play() -> None:
        env = McpTools(**COUNT)
        task = next(env.tasks("train", 0))
        await env.reset(task)
        before = int((await env.step(act("mis_behave", how="pid"))).observation.messages[0].content)
        if how == "hang":
            env._live().session._timeout_s = 0.5
        with pytest.raises(RemoteError, match=why):
            await env.step(act("mis_behave", how=how))
        with pytest.raises(RemoteError, match=why):
            await env.evaluate()
        await env.reset(task)
        assert (await env.step(act("add", by=1))).signals == {}
        assert not _alive(before)
        await env.close()

    asyncio.run(play())


def test_no_server_is_left_when_the_worker_is_killed() -> None:
    program = (
        "import asyncio, sys\n"
        "from loopwright.envs.adapters.mcp_tools import McpTools\n"
        "async def play():\n"
        f"    env = McpTools(**{COUNT!r})\n"
        "    await env.reset(next(env.tasks('train', 0)))\n"
        f"    step = await env.step({act('mis_behave', how='pid')!r})\n"
        "    print(step.observation.messages[0].content, flush=True)\n"
        f"    await env.step({act('mis_behave', how='hang')!r})\n"
        "asyncio.run(play())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=HERE.parent, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        server = int(worker.stdout.readline())
        assert _alive(server)
        worker.send_signal(signal.SIGKILL)
        worker.wait(_DEADLINE_S)
    ends = time.monotonic() + _DEADLINE_S
    while _alive(server):
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({**COUNT, "server": "nowhere"}, "expected http"),
        ({**COUNT, "server": ["no_such_program"]}, "there is no such program"),
        ({**COUNT, "server": "http://127.0.0.1:9/mcp"}, "(?i)the connection failed.*connect"),
        ({**COUNT, "server": [sys.executable, "-c", "pass"]}, "the connection failed"),
        ({**COUNT, "job": f"{HERE}/mcp_jobs.py:Cuont"}, "did you mean Count"),
        ({**COUNT, "job": f"{HERE}/mcp_jobs.py:NoJob"}, "no subclass of McpJob"),
        ({**COUNT, "job": "Count"}, "expected module:name"),
        ({**COUNT, "token_env": "NO_SUCH_TOKEN"}, "there is no variable"),
        ({**COUNT, "connection": "forever"}, "must be episode or instance or process"),
        ({**COUNT, "folder": str(HERE), "tools": ["ad"]}, "'ad': unknown; nearest: add"),
        ({**COUNT, "folder": "/", "finish": "read"}, "set options.finish"),
    ],
)
def test_what_does_not_fit_is_said_at_once(options: dict[str, Any], why: str) -> None:
    McpTools._tried.clear()
    with pytest.raises(EnvError, match=why):
        load("mcp", options)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)  # what an absent package looks like
    McpTools._tried.clear()
    with pytest.raises(ImportError, match=r"pip install 'loopwright\[mcp\]'"):
        McpTools(**COUNT)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
