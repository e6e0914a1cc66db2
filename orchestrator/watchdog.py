"""The watchdog: who is stuck, since when, what was last heard of it, and where it stands.

Every actor of a run is called through a `Watched`. When a call's deadline passes, the process is
looked at from outside before anybody ends it, once, whatever number of calls wait for it; what is
seen goes into the event `actor_stuck` and into the error. A trainer's calls take as long as a step
takes, so it is asked for a sign of life while it is at one, which it gives from another thread.
When nothing at all comes back from anybody, the event `quiet` says who is waited for longest.

A controller that itself stood still (stopped and continued, a machine without time for it) finds
deadlines of signs of life passed that nobody had a chance to keep: these it asks for again.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loopwright.actors.env_worker import EngineClient
from loopwright.orchestrator.faults import ActorLost, DeadlinePassed
from loopwright.orchestrator.inspection import Home, Look, effort, lives_here, look
from loopwright.orchestrator.processes import Actor

_BEGINS = ("start", "load", "reset", "join")  # the first calls of a process's life
_HOME_S = 10.0
_TICK_S = 0.5
Event = Callable[..., None]  # event(kind, **fields)


@dataclass(slots=True, eq=False)
class _Asked:
    """A call that has not been answered."""

    waiting_for: str
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"{self.waiting_for}, for {time.monotonic() - self.since:.1f} s"


class Watchdog:
    """Knows every call under way and the last event of every actor."""

    def __init__(self, event: Event, *, ping_every_s: float, hang_s: float) -> None:
        """`hang_s` of silence are too many, of an actor that is pinged or of all together."""
        self._pass_on = event
        self.ping_every_s = ping_every_s
        self.hang_s = hang_s
        self._watched: list[Watched] = []
        self._events: dict[str, tuple[float, str]] = {}  # actor -> when, kind
        self._heard = _now()  # of anybody, pings apart
        self._quiet_until = 0.0  # it was said that nothing comes back
        self._tick = _now()
        self._gaps: deque[tuple[float, float]] = deque(maxlen=8)  # end, seconds: no tick in there
        self._watching: asyncio.Task[None] | None = None

    def event(self, kind: str, **fields: Any) -> None:
        """Pass an event on, and remember it as the last of its actor."""
        if "actor" in fields:
            self._events[fields["actor"]] = _now(), kind
        self._pass_on(kind, **fields)

    def watch(self, actor: Actor, *, pinged: bool = False) -> Actor:
        """The actor, watched. `pinged`: it is asked for signs of life during its calls."""
        watched = Watched(actor, self, pinged=pinged)
        self._watched.append(watched)
        return watched

    def forget(self, watched: "Watched") -> None:
        """It was ended: nobody waits for it."""
        if watched in self._watched:
            self._watched.remove(watched)

    def begin(self) -> None:
        """From now on say so when nothing comes back from anybody."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """Stop watching."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    def heard(self) -> None:
        """Somebody has done something."""
        self._heard = _now()

    def stood_still_s(self, since: float) -> float:
        """The longest time since then in which this process did nothing at all."""
        found = [seconds for end, seconds in self._gaps if end > since]
        return max([*found, _now() - self._tick] if self._watching is not None else [0.0])

    def last_event(self, actor: str) -> str:
        """Kind and age of an actor's last event; empty if it had none."""
        if actor not in self._events:
            return ""
        when, kind = self._events[actor]
        return f"{kind} {_now() - when:.1f} s ago"

    def longest(self) -> str:
        """Who is waited for longest, and for what; empty if nobody is."""
        waiting = [(call.since, w, call) for w in self._watched for call in w.asked]
        if not waiting:
            return ""
        _, actor, call = min(waiting, key=lambda found: found[0])
        return f"longest waited for is {actor.name}: {call}"

    async def _watch(self) -> None:
        tick_s = min(_TICK_S, self.hang_s / 4)
        self._tick = _now()
        while True:
            await asyncio.sleep(tick_s)
            still_s, self._tick = _now() - self._tick, _now()
            if still_s > self.hang_s / 2:
                self._gaps.append((self._tick, still_s))
                text = f"this process stood still for {still_s:.1f} s"
                self.event("stood_still", seconds=round(still_s, 1), text=text)
            elif min(_now() - self._heard, _now() - self._quiet_until) > self.hang_s:
                await self._say_quiet()

    async def _say_quiet(self) -> None:
        waiting = [w for w in self._watched if w.asked and w.began]
        if not waiting:  # those that are being started have a deadline of their own for that
            return
        silent_s, self._quiet_until = _now() - self._heard, _now()
        oldest = min(waiting, key=lambda w: min(call.since for call in w.asked))
        told, seen = self.longest(), await oldest.seen()
        self.event(
            "quiet",
            actor=oldest.name,
            silent_s=round(silent_s, 1),
            stack=seen.stack,
            text=f"nothing has come back for {silent_s:.0f} s; {told}; {seen}",
        )


