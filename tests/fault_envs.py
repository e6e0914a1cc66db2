"""Environments that misbehave on purpose, loaded as plugins: `tests/fault_envs.py:Raising`.

All of them play the same small game, so that any policy earns rewards that differ: the text's share
of letters. What each does wrong is its docstring.
"""

import asyncio
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loopwright.envs.protocol import (
    EnvSpec,
    Message,
    Observation,
    Step,
    Task,
    TaskError,
    Verdict,
)


class Letters:
    """Nothing wrong: one turn, the reward is the share of letters in what the policy wrote."""

    spec = EnvSpec(
        name="letters", version="1", description="Write letters.", max_turns=1, deterministic=True
    )

    def __init__(self) -> None:
        self.task: Task | None = None
        self.text = ""

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """An endless stream; test tasks have ids of their own."""
        number = 0
        while True:
            number += 1
            yield Task(
                environment="letters",
                id=f"{split}-{seed}-{number}",
                seed=number,
                split=split,
                scenario="letters",
            )

    async def reset(self, task: Task) -> Observation:
        """Ask for letters."""
        self.task, self.text = task, ""
        return Observation(messages=[Message(role="user", content=f"write {task.seed % 7}")])

    async def step(self, action: str) -> Step:
        """Take the text; the episode is over."""
        self.text = action
        return Step(observation=Observation(messages=[]), terminated=True)

    async def evaluate(self) -> Verdict:
        """The share of letters, 0–1."""
        share = sum(c.isalpha() for c in self.text) / max(len(self.text), 1)
        return Verdict(reward=share, success=share == 1.0)

    def oracle(self) -> Iterator[str]:
        """A word."""
        yield "abcde"

    async def close(self) -> None:
        """Nothing is held."""

    def trains_on(self, every: int) -> bool:
        """Is this a training task, and one of every `every`?"""
        task = self.task
        return task is not None and task.split == "train" and task.seed % every == 0


class Slow(Letters):
    """Nothing wrong, but each turn takes `pause_s`: time to kill somebody."""

    def __init__(self, pause_s: float = 0.3) -> None:
        super().__init__()
        self.pause_s = pause_s

    async def step(self, action: str) -> Step:
        """As `Letters`, later."""
        await asyncio.sleep(self.pause_s)
        return await super().step(action)


class Chatty(Letters):
    """Nothing wrong: four slow turns; the tasks that it begins with are noted in `folder`."""

    spec = EnvSpec(
        name="letters", version="1", description="Write letters.", max_turns=4, deterministic=True
    )

    def __init__(self, folder: str, pause_s: float = 0.3) -> None:
        super().__init__()
        self.notes, self.pause_s = Path(folder) / "begun.txt", pause_s

    async def reset(self, task: Task) -> Observation:
        """Note it."""
        with self.notes.open("a") as notes:
            notes.write(f"{task.id}\n")
        return await super().reset(task)

    async def step(self, action: str) -> Step:
        """Say a word, and wait for the next."""
        await asyncio.sleep(self.pause_s)
        self.text += action
        return Step(observation=Observation(messages=[Message(role="user", content="more")]))


class Forgetful(Chatty):
    """Calls itself deterministic, and says how many worlds were begun before."""

    async def step(self, action: str) -> Step:
        """Count."""
        await super().step(action)
        begun = len(self.notes.read_text().splitlines())
        return Step(observation=Observation(messages=[Message(role="user", content=str(begun))]))


class Unbuildable(Letters):
    """Raises in its constructor."""

    def __init__(self, size: int = 3) -> None:
        raise RuntimeError("no licence server at 10.0.0.7")


class Raising(Letters):
    """Raises for every `every`-th training task, in `where`."""

    def __init__(self, where: str = "step", every: int = 5) -> None:
        super().__init__()
        self.where, self.every = where, every

    async def reset(self, task: Task) -> Observation:
        """May raise."""
        observation = await super().reset(task)
        if self.where == "reset" and self.trains_on(self.every):
            raise ConnectionError("the database is away")
        return observation

    async def step(self, action: str) -> Step:
        """May raise."""
        if self.where == "step" and self.trains_on(self.every):
            raise ConnectionError("the database is away")
        return await super().step(action)


class Once(Letters):
    """Raises the first time any instance plays one of every four training tasks, and never again.
    `folder` remembers across instances and processes."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    async def step(self, action: str) -> Step:
        """May raise."""
        if self.task is not None and self.trains_on(4):
            marker = self.folder / self.task.id
            if not marker.exists():
                marker.touch()
                raise ConnectionError("one lost packet")
        return await super().step(action)


class Broken(Letters):
    """Says that one training task is broken."""

    async def reset(self, task: Task) -> Observation:
        """Raises `TaskError` for training task 2."""
        if task.split == "train" and task.seed == 2:
            raise TaskError("its goal cannot be reached")
        return await super().reset(task)


class NoNumber(Letters):
    """The reward of every fifth training task is not a number."""

    async def evaluate(self) -> Verdict:
        """NaN now and then."""
        if self.trains_on(5):
            return Verdict(reward=float("nan"), success=False)
        return await super().evaluate()


class Nonsense(Letters):
    """Every fifth training task begins with something that is no observation."""

    async def reset(self, task: Task) -> Any:
        """Text instead of an observation."""
        observation = await super().reset(task)
        return "hello" if self.trains_on(5) else observation


class Waiting(Letters):
    """Waits for ever, politely, in every fifth training task."""

    async def step(self, action: str) -> Step:
        """Never comes back."""
        if self.trains_on(5):
            await asyncio.Event().wait()
        return await super().step(action)


class Filling(Letters):
    """Fills the disk once: from its first training episode on, no file of its process may grow
    beyond `limit_bytes`. `folder` remembers that it was done; only the soft limit is set."""

    def __init__(self, folder: str, limit_bytes: int) -> None:
        super().__init__()
        self.marker, self.limit_bytes = Path(folder) / "filled", limit_bytes

    async def reset(self, task: Task) -> Observation:
        """May set the limit."""
        if task.split == "train" and not self.marker.exists():
            self.marker.touch()
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit_bytes, hard))
        return await super().reset(task)
