"""What a rule works with: fresh environments, tasks of both splits, and ways to play them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loopwright.envs.conformance.noise import hostile
from loopwright.envs.protocol import Observation, Step, Task, Verdict
from loopwright.envs.registry import Environment

SPLITS = ("train", "test")
_CLOSE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One broken rule."""

    rule: str
    task_id: str  # empty where no task is involved
    detail: str

    def __str__(self) -> str:
        return f"rule {self.rule}: {self.task_id + ': ' if self.task_id else ''}{self.detail}"


@dataclass(slots=True, kw_only=True)
class Kit:
    """The environment under examination. `full`: as many episodes as a long run would need to show
    a leak; otherwise as few as find a gross one."""

    factory: Callable[[], Environment]
    tasks: Sequence[Task]  # from both splits
    seed: int
    full: bool = False
    opened: list[Environment] = field(default_factory=list)
    solved: dict[str, tuple[list[str], Verdict]] = field(default_factory=dict)

    def make(self) -> Environment:
        """A new environment; `close` ends it with the rule."""
        env = self.factory()
        self.opened.append(env)
        return env

    async def close(self) -> None:
        """Close what the rule has opened. What `close` raises is the rule `ends`'s to find."""
        while self.opened:
            await asyncio.wait([asyncio.ensure_future(self.opened.pop().close())], timeout=_CLOSE_S)

    async def oracle(self, task: Task) -> tuple[list[str], Verdict]:
        """The oracle's actions and verdict, played once in an instance of its own."""
        if task.id not in self.solved:
            self.solved[task.id] = await oracle(self.make(), task)
        return self.solved[task.id]

    def noise(self, task: Task, count: int) -> list[str]:
        """Hostile actions, the same for the same task."""
        return hostile(f"noise/{self.seed}/{task.id}", count)


Rule = Callable[[Kit], AsyncIterator[tuple[str, str]]]  # yields (task id, detail) for each breach


def texts(observation: Observation) -> list[tuple[str, str]]:
    """What the policy reads of it."""
    return [(m.role, m.content) for m in observation.messages]


def shown(step: Step) -> tuple[Any, ...]:
    """All that a step says."""
    seen = step.observation
    return (texts(seen), list(seen.tools), seen.fresh, step.terminated, dict(step.signals))


async def transcript(env: Environment, task: Task, actions: Sequence[str]) -> list[Any]:
    """Everything an episode shows: opening, each reply, verdict."""
    seen: list[Any] = [texts(await env.reset(task))]
    return seen + await replies(env, actions) + [await env.evaluate()]


async def replies(env: Environment, actions: Sequence[str]) -> list[Any]:
    """What the environment says to each of the actions, as far as the episode goes."""
    seen: list[Any] = []
    for action in actions:
        step = await env.step(action)
        seen.append(shown(step))
        if step.terminated:
            break
    return seen


async def oracle(env: Environment, task: Task) -> tuple[list[str], Verdict]:
    """Play the oracle, its actions drawn between steps; they and the verdict."""
    await env.reset(task)
    actions: list[str] = []
    for action in env.oracle():
        actions.append(action)
        if (await env.step(action)).terminated:
            break
    return actions, await env.evaluate()
