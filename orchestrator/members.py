"""Who plays the next episode: seats on engines and environment workers.

A new episode goes to the member with the fewest; all its turns stay there. Where a member may hold
only so many (`Throttle`, or an environment's own limit), episodes wait for a seat, the lowest
priority number first; one whose environment is full everywhere lets others pass.
"""

import asyncio
import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from loopwright.actors.engine import EngineStats
from loopwright.orchestrator.processes import Actor

_PART = 8  # a limit falls and grows by an eighth


@dataclass(slots=True)
class Throttle:
    """How many episodes an engine may have, so that its KV cache holds all of them.

    More episodes than fit do not make an engine faster: what waits evicts the cached prefixes of
    others (or, in vLLM, preempts them), and all of that is prefilled again. While requests have to
    wait for KV the limit falls by an eighth a look, and at once to what is served if that is less;
    while none has to, and the limit is reached, it grows by an eighth. So it finds the largest
    number that fits, and follows it when episodes get longer.
    """

    most: int
    limit: int = 0
    _kv_waits: int = 0

    def __post_init__(self) -> None:
        self.limit = self.limit or self.most

    def observe(self, stats: EngineStats, episodes: int) -> bool:
        """Take new counters of an engine with so many `episodes`; whether the limit has moved."""
        before = self.limit
        part = max(1, before // _PART)
        waited = stats.kv_waits - self._kv_waits
        self._kv_waits = stats.kv_waits
        if waited > 0:
            served = stats.running / max(stats.running + stats.waiting, 1)
            self.limit = max(1, min(before - part, int(episodes * served) or before - part))
        elif waited == 0 and episodes >= before:
            self.limit = min(self.most, before + part)
        return self.limit != before


@dataclass(slots=True, eq=False)
class Member:
    """One actor of the pool."""

    actor: Actor
    throttle: Throttle | None = None
    number: int = 0  # among those of its kind; another may have had it before
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    episodes: int = 0
    of: Counter[str] = field(default_factory=Counter)  # episodes by environment, where that counts
    stats: EngineStats | None = None
    pid: int = 0
    life: int = 0  # how often it was lost; a late report about a former life is no news
    introduced: bool = True  # every worker knows it
    leaving: bool = False  # it gets no more episodes, and is not brought back
    empty: asyncio.Event = field(default_factory=asyncio.Event)  # it is leaving, and has none left

    @property
    def key(self) -> str:
        """Name and life: a restarted process counts as another one."""
        return f"{self.actor.name}/{self.life}"

    @property
    def has_seat(self) -> bool:
        """Whether it can take one more episode."""
        full = self.throttle is not None and self.episodes >= self.throttle.limit
        return self.serving and not full

    @property
    def serving(self) -> bool:
        """Whether it counts on."""
        return self.ready.is_set() and not self.leaving


class Recover(Protocol):
    """Begins to bring a lost member back, once."""

    def __call__(self, member: Member, why: str, *, kill: bool = False, lost: bool = True) -> None:
        """`kill` ends a process that hangs first. Not `lost`: it is ended on purpose, and none of
        `run.max_restarts`."""
        ...


class Seats:
    """The members of one kind, and who waits for one of them."""

    def __init__(self, members: list[Member], most: Mapping[str, int] | None = None) -> None:
        """`most`: environment -> episodes of it that one member may have; others are unlimited."""
        self.members = members
        self._most = dict(most or {})
        self._waiting: list[tuple[int, int, str, asyncio.Future[Member]]] = []
        self._serial = 0
        self._failed: Exception | None = None

    async def take(self, priority: int, environment: str = "") -> Member:
        """A seat on the member with the fewest episodes, as soon as there is one."""
        if self._failed is not None:
            raise self._failed
        self._serial += 1
        seat: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, self._serial, environment, seat))
        self.changed()
        try:
            return await seat
        except asyncio.CancelledError:
            if seat.done() and not seat.cancelled() and seat.exception() is None:
                self.leave(seat.result(), environment)  # given in the same moment
            seat.cancel()
            raise

    def leave(self, member: Member, environment: str = "") -> None:
        """The episode is over, or goes elsewhere."""
        member.episodes -= 1
        member.of[environment] -= 1
        if member.leaving and not member.episodes:
            member.empty.set()
        self.changed()

    def changed(self) -> None:
        """Somebody is ready again, or may hold more: serve who waits."""
        passed: list[tuple[int, int, str, asyncio.Future[Member]]] = []
        while self._waiting and (free := [m for m in self.members if m.has_seat]):
            waiting = heapq.heappop(self._waiting)
            environment, seat = waiting[2:]
            if seat.done():  # it does not wait any more
                continue
            most = self._most.get(environment, 0)
            room = [m for m in free if not most or m.of[environment] < most]
            if not room:
                passed.append(waiting)
                continue
            member = min(room, key=lambda m: m.episodes)
            member.episodes += 1
            member.of[environment] += 1
            seat.set_result(member)
        for waiting in passed:
            heapq.heappush(self._waiting, waiting)

    def fail(self, error: Exception) -> None:
        """Nobody will be ready again: tell all who wait."""
        self._failed = error
        for *_, seat in self._waiting:
            if not seat.done():
                seat.set_exception(error)
        self._waiting.clear()
