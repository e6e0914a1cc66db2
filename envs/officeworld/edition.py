"""The seam between the environment and its worlds: the small office of tiny policies, and the full
one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loopwright.envs.actions import Call, Fault
from loopwright.envs.officeworld.api import Api, ApiError, App, Office
from loopwright.envs.officeworld.scenario import Plan, Scenario
from loopwright.envs.protocol import EnvError, Task

NAME = "officeworld"
WORLDS = 4096  # seeds of worlds a split; even ones are for training, odd ones held out


class BadOption(EnvError, ValueError):
    """An option or a split that this world does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleCall:
    """One call of the oracle in the world's dialect. `phase` groups the calls of a code cell;
    `token_of` names the app whose login it is."""

    call: Call
    phase: str
    token_of: str = ""


class Edition(Protocol):
    """A world: its apps, scenarios and population, and how it speaks."""

    @property
    def formats(self) -> Sequence[str]:
        """Ways to write actions that it takes."""
        ...

    @property
    def sizes(self) -> tuple[int, int, int]:
        """People by default, at least, at most."""
        ...

    @property
    def max_turns(self) -> int:
        """Default budget of turns."""
        ...

    @property
    def apps(self) -> Mapping[str, App]:
        """All its apps."""
        ...

    @property
    def apis(self) -> Mapping[str, Api]:
        """All its APIs by canonical name."""
        ...

    @property
    def scenarios(self) -> Mapping[str, Scenario]:
        """All its scenarios by name."""
        ...

    def tasks(self, chosen: Sequence[Scenario], split: str, seed: int) -> Iterator[Task]:
        """An endless stream, the same for the same arguments; splits share nothing. Raises
        `BadOption` if the split has none of the chosen scenarios."""
        ...

    def open(self, task: Task, variant: int, people: int) -> tuple[Plan, Office]:
        """The task drawn, and a new world for it."""
        ...

    def oracle(self, plan: Plan, office: Office) -> Sequence[OracleCall]:
        """How the task is solved in this world."""
        ...

    def system(self, action_format: str, office: Office) -> str:
        """The rules of the game."""
        ...

    def shown(self, api: str, value: Any) -> str:
        """What a call that worked gives back."""
        ...

    def refused(self, error: ApiError) -> str:
        """What a call that failed gives back."""
        ...

    def misread(self, fault: Fault) -> str:
        """What text that is no action gives back."""
        ...
