"""Every built-in environment: its oracle reaches 1, doing nothing and acting at random do not, and
ten thousand hostile actions leave it as fit as before."""

import asyncio
import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from loopwright.envs.conformance.kit import oracle
from loopwright.envs.conformance.noise import hostile
from loopwright.envs.conformance.played import play_randomly
from loopwright.envs.registry import Environment, load

ACTIONS = 10_000
WORLDS = Path(__file__).parent / "plain_world.py"
MEMBERS = {
    "errands": {"environment": "officeworld"},
    "quiz": {"environment": "search", "options": {"style": "compact"}},
}
BUILT_IN: dict[str, tuple[str, dict[str, Any]]] = {
    "small office": ("officeworld", {}),
    "full office": ("officeworld", {"style": "full", "action_format": "json"}),
    "search": ("search", {"hops": [1, 2, 3]}),
    "constant memory": ("search", {"style": "compact", "memory": "constant", "objectives": 2}),
    "puzzles": ("reasoning_gym", {"tries": 3}),
    "mix": ("mix", {"members": MEMBERS}),
    "process": ("process", {"target": f"{WORLDS}:Echo", "options": {"highest": 9999}}),
}


@pytest.fixture(params=BUILT_IN)
def env(request: pytest.FixtureRequest) -> Environment:
    """One of them."""
    if request.param == "puzzles":
        pytest.importorskip("reasoning_gym")
    name, options = BUILT_IN[request.param]
    return load(name, options)


def tasks_of(env: Environment, count: int) -> list[Any]:
    """Of both splits."""
    return [t for s in ("train", "test") for t in itertools.islice(env.tasks(s, 7), count)]


def test_the_oracle_reaches_1_and_idleness_does_not(env: Environment) -> None:
    async def scene() -> None:
        for task in tasks_of(env, 25):
            await env.reset(task)
            assert (idle := await env.evaluate()).reward < 1 and not idle.success
            actions, verdict = await oracle(env, task)
            assert actions and verdict.success and verdict.reward >= 1, task.id
        await env.close()

    asyncio.run(scene())


@pytest.mark.parametrize("seed", range(5))
def test_random_policies_do_not_reach_1(env: Environment, seed: int) -> None:
    async def scene() -> None:
        tasks = tasks_of(env, 5)
        right = {task.id: (await oracle(env, task))[0] for task in tasks}
        for task in tasks:
            elsewhere = [a for other, said in right.items() if other != task.id for a in said]
            verdict = await play_randomly(env, task, f"{seed}/{task.id}", elsewhere)
            assert verdict.reward < 1 and not verdict.success, task.id
        await env.close()

    asyncio.run(scene())


def test_hostile_actions_leave_it_as_fit_as_before(env: Environment) -> None:
    async def scene() -> None:
        tasks = tasks_of(env, 10)
        before = [await oracle(env, task) for task in tasks]
        turns = 0
        playing = itertools.cycle(tasks)
        await env.reset(next(playing))
        for action in hostile("fuzz", ACTIONS):
            step = await env.step(action)
            for message in step.observation.messages:
                assert len(message.content.encode()) < 50_000
            turns += 1
            if step.terminated or turns >= 3 * env.spec.max_turns:
                verdict = await env.evaluate()
                assert math.isfinite(verdict.reward) and not verdict.success
                await env.reset(next(playing))
                turns = 0
        assert [await oracle(env, task) for task in tasks] == before
        await env.close()

    asyncio.run(scene())
