"""The adapter to OpenEnv: against a stand-in that sends its messages, and against servers of the
real package in the interpreter that `LOOPWRIGHT_OPENENV_PYTHON` names."""

import asyncio
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openenv_stub import Guessing, Tools, served

from loopwright.envs.actions import Call, render_action
from loopwright.envs.adapters.openenv import OpenEnv
from loopwright.envs.conformance import check
from loopwright.envs.protocol import EnvError
from loopwright.envs.registry import load
from loopwright.envs.remote.plain import RemoteError

HERE = Path(__file__).parent
ACT, CALL = f"{HERE}/openenv_solvers.py:act", f"{HERE}/openenv_solvers.py:call"
REAL = os.environ.get("LOOPWRIGHT_OPENENV_PYTHON", "")


def act(name: str, **arguments: object) -> str:
    return render_action(Call(name=name, arguments=arguments), "json")


@contextmanager
def real(kind: str) -> Iterator[str]:
    """A server of the real package."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [REAL, str(HERE / "openenv_server.py"), kind, str(port)]
    with subprocess.Popen(
        command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        assert any("running on" in line for line in server.stderr)
        yield f"http://127.0.0.1:{port}"
        server.terminate()


@pytest.mark.parametrize(("kind", "solve"), [(Guessing, ACT), (Tools, CALL)])
def test_the_stand_in_conforms(kind: type[Guessing], solve: str) -> None:
    with served(kind) as url:
        options = {"url": url, "solve": solve, "max_turns": 6}
        assert asyncio.run(check(lambda: load("openenv", options), tasks_per_split=1)) == []


@pytest.mark.skipif(not REAL, reason="set LOOPWRIGHT_OPENENV_PYTHON to a Python with openenv")
@pytest.mark.parametrize(("kind", "solve"), [("guess", ACT), ("tools", CALL)])
def test_the_real_package_conforms_and_sends_what_the_stand_in_sends(kind: str, solve: str) -> None:
    async def scenes(url: str) -> list[Any]:
        env = OpenEnv(url)
        task = next(env.tasks("train", 0))
        tool = "act" if kind == "guess" else "guess"
        seen: list[Any] = [(await env.reset(task)).messages]
        for action in (act(tool, number=0), act(tool, number=9)):
            step = await env.step(action)
            seen.append((step.observation.messages, step.terminated, dict(step.signals)))
        seen.append(next(iter((await env.step(act(tool, number="x"))).signals)))
        await env.close()
        return seen

    with real(kind) as url:
        options = {"url": url, "solve": solve, "max_turns": 6}
        assert asyncio.run(check(lambda: load("openenv", options), tasks_per_split=2)) == []
        with served(Guessing if kind == "guess" else Tools) as stand_in:
            assert asyncio.run(scenes(url)) == asyncio.run(scenes(stand_in))


def test_actions_faults_and_rewards() -> None:
    async def scenes(url: str) -> None:
        env = OpenEnv(url, instruction="Guess.", worth=[0, 2], success=1, reward="sum", solve=ACT)
        task = next(env.tasks("train", 0))
        opening = await env.reset(task)
        assert opening.messages[0].content == "Guess.\n\na number from 0 to 7"
        parameters = opening.tools[0]["function"]["parameters"]
        assert set(parameters["properties"]) == {"number"}
        for action, signal in (
            ("5", "policy_fault/parse"),
            (act("guess", number=5), "tool_error/unknown_tool"),
            (act("act", number="x"), "tool_error/bad_argument"),
        ):
            step = await env.step(action)
            assert dict(step.signals) == {signal: 1} and not step.terminated
        assert (await env.evaluate()).reward == 0.0
        with pytest.raises(RemoteError, match="EXECUTION_ERROR: the environment broke"):
            await env.step(act("act", number=-12345))
        for action in env.oracle():
            step = await env.step(action)
        verdict = await env.evaluate()
        assert step.terminated and verdict.success and verdict.reward == 0.5
        assert (await env.step("more")).terminated
        await env.close()
        await env.close()

    with served(Guessing) as url:
        asyncio.run(scenes(url))


def test_a_turn_as_one_field_and_a_field_to_show() -> None:
    async def scenes(url: str) -> None:
        env = OpenEnv(url, text_field="number", show="hint")
        opening = await env.reset(next(env.tasks("test", 0)))
        assert not opening.tools
        step = await env.step("hm</think> five \ud800")
        assert dict(step.signals) == {"tool_error/bad_argument": 1}
        await env.close()

    with served(Guessing) as url:
        asyncio.run(scenes(url))


def test_a_full_server_and_one_that_is_gone_are_faults() -> None:
    async def scenes(url: str, stop: Any) -> None:
        one, two = OpenEnv(url), OpenEnv(url)
        task = next(one.tasks("train", 0))
        await one.reset(task)
        with pytest.raises(RemoteError, match="CAPACITY_REACHED: 1 sessions are open"):
            await two.reset(task)
        await one.close()
        await two.reset(task)
        await asyncio.to_thread(stop, None, None, None)
        with pytest.raises(RemoteError, match="step failed"):
            await two.step(act("act", number=1))
        with pytest.raises(RemoteError, match="connection is gone"):
            await two.step(act("act", number=1))
        with pytest.raises(RemoteError, match="reset failed"):
            await two.reset(task)
        await two.close()

    server = served(Guessing, room=1)
    asyncio.run(scenes(server.__enter__(), server.__exit__))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"url": "127.0.0.1"}, "expected http://host:port"),
        ({"url": "http://127.0.0.1:9"}, "/schema: no answer"),
        ({"reward": "lats"}, "nearest: last"),
        ({"worth": [1, 1]}, "expected \\[reward of 0"),
        ({"text_field": "numbr"}, "nearest: number"),
        ({"solve": f"{HERE}/openenv_solvers.py:actt"}, "did you mean act"),
    ],
)
def test_what_does_not_fit_is_said_at_once(options: dict[str, Any], why: str) -> None:
    with served(Guessing) as url, pytest.raises(EnvError, match=why):
        load("openenv", {"url": url, **options})
