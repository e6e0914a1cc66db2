"""What a scenario is: a family of tasks with three variants, drawn from a seed.

Variants 1 and 2 are for training, variant 3 is held out. `build` draws the parameters, and gives
the goal and the oracle's calls by canonical parameter names; the environment translates them into
the dialect of the world.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from loopwright.envs.actions import Call
from loopwright.envs.officeworld.grading import Goal
from loopwright.envs.officeworld.population import FIRST_NAMES
from loopwright.envs.officeworld.state import Row, World


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What `build` draws from: the world at its start (read it, never change it) and the task's
    randomness."""

    world: World
    rng: Random
    page_size: int

    def pick(self, table: str) -> tuple[int, Row]:
        """A random row and its id."""
        return self.rng.choice(list(self.world.rows(table)))

    def person(self) -> tuple[int, str]:
        """Id and name of a random contact."""
        person, row = self.pick("contacts")
        return person, str(row["name"])

    def stranger(self) -> str:
        """A first name that no contact has."""
        known = {str(row["name"]) for _, row in self.world.rows("contacts")}
        return self.rng.choice([name for name in FIRST_NAMES if name not in known])

    @property
    def balance(self) -> int:
        """Coins on the account."""
        row = self.world.get("account", 1)
        return _int(row["balance"]) if row is not None else 0


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is not an integer")
    return value


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
    compact: tuple[str, str, str]  # variant 3 may only use words that other training templates use
    full: tuple[str, str, str]
    build: Callable[[Draw], Plan]


def call(name: str, /, **arguments: Any) -> Call:
    """One call of the oracle."""
    return Call(name=name, arguments=arguments)


def look_up(api: str) -> Call:
    """The oracle reads the documentation of an API."""
    return Call(name="docs.show", arguments={"api": api})


def write(name: str, /, **arguments: Any) -> tuple[Call, Call]:
    """Read the documentation of a writing API, then call it."""
    return look_up(name), Call(name=name, arguments=arguments)


DONE = Call(name="done")
