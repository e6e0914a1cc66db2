"""The adapter to verifiers v1: its contract against a stub of the package's shape, and the real
package in the interpreter that `LOOPWRIGHT_VERIFIERS_PYTHON` names."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from loopwright.envs.adapters.verifiers import Verifiers
from loopwright.envs.conformance import RULES, Kit, check
from loopwright.envs.protocol import EnvError
from loopwright.envs.registry import load

STUBS = Path(__file__).parent / "stub_packages"
TASKS = STUBS / "verifiers_tasks"
REAL = os.environ.get("LOOPWRIGHT_VERIFIERS_PYTHON", "")
real = pytest.mark.skipif(not REAL, reason="set LOOPWRIGHT_VERIFIERS_PYTHON to one with verifiers")
REVERSE: dict[str, Any] = {"taskset": "reverse_text_tasks", "answer_field": "answer"}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's stand-in, and a taskset that is written for either."""
    monkeypatch.setenv("PYTHONPATH", f"{STUBS / 'verifiers'}{os.pathsep}{TASKS}")
    monkeypatch.delenv("LOOPWRIGHT_VERIFIERS_PYTHON", raising=False)


async def scenes(**options: Any) -> list[Any]:
    """What is seen of an episode that ends well, one that ends badly, and one that does not end."""
    env = Verifiers(**REVERSE, **options)
    task = next(env.tasks("train", 0))
    opening = await env.reset(task)
    seen: list[Any] = [task, [(m.role, m.content) for m in opening.messages], opening.tools]
    seen.append(await env.evaluate())
    for turn in (*env.oracle(), "nonsense"):
        await env.reset(task)
        step = await env.step(turn)
        seen += [step, await env.evaluate(), await env.step("after the end")]
    await env.reset(task)
    await env.close()
    await env.close()
    return seen


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("rule", ["oracle_solves", "evaluate_idempotent", "interleaved"])
def test_the_stub_keeps_the_rule(rule: str) -> None:
    """Those that rollouts which wait in one loop could break; all of them with the real package."""

    async def findings() -> list[tuple[str, str]]:
        kit = Kit(factory=lambda: load("verifiers", REVERSE), tasks=(), seed=0)
        source = kit.make()
        kit.tasks = [next(source.tasks("train", 0))]
        try:
            return [found async for found in RULES[rule](kit)]
        finally:
            await kit.close()

    assert asyncio.run(findings()) == []


@pytest.mark.usefixtures("stub")
def test_an_episode() -> None:
    task, messages, tools, unfinished, right, solved, _, wrong, failed, _ = asyncio.run(scenes())
    assert messages == [("system", "Answer alone."), ("user", messages[1][1])]
    assert tools == () and task.seed % 4 and unfinished.reward == 0.0
    assert right.terminated and solved.success and solved.parts == {"right": 1.0}
    assert wrong.terminated and not failed.success


@pytest.mark.usefixtures("stub")
def test_tool_calls_are_answered_and_the_episode_goes_on() -> None:
    """A tool that does not exist: its error is the observation, and a later turn ends the task."""

    async def play() -> None:
        env = Verifiers(**REVERSE, config={"num_tasks": 8})
        assert {t.seed for t, _ in zip(env.tasks("test", 0), range(9), strict=False)} == {0, 4}
        await env.reset(next(env.tasks("train", 0)))
        step = await env.step('<tool_call>{"name": "dig", "arguments": {}}</tool_call> \ud800')
        assert not step.terminated and not step.observation.fresh
        assert [(m.role, m.content) for m in step.observation.messages] == [
            ("tool", "error: there is no tool dig")
        ]
        assert (await env.step("<tool_call>{broken</tool_call>")).terminated
        await env.close()

    asyncio.run(play())


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"taskset": "no_such_tasks"}, "taskset 'no_such_tasks' not found"),
        ({"taskset": "reverse_text_tasks", "config": {"num_tasks": "many"}}, "num_tasks"),
    ],
)
def test_what_does_not_load_is_said_at_once(options: dict[str, Any], why: str) -> None:
    with pytest.raises(EnvError, match=why):
        Verifiers(**options)


def test_a_missing_package_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.delenv("LOOPWRIGHT_VERIFIERS_PYTHON", raising=False)
    with pytest.raises(EnvError, match=r"-m pip install 'verifiers>=0\.4,<0\.5'"):
        Verifiers(taskset="anything")


@real
def test_the_real_package_conforms_and_shows_what_the_stub_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TASKS))
    options = {**REVERSE, "python": REAL}
    assert asyncio.run(check(lambda: load("verifiers", options), tasks_per_split=1)) == []
    seen = asyncio.run(scenes(python=REAL))
    monkeypatch.setenv("PYTHONPATH", f"{STUBS / 'verifiers'}{os.pathsep}{TASKS}")
    monkeypatch.delenv("LOOPWRIGHT_VERIFIERS_PYTHON")
    assert seen == asyncio.run(scenes())


@real
def test_tools_of_the_real_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TASKS))

    async def play() -> None:
        env = Verifiers(taskset="looked_up_tasks", answer_field="answer", python=REAL)
        opening = await env.reset(next(env.tasks("train", 0)))
        assert [tool["function"]["name"] for tool in opening.tools] == ["look_up"]
        name = opening.messages[0].content.split()[-1].rstrip("?")
        call = f'{{"name": "look_up", "arguments": {{"name": "{name}"}}}}'
        step = await env.step(f"I ask.\n<tool_call>{call}</tool_call>")
        number = step.observation.messages[0].content
        assert number == str(sum(map(ord, name)))
        assert (await env.step(number)).terminated and (await env.evaluate()).success
        await env.close()

    asyncio.run(play())
