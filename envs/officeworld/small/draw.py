"""What the scenarios of the small world draw from."""

from dataclasses import dataclass
from random import Random
from typing import Any

from loopwright.envs.actions import Call
from loopwright.envs.officeworld.small.population import FIRST_NAMES
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


def look_up(api: str) -> Call:
    """The oracle reads the documentation of an API."""
    return Call(name="docs.show", arguments={"api": api})


def write(name: str, /, **arguments: Any) -> tuple[Call, Call]:
    """Read the documentation of a writing API, then call it."""
    return look_up(name), Call(name=name, arguments=arguments)


DONE = Call(name="done")
