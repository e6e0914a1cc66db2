"""Several environments played as one: each task belongs to a member and is played by it.

`members` maps a label to a table: `environment` (a registered name, default the label), `weight`
(default 1), `options`, `max_turns` (default the member's own budget). Tasks carry the label as
their environment, so that every metric and every rollout on record is told apart by it.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from loopwright.envs.protocol import (
    Env,
    EnvError,
    EnvSpec,
    Observation,
    Snapshots,
    Step,
    Task,
    TaskError,
    Verdict,
)

NAME = "mix"
_KEYS = ("environment", "weight", "options", "max_turns")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """One environment of the mix."""

    label: str
    env: Any  # Env and TaskSource
    weight: float
    spec: EnvSpec

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """The member's own stream, under its label."""
        for task in self.env.tasks(split, seed):
            yield replace(task, environment=self.label, id=f"{self.label}/{task.id}")


class Mix:
    """Implements `Env` and `TaskSource`. Raises `EnvError` for members that cannot be."""

    def __init__(self, members: Mapping[str, Mapping[str, Any]]) -> None:
        from loopwright.envs.registry import load  # which knows this class by name

        if len(members) < 2:
            raise EnvError(f"mix: {len(members)} member(s), expected two or more")
        self.members = tuple(_member(label, table, load) for label, table in members.items())
        self._live: Env | None = None
        self._whole = EnvSpec(
            name=NAME,
            version="+".join(f"{m.label}:{m.spec.version}" for m in self.members),
            description="Several environments: " + ", ".join(m.label for m in self.members),
            max_turns=max(m.spec.max_turns for m in self.members),
            deterministic=all(m.spec.deterministic for m in self.members),
            snapshots=all(m.spec.snapshots for m in self.members),
            scheduled=tuple(dict.fromkeys(s for m in self.members for s in m.spec.scheduled)),
        )
        self.spec = self._whole  # while a task is played: its member's

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """The members' tasks, each drawn with its weight. A member that runs out is left out."""
        rng = Random(f"mix/{split}/{seed}")
        left = {m: m.tasks(split, seed) for m in self.members}
        while left:
            (member,) = rng.choices(list(left), weights=[m.weight for m in left])
            task = next(left[member], None)
            if task is None:
                del left[member]
            else:
                yield task

    async def reset(self, task: Task) -> Observation:
        """Start the task in its member."""
        member = self._member(task)
        if self._live is not None and self._live is not member.env:
            await self._live.close()  # it may hold a process, which others wait for
        self._live, self.spec = member.env, member.spec
        observation: Observation = await member.env.reset(self._own(task, member))
        return observation

    async def step(self, action: str) -> Step:
        """The member's step."""
        return await self._playing().step(action)

    async def evaluate(self) -> Verdict:
        """The member's verdict."""
        return await self._playing().evaluate()

    def oracle(self) -> Iterator[str]:
        """The member's oracle."""
        return self._playing().oracle()

    async def close(self) -> None:
        """Close every member."""
        self._live, self.spec = None, self._whole
        for member in self.members:
            await member.env.close()

    async def snapshot(self) -> bytes:
        """The member's; only where it takes snapshots."""
        live = self._playing()
        if not isinstance(live, Snapshots):
            raise EnvError(f"mix: {self.spec.name} takes no snapshots")
        return await live.snapshot()

    async def restore(self, task: Task, blob: bytes) -> None:
        """Go on where the member's snapshot was taken."""
        member = self._member(task)
        await self.reset(task)
        if not isinstance(member.env, Snapshots):
            raise EnvError(f"mix: {member.label} takes no snapshots")
        await member.env.restore(self._own(task, member), blob)

    def _member(self, task: Task) -> Member:
        member = next((m for m in self.members if m.label == task.environment), None)
        if member is None:
            raise TaskError(f"{task.id}: the mix has no member {task.environment!r}")
        return member

    @staticmethod
    def _own(task: Task, member: Member) -> Task:
        """The task as the member knows it."""
        own = task.id.removeprefix(f"{member.label}/")
        return replace(task, environment=member.env.spec.name, id=own)

    def _playing(self) -> Env:
        if self._live is None:
            raise RuntimeError("mix: no task is being played; call reset(task) first")
        return self._live


def specs(env: Env) -> dict[str, EnvSpec]:
    """What each environment that a task of `env` may name declares."""
    if isinstance(env, Mix):
        return {member.label: member.spec for member in env.members}
    return {env.spec.name: env.spec}


def _member(
    label: str, table: Mapping[str, Any], load: Callable[[str, Mapping[str, Any]], Any]
) -> Member:
    where = f"mix.{label}"
    if not label or "/" in label:
        raise EnvError(f"mix: label {label!r}, expected a name without '/'")
    if not isinstance(table, Mapping):
        raise EnvError(f"{where} = {table!r}: expected a table of {', '.join(_KEYS)}")
    for key in table:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_KEYS)}"
            raise EnvError(f"{where}: unknown key {key!r}; {hint}")
    weight, turns = table.get("weight", 1.0), table.get("max_turns", 0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
        raise EnvError(f"{where}.weight = {weight!r}: expected a number above 0")
    if isinstance(turns, bool) or not isinstance(turns, int) or turns < 0:
        raise EnvError(f"{where}.max_turns = {turns!r}: expected a number of turns, 0 = its own")
    name = table.get("environment", label)
    if name == NAME:
        raise EnvError(f"{where}: a mix cannot be a member of a mix")
    try:
        env = load(name, dict(table.get("options", {})))
    except EnvError as error:
        raise EnvError(f"{where}: {error}") from error
    spec = replace(env.spec, name=label, max_turns=turns or env.spec.max_turns)
    return Member(label=label, env=env, weight=float(weight), spec=spec)
