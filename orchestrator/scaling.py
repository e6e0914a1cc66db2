"""How many rollout actors and environment workers a running run has: asked for by another process,
through the run's folder.

    loopwright scale RUN rollout=3 ──▶ scale.request.json ──▶ controller ──▶ Pool.join, Pool.leave
             ▲                                                    │
             └───────────────────── scale.json ◀──────────────────┘  sizes, and the answer

The request is taken as soon as the run trains. Any moment is a safe one: an engine joins between
two publishes, is given the current version and proves it before it serves, and the lag bound is the
buffer's, whoever plays. `scale.json` has one writer, the controller; a resumed run begins with the
size that was reached, and goes on towards the one that was asked for.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from loopwright.configs.load import Loaded
from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.members import Member
from loopwright.orchestrator.membership import Role
from loopwright.orchestrator.pool import Pool
from loopwright.orchestrator.processes import Actor
from loopwright.orchestrator.recorder import write_json

REQUEST, SIZES = "scale.request.json", "scale.json"
ROLES: dict[Role, tuple[str, str]] = {  # the key that says how many there are at the start
    "rollout": ("rollout", "engines"),
    "environments": ("environment", "workers"),
}
_LOOK_EVERY_S = 1.0
_PLACED_S = 2.0  # for a cluster to place an actor, before the answer says what it waits for


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How many there are of a role."""

    configured: int  # when it was asked for another number
    asked: int
    reached: int  # of those, serving


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a request."""

    id: str
    refused: bool
    text: str


@dataclass(slots=True)
class Sizes:
    """`scale.json`."""

    roles: dict[Role, Size] = field(default_factory=dict)
    answer: Answer | None = None

    @classmethod
    def read(cls, folder: Path) -> "Sizes":
        """Of a run; empty where nobody ever asked. Raises `RunError` for a file that is damaged."""
        path = folder / SIZES
        if not path.exists():
            return cls()
        try:
            found = json.loads(path.read_text())
            answer = Answer(**found["answer"]) if found["answer"] else None
            return cls({role: Size(**found["roles"][role]) for role in found["roles"]}, answer)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} cannot be read ({error}): remove it, and the run has the sizes of its "
                "configuration"
            ) from error

    def write(self, folder: Path) -> None:
        """Whole or not at all."""
        roles = {role: asdict(size) for role, size in self.roles.items()}
        answer = asdict(self.answer) if self.answer else None
        try:
            write_json(folder / SIZES, {"roles": roles, "answer": answer})
        except OSError as error:
            raise RunError(f"cannot write {folder / SIZES}: {error.strerror}") from error


def as_reached(loaded: Loaded, folder: Path) -> Loaded:
    """The configuration of a run that goes on, with the sizes that it had reached. Where a key was
    changed since it was scaled, the new number holds, and what was asked for is forgotten."""
    sizes = Sizes.read(folder)
    config, origins = loaded.config, dict(loaded.origins)
    for role, (table, key) in ROLES.items():
        size, section = sizes.roles.get(role), getattr(config, table)
        if size is None:
            continue
        if getattr(section, key) != size.configured:
            del sizes.roles[role]
            sizes.write(folder)
            continue
        config = config.model_copy(
            update={table: section.model_copy(update={key: max(size.reached, 1)})}
        )
        origins[f"{table}.{key}"] = f"{SIZES}, {size.asked} asked for"
    return replace(loaded, config=config, origins=origins)


class Scaling:
    """The controller's end."""

    def __init__(
        self,
        folder: Path,
        pool: Pool,
        *,
        spawn: Mapping[Role, Callable[[int], Actor]],
        fixed: Mapping[Role, str],
        engines_up: Callable[[int], Awaitable[None]],
        event: Callable[..., None],
        look_every_s: float = _LOOK_EVERY_S,
    ) -> None:
        """`spawn` starts one more of a role under a number. `fixed`: roles that cannot be scaled in
        this run, and why. `engines_up` is told how many engines serve, when that changes."""
        self._folder = folder
        self._pool, self._members = pool, pool.membership
        self._spawn = spawn
        self._fixed = fixed
        self._engines_up = engines_up
        self._event = event
        self._look_every_s = look_every_s
        self._sizes = Sizes.read(folder)
        self._up = 0
        self._configured = {role: len(self._members.members_of(role)) for role in ROLES}

    async def watch(self) -> None:
        """Take requests for ever. First, what a former part of this run was asked for and had not
        reached."""
        try:
            async with asyncio.TaskGroup() as leaving:
                for role, size in list(self._sizes.roles.items()):
                    if size.asked != len(self._members.members_of(role)):
                        self._event("scale", text=self._resize(role, size.asked, leaving))
                while True:
                    await self._keep_count()
                    request = self._taken_request()
                    if request is not None:
                        await self._serve(request, leaving)
                    await asyncio.sleep(self._look_every_s)
        finally:
            self._write_count()  # who has left since the last look

    def _taken_request(self) -> dict[str, Any] | None:
        """A request, at most once. Whatever somebody wrote there, it does not end the run."""
        path = self._folder / REQUEST
        try:
            text = path.read_text()
            path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._event("scale_refused", text=f"{path}: {error.strerror}")
            return None
        try:
            request = json.loads(text)
            sizes = {str(role): int(count) for role, count in request["sizes"].items()}
            if not set(sizes) <= set(ROLES) or min(sizes.values(), default=1) < 1:
                raise ValueError(f"sizes {sizes}")
            return {"id": str(request["id"]), "sizes": sizes}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._event("scale_refused", text=f"{path} is no request: {error}")
            return None

    async def _serve(self, request: Mapping[str, Any], leaving: asyncio.TaskGroup) -> None:
        """Do what is asked, and say what came of it."""
        asked: dict[Role, int] = request["sizes"]
        wrong = [self._fixed[role] for role in asked if role in self._fixed]
        said, refused = list(wrong), bool(wrong)
        before = {role: set(self._members.members_of(role)) for role in ROLES}
        try:
            if not refused:
                said += [self._resize(role, count, leaving) for role, count in asked.items()]
        except RunError as error:  # the cluster knows at once that it cannot
            said, refused = [*said, str(error)], True
        now = {role: set(self._members.members_of(role)) for role in ROLES}
        for role, count in asked.items():
            # not what was asked where it was refused half way
            count = len(now[role]) if refused else count
            known = self._sizes.roles.get(role)
            configured = known.configured if known else self._configured[role]
            if known or not refused:
                size = Size(configured=configured, asked=count, reached=self._members.serving(role))
                self._sizes.roles[role] = size
        if said:
            self._event("scale_refused" if refused else "scale", text="; ".join(said))
        joined = [m for role in ROLES for m in now[role] - before[role]]
        said += await self._waiting(joined) if asked else await self._status()
        self._sizes.answer = Answer(id=request["id"], refused=refused, text="\n".join(said))
        self._sizes.write(self._folder)

    def _resize(self, role: Role, count: int, leaving: asyncio.TaskGroup) -> str:
        """Begin to make it so many; what happens, in words."""
        members = self._members.members_of(role)
        head = f"{role} {len(members)} → {count}"
        if count == len(members):
            return f"{role} {count}: as it is"
        if count > len(members):
            more = count - len(members)
            names = [self._members.join(role, self._spawn[role]).actor.name for _ in range(more)]
            when = _START[role].format(version=self._pool.version)
            return f"{head}, joining: {', '.join(names)}; {when}"
        # who does not serve leaves first, then the newest
        leavers = sorted(members, key=lambda m: (m.serving, -m.number))[: len(members) - count]
        episodes = sum(m.episodes for m in leavers)
        for member in leavers:
            leaving.create_task(self._members.leave(member))
        names = [member.actor.name for member in leavers]
        return f"{head}, leaving: {', '.join(names)}; {_LEAVE[role].format(episodes=episodes)}"

    async def _waiting(self, joined: Sequence[Member]) -> list[str]:
        """What those lack that the cluster has no room for now."""
        ends = asyncio.get_running_loop().time() + _PLACED_S
        while True:
            lacks = await asyncio.gather(*(m.actor.lacks() for m in joined))
            if not any(lacks) or asyncio.get_running_loop().time() > ends:
                break
            await asyncio.sleep(_PLACED_S / 8)
        return [
            f"{member.actor.name} waits: {lack}; the run goes on"
            for member, lack in zip(joined, lacks, strict=True)
            if lack
        ]

    async def _status(self) -> list[str]:
        lines = [
            f"{role}: {self._members.serving(role)} of {len(self._members.members_of(role))} serve"
            for role in ROLES
        ]
        absent = [m for role in ROLES for m in self._members.members_of(role) if not m.serving]
        lacks = await asyncio.gather(*(m.actor.lacks() for m in absent))
        return lines + [
            f"{member.actor.name} {'waits: ' + lack if lack else 'is starting'}"
            for member, lack in zip(absent, lacks, strict=True)
        ]

    async def _keep_count(self) -> None:
        """How many serve: for the loop, and for a run that goes on from here."""
        up = self._members.serving("rollout")
        if up != self._up:
            self._up = up
            await self._engines_up(up)
        self._write_count()

    def _write_count(self) -> None:
        counted = {
            role: replace(size, reached=self._members.serving(role))
            for role, size in self._sizes.roles.items()
        }
        if counted != self._sizes.roles:
            self._sizes.roles = counted
            self._sizes.write(self._folder)


_START = {
    "rollout": "each serves once it has proven version {version} or a later one",
    "environments": "each plays once it has started",
}
_LEAVE = {
    "rollout": "their {episodes} episodes go on on the others, from the tokens they have",
    "environments": "their {episodes} episodes are played to the end first",
}
