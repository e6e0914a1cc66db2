"""What a scenario is: a family of tasks with three variants, drawn from a seed.

`build` draws the parameters, and gives the goal and the oracle's calls by canonical names; the
edition translates them into the dialect of the world.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loopwright.envs.actions import Call
from loopwright.envs.officeworld.grading import Goal


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A task drawn: what the templates say, what must be true at the end, and one way to get
    there."""

    values: Mapping[str, Any]
    goal: Goal
    calls: Sequence[Call]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A family of tasks. Templates have one entry per variant and are filled with `Plan.values`."""

    name: str
    difficulty: int  # 1 … 3: apps, calls, conditions
    texts: tuple[str, str, str]
    build: Callable[[Any], Plan]  # takes the edition's own `Draw`
    held_out: bool = False  # played in the test split only (where an edition holds scenarios out)


def call(name: str, /, **arguments: Any) -> Call:
    """One call of the oracle."""
    return Call(name=name, arguments=arguments)
