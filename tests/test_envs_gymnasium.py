"""The adapter to the real Gymnasium: toy-text in words, text spaces, and what does not fit."""

import asyncio
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

from loopwright.envs.adapters.gymnasium_text import GymnasiumText
from loopwright.envs.conformance import check
from loopwright.envs.protocol import EnvError, Task, TaskError, Verdict
from loopwright.envs.registry import load
from loopwright.orchestrator.cli import main

WORLDS = Path(__file__).parent / "text_worlds.py"
KINDS: dict[str, dict[str, Any]] = {
    "lake": {"id": "FrozenLake-v1", "make": {"is_slippery": False}, "max_turns": 20},
    "slippery": {"id": "FrozenLake-v1", "make": {"map_name": "4x4"}, "split_by": "seed"},
    "cliff": {"id": "CliffWalking-v1", "split_by": "seed", "max_turns": 20},
    "taxi": {"id": "Taxi-v4", "max_turns": 25},
    "blackjack": {"id": "Blackjack-v1"},
    "text": {"id": f"{WORLDS}:Reverse", "make": {"letters": "abc"}},
    "ansi": {"id": f"{WORLDS}:Coin"},
    "described": {
        "id": f"{WORLDS}:Coin",
        "describe": f"{WORLDS}:told",
        "actions": ["heads", "tails"],
    },
}


def play(env: GymnasiumText, task: Task, *actions: str) -> Verdict:
    async def episode() -> Verdict:
        await env.reset(task)
        for action in actions:
            await env.step(f"<action>{action}</action>")
        return await env.evaluate()

    return asyncio.run(episode())


@pytest.mark.parametrize("kind", KINDS)
def test_conforms(kind: str) -> None:
    assert asyncio.run(check(lambda: load("gymnasium", KINDS[kind]), tasks_per_split=1)) == []


@pytest.mark.parametrize("kind", ["lake", "cliff", "taxi"])
def test_the_oracle_solves_what_has_no_chance(kind: str) -> None:
    env = GymnasiumText(**KINDS[kind])

    async def solved(task: Task) -> Verdict:
        await env.reset(task)
        for action in env.oracle():
            await env.step(action)
        return await env.evaluate()

    for task in itertools.islice(env.tasks("train", 0), 5):
        verdict = asyncio.run(solved(task))
        assert verdict.success and verdict.reward == 1.0


def test_optimal_returns_are_those_of_value_iteration() -> None:
    """The plan's return from each state of the taxi, against dynamic programming over its table."""
    from loopwright.envs.adapters.toy_text import best_plan

    env = GymnasiumText("Taxi-v4")
    unwrapped = env._world.env.unwrapped  # type: ignore[union-attr]
    values = dict.fromkeys(unwrapped.P, 0.0)
    for _ in range(25):
        values = {
            s: max(r + (0.0 if ends else values[after]) for [(_, after, r, ends)] in acts.values())
            for s, acts in unwrapped.P.items()
        }
    starts = [s for s, p in enumerate(unwrapped.initial_state_distrib) if p > 0]
    assert min(values[s] for s in starts) == 3.0  # what toy_text.py says of the farthest task
    for state in starts[::37]:
        unwrapped.s, total = state, 0.0
        for action in best_plan(unwrapped, 25):
            [(_, unwrapped.s, reward, _)] = unwrapped.P[unwrapped.s][action]
            total += reward
        assert total == values[state]


def test_lakes_differ_by_seed_and_the_splits_never_share_one() -> None:
    env = GymnasiumText(**KINDS["lake"])

    def lakes(split: str) -> set[str]:
        drawn = itertools.islice(env.tasks(split, 0), 30)
        return {asyncio.run(env.reset(task)).messages[1].content for task in drawn}

    train, test = lakes("train"), lakes("test")
    assert len(train) > 20 and not train & test
    fixed = GymnasiumText("FrozenLake-v1", make={"map_name": "8x8"}, split_by="seed")
    opening = asyncio.run(fixed.reset(next(fixed.tasks("train", 0)))).messages[1].content
    assert opening.splitlines()[:8] == [
        "*FFFFFFF",
        *["FFFFFFFF", "FFFHFFFF", "FFFFFHFF"],
        *["FFFHFFFF", "FHHFFFHF", "FHFFHFHF", "FFFHFFFG"],
    ]


