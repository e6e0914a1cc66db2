"""A class whose methods are tools is a whole environment; the example package is one."""

import asyncio
import itertools
import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Literal

import pytest

from loopwright.envs.actions import Call
from loopwright.envs.conformance import check
from loopwright.envs.protocol import EnvError, Message, Step, Task
from loopwright.envs.registry import load
from loopwright.envs.toolenv import ToolEnv, ToolError

EXAMPLE = Path(__file__).parents[1] / "examples/my_env/loopwright_pantry/__init__.py"


class Color(StrEnum):
    RED = "red"
    BLUE = "blue"
    GREEN = "green"
    BLACK = "black"


class Painter(ToolEnv):
    """Paints a wall; the goal is a color, blue at first."""

    name = "painter"
    version = "1"
    description = "Paint a wall."

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        for i in itertools.count():
            number = 2 * (1000 * seed + i) + (split == "test")
            yield Task(
                environment=self.name, id=f"{number}", seed=number, split=split, scenario="wall"
            )

    def start(self, task: Task) -> str:
        self._wall = "white"
        self._goal = (Color.BLUE, Color.GREEN, Color.RED, Color.BLACK)[task.seed // 2 % 4]
        return f"Paint the wall {self._goal}."

    def reward(self) -> float:
        return float(self._wall == self._goal)

    def solve(self) -> Iterator[Call]:
        yield Call(name="paint", arguments={"color": str(self._goal)})

    async def paint(self, color: Color, coats: int = 1, copy: Literal["a", "b"] = "a") -> str:
        """Paint the wall.

        color: the new color
        """
        if coats < 1:
            raise ToolError("invalid_value", "at least one coat")
        self._wall = color
        return f"painted {color}"

    def wall(self) -> dict[str, str]:
        """The color of the wall."""
        return {"color": self._wall}


def task_of(env: ToolEnv) -> Task:
    return next(env.tasks("train", 0))


async def say(env: ToolEnv, *actions: str) -> list[Step]:
    await env.reset(task_of(env))
    return [await env.step(action) for action in actions]


def call(name: str, **arguments: object) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def test_conforms() -> None:
    assert asyncio.run(check(Painter)) == []


def test_the_example_conforms_from_its_file() -> None:
    assert asyncio.run(check(lambda: load(f"{EXAMPLE}:Pantry"))) == []


def test_schemas_come_from_signatures_and_docstrings() -> None:
    env = Painter()
    opening = asyncio.run(env.reset(task_of(env)))
    tools = {tool["function"]["name"]: tool["function"] for tool in opening.tools}
    assert set(tools) == {"paint", "wall", "finish"}
    paint = tools["paint"]
    assert paint["description"] == "Paint the wall."
    assert paint["parameters"]["required"] == ["color"]
    assert set(paint["parameters"]["properties"]) == {"color", "coats", "copy"}
    assert paint["parameters"]["additionalProperties"] is False
    assert paint["parameters"]["properties"]["coats"] == {"default": 1, "type": "integer"}


def test_results_and_errors_are_observations() -> None:
    cases = {
        call("wall"): ('{"color": "white"}', {}),
        call("paint", color="red", coats=2): ("painted red", {}),
        call("pain", color="red"): ("did you mean paint?", {"tool_error/unknown_tool": 1}),
        call("paint"): ("color: Field required", {"tool_error/bad_argument": 1}),
        call("paint", color="yellow"): ("color", {"tool_error/bad_argument": 1}),
        call("paint", color="red", coats="2"): ("coats", {"tool_error/bad_argument": 1}),
        call("paint", color="red", size=2): ("size", {"tool_error/bad_argument": 1}),
        call("paint", color="red", coats=0): ("one coat", {"tool_error/invalid_value": 1}),
        call("paint", color="\ud800"): ("Invalid JSON", {"tool_error/bad_argument": 1}),
        call("reset", task=1): ("no such tool", {"tool_error/unknown_tool": 1}),
        call("_reply"): ("no such tool", {"tool_error/unknown_tool": 1}),
        "paint it": ("write one call", {"policy_fault/parse": 1}),
    }
    for (text, signals), step in zip(
        cases.values(), asyncio.run(say(Painter(), *cases)), strict=True
    ):
        assert text in step.observation.messages[0].content
        assert step.signals == signals and not step.terminated


def test_finish_ends_and_keeps_the_answer() -> None:
    env = Painter()
    steps = asyncio.run(say(env, call("finish", answer="blue"), call("paint", color="blue")))
    assert [s.terminated for s in steps] == [True, True]
    assert env.answer == "blue"
    assert asyncio.run(env.evaluate()).reward == 0.0
    opening = asyncio.run(env.reset(task_of(env)))
    assert env.answer == ""
    assert opening.messages == (Message(role="user", content="Paint the wall blue."),)


def test_the_authors_own_exception_is_not_the_agents_fault() -> None:
    class Broken(Painter):
        def crash(self) -> str:
            """Crash."""
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(say(Broken(), call("crash")))


def test_methods_that_cannot_be_tools_are_refused() -> None:
    with pytest.raises(EnvError, match="'size' must be named and have a type"):

        class Untyped(Painter):
            def scale(self, size) -> str:  # type: ignore[no-untyped-def]
                """Scale."""
                return "ok"

    with pytest.raises(EnvError, match="needs a docstring"):

        class Undocumented(Painter):
            def scale(self, size: int) -> str:
                return "ok"
