"""Each rule of the kit catches the plugin that breaks it, and passes the one that does not."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from loopwright.envs.conformance import RULES, check
from loopwright.envs.officeworld import OfficeWorld
from loopwright.envs.protocol import EnvSpec, Message, Observation, Step, Task, Verdict

SHARED: list[str] = []  # what the plugin that shares state shares


class Echo:
    """A correct little environment: say the number that was shown. Each defect breaks one rule."""

    spec = EnvSpec(name="echo", version="1", description="Say the number.", max_turns=3)
    instances: ClassVar["itertools.count[int]"] = itertools.count()

    def __init__(self, defect: str = "") -> None:
        self.defect = defect
        self.number = next(self.instances)
        self.grades = 0
        self.said: list[str] = []
        if defect == "spec":
            self.spec = replace(Echo.spec, max_turns=0)

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        held_out = split == "test" and self.defect != "held_out"
        start = 1000 * seed + (self.number if self.defect == "repeated_stream" else 0)
        if self.defect == "tasks":
            raise KeyError(split)
        for i in range(start, start + 150):
            number = 2 * i + held_out
            payload: dict[str, Any] = {"x": object()} if self.defect == "task_records" else {}
            yield Task(
                environment="echo",
                id=f"echo-{number}",
                seed=number,
                split=split,
                scenario="echo",
                payload=payload,
            )

    async def reset(self, task: Task) -> Observation:
        self.wanted = str(task.seed)
        if self.defect == "interleaved":
            SHARED.clear()
            self.said = SHARED
        elif self.defect != "starts_over":
            self.said = []
        if self.defect == "determinism":
            self.wanted += str(self.number)
        role = "narrator" if self.defect == "messages" else "user"
        tools = [{"type": "function", "function": {"name": "has space"}}]
        return Observation(
            messages=[Message(role=role, content=f"say {self.wanted}")],
            tools=tools if self.defect == "tool_schemas" else (),
        )

    async def step(self, action: str) -> Step:
        if self.defect == "survives_text" and "{" in action:
            raise ValueError("unexpected brace")
        ended = bool(self.said) and self.defect not in ("starts_over", "interleaved", "ends")
        if not ended:
            self.said.append(action)
        count = Message(role="user", content=f"heard {len(self.said)}")
        return Step(observation=Observation(messages=[count]), terminated=True)

    async def evaluate(self) -> Verdict:
        self.grades += 1
        right = self.said[-1:] == [self.wanted]
        if self.defect == "ends":
            right = self.said == [self.wanted]
        if self.defect == "oracle_solves":
            right = False
        if self.defect == "idle_fails" and not self.said:
            right = True
        reward = float(right)
        if self.defect == "evaluate_idempotent":
            reward += self.grades
        if self.defect == "reward_range" and not right:
            reward = float("inf")
        return Verdict(reward=reward, success=right)

    def oracle(self) -> Iterator[str]:
        yield self.wanted

    async def close(self) -> None:
        self.said = []


def rules_broken(factory: Callable[[], Any]) -> set[str]:
    return {finding.rule for finding in asyncio.run(check(factory))}


def test_a_correct_environment_has_no_findings() -> None:
    assert asyncio.run(check(Echo)) == []


@pytest.mark.parametrize(
    ("style", "action_format"), [("compact", "call"), ("full", "json"), ("full", "code")]
)
def test_officeworld_conforms(style: Any, action_format: Any) -> None:
    def factory() -> OfficeWorld:
        return OfficeWorld(style=style, action_format=action_format)

    assert asyncio.run(check(factory)) == []


@pytest.mark.parametrize("rule", [*RULES, "tasks"])
def test_each_rule_catches_its_plugin(rule: str) -> None:
    assert rule in rules_broken(lambda: Echo(rule))


def test_findings_name_the_task_and_what_was_seen() -> None:
    findings = asyncio.run(check(lambda: Echo("survives_text")))
    found = next(f for f in findings if f.rule == "survives_text")
    assert found.task_id == "echo-0" and "unexpected brace" in found.detail


def test_a_plugin_without_tasks_is_a_finding() -> None:
    class Empty(Echo):
        def tasks(self, split: str, seed: int) -> Iterator[Task]:
            return iter(())

    assert rules_broken(Empty) == {"tasks"}
