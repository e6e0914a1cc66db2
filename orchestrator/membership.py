"""Who is in the pool: coming up, joining, lost and brought back, leaving.

A lost actor is restarted by Ray; an engine is given the current weights before it serves again. Who
joins a running pool goes the same way, and every worker gets to know a new engine first.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loopwright.actors.env_worker import WorkerLost
from loopwright.actors.episode import EngineLost
from loopwright.orchestrator.delivery import Event, WeightsNotProven
from loopwright.orchestrator.faults import ActorLost, DeadlinePassed, RestartBudget, RunError
from loopwright.orchestrator.members import Member, Seats, Throttle
from loopwright.orchestrator.processes import Actor, first_exception
from loopwright.orchestrator.upbringing import until_up

Role = Literal["rollout", "environments"]  # the two kinds of members


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long to wait for whom, seconds."""

    start_s: float
    publish_s: float
    ping_every_s: float
    hang_s: float


class Membership:
    """Engines, environment workers, and the seats on them."""

    def __init__(
        self,
        engines: list[Actor],
        workers: list[Actor],
        *,
        deadlines: Deadlines,
        restarts: RestartBudget,
        event: Event,
        refill: Callable[[Member], Awaitable[None]],
        most_episodes: int = 0,
        most_of: Mapping[str, int] | None = None,
    ) -> None:
        """`refill` gives a started engine the current weights. `most_episodes`, `most_of`: as in
        `Pool`."""
        self._most_episodes = most_episodes
        self.engines = [self._engine(actor, number) for number, actor in enumerate(engines)]
        self.workers = [Member(actor, number=number) for number, actor in enumerate(workers)]
        self.engine_seats = Seats(self.engines)
        self.worker_seats = Seats(self.workers, most_of)
        # what made all of this unusable
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deadlines = deadlines
        self._restarts = restarts
        self._event = event
        self._refill = refill
        self._joined = 0  # engines since the start: who starts meanwhile has to be told
        self._recovering: dict[Member, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Bring everyone up, side by side; engines without weights yet."""
        await first_exception(
            *(self._start_engine(m) for m in self.engines),
            *(self._start_worker(m) for m in self.workers),
        )

    async def close(self) -> None:
        """Stop recovering. The actors are the cluster's to end."""
        for task in self._recovering.values():
            task.cancel()
        await asyncio.gather(*self._recovering.values(), return_exceptions=True)
        if self.broken.done() and not self.broken.cancelled():
            self.broken.exception()  # seen: it was raised elsewhere, or the run is over anyway

    def members_of(self, role: Role) -> list[Member]:
        """Who is there of a kind, without those that leave."""
        return [m for m in self._of(role) if not m.leaving]

    def serving(self, role: Role) -> int:
        """How many of a kind play."""
        return sum(m.serving for m in self._of(role))

    def join(self, role: Role, spawn: Callable[[int], Actor]) -> Member:
        """One more, under the lowest free number. An engine serves once every worker knows it and
        it holds the current weights, a worker once it has started."""
        taken = {m.number for m in self._of(role)}
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        actor = spawn(number)
        member = Member(actor, number=number)
        if role == "rollout":
            member = self._engine(actor, number)
            member.introduced = False
            self._joined += 1
        self._of(role).append(member)
        self._bring(member, "actor_joined")
        return member

    async def leave(self, member: Member) -> None:
        """One fewer. An engine's episodes go on on others from the tokens they have; a worker's are
        played to their end, since their worlds are there. Then its process is ended."""
        began = asyncio.get_running_loop().time()
        member.leaving, is_engine = True, member in self.engines
        member.life += 1
        if (bringing := self._recovering.get(member)) is not None:
            bringing.cancel()
        episodes, cut = member.episodes, 0
        if is_engine and member.ready.is_set():
            cut = await self._parting(member, "retire", "it to hand over its episodes") or 0
        if member.episodes:
            # a worker's end by their own deadlines; an engine that is silent is left by them later
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._deadlines.hang_s if is_engine else None):
                    await member.empty.wait()
        if member.ready.is_set():
            await self._parting(member, "close", "it to close")
        self._forget(member)
        seconds = round(asyncio.get_running_loop().time() - began, 3)
        name = member.actor.name
        self._event("actor_left", actor=name, episodes=episodes, turns_cut=cut, seconds=seconds)

    async def _parting(self, member: Member, method: str, waiting_for: str) -> Any:
        """Ask one that leaves; None if it does not answer, for it is ended all the same."""
        with contextlib.suppress(ActorLost, DeadlinePassed, EngineLost):
            return await member.actor.call(
                method, timeout_s=self._deadlines.hang_s, waiting_for=waiting_for
            )

    def _forget(self, member: Member) -> None:
        member.leaving = True
        member.ready.clear()
        member.actor.end()
        (self.engines if member in self.engines else self.workers).remove(member)

    def fail(self, error: Exception) -> None:
        """Nothing more can be played: tell all who wait for a seat."""
        if not self.broken.done():
            self.broken.set_exception(error)
            self.engine_seats.fail(error)
            self.worker_seats.fail(error)

    def recover(self, member: Member, why: str, *, kill: bool = False, lost: bool = True) -> None:
        """As `Recover`."""
        if member in self._recovering or self.broken.done() or member.leaving:
            return
        member.ready.clear()
        member.life += 1
        if lost:
            self._event("actor_lost", actor=member.actor.name, pid=member.pid, why=why)
            try:
                self._restarts.spend(why)
            except RunError as error:
                self.fail(error)
                return
        self._bring(member, "actor_back", kill=kill)

    def _bring(self, member: Member, told: str, *, kill: bool = False) -> None:
        """Begin to bring it up; `told` is the event once it is."""
        task = asyncio.get_running_loop().create_task(self._bring_up(member, told, kill))
        self._recovering[member] = task
        joins = told == "actor_joined"
        task.add_done_callback(lambda done: self._recovered(member, done, joins=joins))

    def _recovered(self, member: Member, done: "asyncio.Task[None]", *, joins: bool) -> None:
        self._recovering.pop(member, None)
        if done.cancelled() or (error := done.exception()) is None:
            return
        if not joins or isinstance(error, WeightsNotProven):
            self.fail(error if isinstance(error, Exception) else RunError(str(error)))
            return
        # nobody depends on it yet: the run goes on without it
        self._forget(member)
        text = f"{member.actor.name} did not join: {error}"
        self._event("actor_not_joined", actor=member.actor.name, text=text)

    async def _bring_up(self, member: Member, told: str, kill: bool) -> None:
        started = asyncio.get_running_loop().time()
        if kill:
            await member.actor.restart()
        start = self._refill_engine if member in self.engines else self._start_worker
        await until_up(
            member.actor,
            lambda: start(member),
            start_s=self._deadlines.start_s,
            others=lambda: self._others(member),
            waits=lambda lack: self._waits(member, lack),
        )
        seconds = asyncio.get_running_loop().time() - started
        self._event(told, actor=member.actor.name, seconds=round(seconds, 3))

    def _waits(self, member: Member, lack: str) -> None:
        name, others = member.actor.name, self._others(member)
        text = f"{name} waits: {lack}; the run goes on with {others} of its kind"
        self._event("actor_waits", actor=name, text=text)

    def _others(self, member: Member) -> int:
        """How many of its kind serve."""
        kind = self.engines if member in self.engines else self.workers
        return sum(m.serving for m in kind if m is not member)

    def _of(self, role: Role) -> list[Member]:
        return self.engines if role == "rollout" else self.workers

    def _engine(self, actor: Actor, number: int) -> Member:
        throttle = Throttle(self._most_episodes) if self._most_episodes else None
        return Member(actor, throttle, number)

    async def _refill_engine(self, member: Member) -> None:
        await self._start_engine(member)
        if not member.introduced:
            await self._introduce(member)
        await self._refill(member)

    async def _introduce(self, engine: Member) -> None:
        """Let every worker know an engine that joins; one that is starting learns of all."""
        client = engine.actor.generate_client()
        for worker in [m for m in self.workers if m.ready.is_set()]:
            life = worker.life
            try:
                await worker.actor.call(
                    "meet",
                    {engine.number: client},
                    timeout_s=self._deadlines.hang_s,
                    waiting_for=f"it to meet {engine.actor.name}",
                )
            except (ActorLost, DeadlinePassed, WorkerLost) as error:
                if life == worker.life:
                    self.recover(worker, str(error), kill=isinstance(error, DeadlinePassed))
        engine.introduced = True

    async def _start_engine(self, member: Member) -> None:
        pid = await member.actor.call(
            "start", timeout_s=self._deadlines.start_s, waiting_for="engine to load"
        )
        self._up(member, pid)

    async def _start_worker(self, member: Member) -> None:
        known = -1
        while known != self._joined:  # again where an engine joined meanwhile
            known = self._joined
            pid = await member.actor.call(
                "start",
                {m.number: m.actor.generate_client() for m in self.engines},
                timeout_s=self._deadlines.start_s,
                waiting_for="environment worker to start",
            )
            self._up(member, pid)
        member.ready.set()
        self.worker_seats.changed()

    def serves(self, engine: Member) -> None:
        """It holds the current weights."""
        engine.ready.set()
        self.engine_seats.changed()

    def _up(self, member: Member, pid: int) -> None:
        if pid != member.pid:
            member.pid = pid
            self._event("actor_up", actor=member.actor.name, pid=pid)

    def taking_part(self) -> list[Member]:
        """The engines that a publish goes to."""
        return [
            m
            for m in self.engines
            if not m.leaving and (m.ready.is_set() or m not in self._recovering)
        ]