def test_reward_is_the_return_on_its_scale_and_nothing_before_the_end() -> None:
    env = GymnasiumText("Blackjack-v1", worth=[-2, 2], success=2)
    task = next(env.tasks("train", 1))
    assert play(env, task).reward == 0.0
    bust = play(env, task, *["hit"] * 21)
    assert (bust.reward, bust.success, bust.parts) == (0.25, False, {"return": -1.0})


def test_text_actions_outside_their_space_cost_a_turn_only() -> None:
    env = GymnasiumText(**KINDS["text"])
    task = next(env.tasks("train", 0))

    async def episode() -> None:
        word = (await env.reset(task)).messages[1].content
        for text in ("", "cab", "<action>xyz</action>", "<action>" + "a" * 11 + "</action>"):
            step = await env.step(text)
            assert step.signals == {"policy_fault/parse": 1} and not step.terminated
        assert not (await env.step("<action>a</action>")).terminated
        assert (
            await env.step(f"first <action>b</action> <action>{word[::-1]}</action>")
        ).terminated
        assert (await env.step("more")).terminated
        assert (await env.evaluate()).success

    asyncio.run(episode())


def test_colours_are_no_text_and_numbered_actions_start_where_the_space_does() -> None:
    env = GymnasiumText(**KINDS["ansi"])
    task = next(env.tasks("train", 0))
    messages = asyncio.run(env.reset(task)).messages
    assert messages[1].content.startswith("coin ") and "actions: 5, 6" in messages[0].content
    assert {play(env, task, "5").success, play(env, task, "6").success} == {True, False}


def test_an_opening_that_does_not_repeat_is_a_task_error() -> None:
    env = GymnasiumText(f"{WORLDS}:Unseeded")
    with pytest.raises(TaskError, match="opened otherwise"):
        asyncio.run(env.reset(next(env.tasks("train", 0))))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"id": "FrozenLak-v1"}, "'FrozenLak-v1': unknown; nearest: FrozenLake-v1"),
        ({"id": "FrozenLake-v1", "make": {"slippery": True}}, "refuses.*slippery"),
        ({"id": "CartPole-v1"}, "options.describe"),
        ({"id": f"{WORLDS}:Mute"}, "options.describe"),
        ({"id": f"{WORLDS}:Steering"}, "expected Discrete or Text"),
        ({"id": f"{WORLDS}:Coinn"}, "did you mean Coin"),
        ({"id": f"{WORLDS}:Coin", "actions": ["heads"]}, "expected 2 different names"),
        ({"id": "Taxi-v4", "worth": [1, 1]}, "expected \\[return of 0"),
        ({"id": "Taxi-v4", "split_by": "dice"}, "'opening' or 'seed'"),
        ({"id": "Taxi-v4", "sed": 1}, "unknown option 'sed'"),
    ],
)
def test_what_does_not_fit_is_said_at_once(options: dict[str, Any], why: str) -> None:
    with pytest.raises(EnvError, match=why):
        load("gymnasium", options)


def test_splits_without_tasks_are_said() -> None:
    with pytest.raises(EnvError, match="split_by = 'seed'"):
        for split in ("train", "test"):  # it always opens alike: one of the two is empty
            next(GymnasiumText("CliffWalking-v1").tasks(split, 0))
    with pytest.raises(EnvError, match="must be 'train' or 'test'"):
        next(GymnasiumText("CliffWalking-v1").tasks("held_out", 0))


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)  # what an absent package looks like
    with pytest.raises(ImportError, match=r"pip install 'loopwright\[gymnasium\]'"):
        GymnasiumText("Taxi-v4")


def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["envs", "play", "gymnasium", "--oracle", "--option", "id=Taxi-v4"]) == 0
    assert "solved" in capsys.readouterr().out
    assert main(["envs", "describe", "gymnasium", "--option", "id=Taxi-v4"]) == 0
    assert "told in words" in capsys.readouterr().out