class Watched:
    """An `Actor` whose calls are known to the watchdog."""

    def __init__(self, actor: Actor, watchdog: Watchdog, *, pinged: bool) -> None:
        """Called by `Watchdog.watch`."""
        self.name = actor.name
        self.asked: set[_Asked] = set()
        self._actor = actor
        self._watchdog = watchdog
        self._pinged = pinged
        self._home: Home | None = None
        self._answered = ""  # the last call that was
        self._answered_at = 0.0
        self._report: asyncio.Task[str] | None = None  # of being stuck, until it answers again

    async def call(self, method: str, *args: Any, timeout_s: float, waiting_for: str) -> Any:
        """As `Actor.call`. `DeadlinePassed` tells what was seen of the process."""
        asked = _Asked(waiting_for)
        self.asked.add(asked)
        try:
            answer = await self._call(method, args, timeout_s, waiting_for)
        except DeadlinePassed as error:
            raise DeadlinePassed(f"{error}; {await self._stuck(asked)}") from None
        except ActorLost:
            self._home = None
            raise
        finally:
            self.asked.discard(asked)
        self._answered, self._answered_at, self._report = waiting_for, _now(), None
        if method != "ping":
            self._watchdog.heard()
        if method in _BEGINS:
            with contextlib.suppress(ActorLost, DeadlinePassed):
                self._home = await self.home(timeout_s=_HOME_S)
        return answer

    @property
    def began(self) -> bool:
        """Whether it has come up, and said where."""
        return self._home is not None

    async def restart(self) -> None:
        """As `Actor.restart`."""
        await self._actor.restart()
        self._home = self._report = None

    def end(self) -> None:
        """As `Actor.end`."""
        self._actor.end()
        self._watchdog.forget(self)

    async def lacks(self) -> str:
        """As `Actor.lacks`."""
        return await self._actor.lacks()

    def generate_client(self) -> EngineClient:
        """As `Actor.generate_client`."""
        return self._actor.generate_client()

    async def home(self, *, timeout_s: float) -> Home:
        """As `Actor.home`."""
        return await self._actor.home(timeout_s=timeout_s)

    async def seen(self) -> Look:
        """What its process is doing."""
        if self._home is None:
            return Look(why_not="it has never said where it runs")
        return await asyncio.to_thread(look, self._home)

    async def _call(
        self, method: str, args: tuple[Any, ...], timeout_s: float, waiting_for: str
    ) -> Any:
        call = self._actor.call
        if method == "ping":
            return await self._ping(timeout_s, waiting_for)
        if not self._pinged:
            return await call(method, *args, timeout_s=timeout_s, waiting_for=waiting_for)
        work = asyncio.ensure_future(
            call(method, *args, timeout_s=timeout_s, waiting_for=waiting_for)
        )
        try:
            while not (await asyncio.wait([work], timeout=self._watchdog.ping_every_s))[0]:
                await self._sign_of_life(work, waiting_for)
            return work.result()
        finally:
            work.cancel()

    async def _sign_of_life(self, work: "asyncio.Future[Any]", waiting_for: str) -> None:
        """One, unless `work` ends before. If its process dies, the work itself will say so. One
        that is busy may keep a sign of life waiting, as a large file written in one go does."""
        before = effort(self._home) if self._home is not None else None
        what = f"sign of life during {waiting_for}"
        ping = asyncio.ensure_future(self._ask(self._watchdog.hang_s, what))
        try:
            await asyncio.wait([work, ping], return_when=asyncio.FIRST_COMPLETED)
            if ping.done() and not work.done():
                try:
                    ping.result()
                except ActorLost:
                    return
                except DeadlinePassed:
                    after = effort(self._home) if self._home is not None else None
                    hang_s = self._watchdog.hang_s
                    if before is None or after is None or not after.busy_since(before, hang_s):
                        raise
        finally:
            ping.cancel()

    async def _ping(self, timeout_s: float, waiting_for: str) -> Any:
        """One that still lives answers soon; one that has ended answers once it is restarted."""
        first_s = timeout_s if self._home is None else min(timeout_s, self._watchdog.hang_s)
        try:
            return await self._ask(first_s, waiting_for)
        except DeadlinePassed:
            if first_s == timeout_s or (self._home is not None and lives_here(self._home)):
                raise
        return await self._ask(timeout_s - first_s, waiting_for)

    async def _ask(self, timeout_s: float, waiting_for: str) -> Any:
        """One ping; another one where it was not the actor that stood still."""
        began = _now()
        try:
            return await self._actor.call("ping", timeout_s=timeout_s, waiting_for=waiting_for)
        except DeadlinePassed:
            if self._watchdog.stood_still_s(began) < timeout_s / 2:
                raise
        return await self._actor.call("ping", timeout_s=timeout_s, waiting_for=waiting_for)

    async def _stuck(self, asked: _Asked) -> str:
        if self._report is None:
            self._report = asyncio.get_running_loop().create_task(self._look(asked))
        return await asyncio.shield(self._report)

    async def _look(self, asked: _Asked) -> str:
        if lack := await self._actor.lacks():
            return f"it waits for a place: {lack}"
        heard = "it has never answered"
        if self._answered:
            ago_s = _now() - self._answered_at
            heard = f"its last answer was to {self._answered}, {ago_s:.1f} s ago"
        seen = await self.seen()
        last = self._watchdog.last_event(self.name)
        process = f"process {self._home.pid}" if self._home is not None else "its process"
        told = f"{heard}; {process}: {seen}"
        self._watchdog.event(
            "actor_stuck",
            actor=self.name,
            pid=self._home.pid if self._home is not None else 0,
            host=self._home.host if self._home is not None else "",
            waiting_for=asked.waiting_for,
            seconds=round(_now() - asked.since, 1),
            last_event=last,
            state=seen.state,
            stack=seen.stack,
            text=f"{self.name}: {asked}; {told}; last event: {last or 'none'}",
        )
        return told


def _now() -> float:
    return time.monotonic()
