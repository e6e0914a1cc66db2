"""A world whose episodes have long-tailed lengths, whatever the policy says: for measuring what a
straggler costs. Named by `benchmarks/async_vs_sync.py`; it teaches nothing.

A task says how many turns it takes: log-normal over tasks, of a given coefficient of variation, at
most ten times the mean. Every eight turns the context begins anew, so that the longest fit the
context of a tiny policy. The reward is a share of letters, so that advantages differ.
"""

import math
import random
from collections.abc import Iterator

from loopwright.envs.protocol import EnvSpec, Message, Observation, Step, Task, Verdict

_TURNS_A_CONTEXT = 8


class LongTail:
    """As many turns as the task takes; each asks for more."""

    spec = EnvSpec(
        name="long_tail",
        version="1",
        description="Goes on for as many turns as the task says.",
        max_turns=10_000,
        deterministic=True,
    )

    def __init__(self, mean_turns: float = 3.0, cv: float = 1.0) -> None:
        """Mean and coefficient of variation of the turns, before they are rounded and cut."""
        self._sigma = math.sqrt(math.log1p(cv**2))
        self._mu = math.log(mean_turns) - self._sigma**2 / 2
        self._most = round(10 * mean_turns)
        self._turns = self._taken = 0
        self._text = ""

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """An endless stream."""
        for number in range(10**9):
            yield Task(
                environment="long_tail",
                id=f"{split}-{seed}-{number}",
                seed=number,
                split=split,
                scenario="long_tail",
            )

    async def reset(self, task: Task) -> Observation:
        """Draw the number of turns."""
        chance = random.Random(f"{task.split}/{task.id}")
        drawn = math.ceil(chance.lognormvariate(self._mu, self._sigma))
        self._turns, self._taken, self._text = max(1, min(drawn, self._most)), 0, ""
        return Observation(messages=[Message(role="user", content=f"say {task.seed % 97}")])

    async def step(self, action: str) -> Step:
        """One turn less."""
        self._text += action
        self._taken += 1
        anew = self._taken % _TURNS_A_CONTEXT == 0
        more = Observation(messages=[Message(role="user", content="more")], fresh=anew)
        return Step(observation=more, terminated=self._taken == self._turns)

    async def evaluate(self) -> Verdict:
        """The share of letters, 0–1."""
        share = sum(c.isalpha() for c in self._text) / max(len(self._text), 1)
        return Verdict(reward=share, success=share > 0.5)

    def oracle(self) -> Iterator[str]:
        """A word."""
        yield "word"

    async def close(self) -> None:
        """Nothing is held."""
