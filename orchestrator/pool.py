"""The pool: rollout actors and environment workers, who plays what, and what happens when one dies.

How an episode finds its engine and its worker, and survives losing one, is in `seating.py`. A lost
actor is restarted by Ray; the pool gives a restarted engine the current weights before it counts as
ready.
"""

import asyncio
import contextlib
import zlib
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from loopwright.actors.engine import EngineStats, OnUpdate, UpdateReport
from loopwright.actors.env_worker import EpisodeOrder, WorkerLost
from loopwright.actors.episode import EngineLost, EpisodeLimits
from loopwright.actors.weights import WeightManifest
from loopwright.algorithms.records import Outcome, Rollout, decode
from loopwright.envs.protocol import Task, encode_task
from loopwright.orchestrator.delivery import Delivery, Event, Resend, WeightsNotProven
from loopwright.orchestrator.faults import (
    ActorLost,
    DeadlinePassed,
    RestartBudget,
    RunError,
)
from loopwright.orchestrator.members import Member, Seats, Throttle
from loopwright.orchestrator.processes import Actor, first_exception
from loopwright.orchestrator.relief import Relief
from loopwright.orchestrator.sampling_record import Episode, SamplingRecord
from loopwright.orchestrator.seating import Seating
from loopwright.orchestrator.upbringing import until_up

if TYPE_CHECKING:
    from loopwright.actors.model_identity import ModelIdentity

T = TypeVar("T")
Role = Literal["rollout", "environments"]  # the two kinds of members


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long to wait for whom, seconds."""

    start_s: float
    publish_s: float
    ping_every_s: float
    hang_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultLimits:
    """When to give up."""

    retries: int  # of one episode, after faults of its environment
    infra_fault_share: float  # of the recent episodes
    window: int = 200  # episodes that count as recent


class Pool:
    """All that plays episodes. `start` it once; `play` from as many coroutines as you like."""

    def __init__(
        self,
        engines: list[Actor],
        workers: list[Actor],
        *,
        deadlines: Deadlines,
        faults: FaultLimits,
        restarts: RestartBudget,
        on_update: OnUpdate,
        event: Event,
        resend: Resend | None = None,
        most_episodes: int = 0,
        most_of: Mapping[str, int] | None = None,
        sampling: SamplingRecord | None = None,
    ) -> None:
        """`resend` asks the trainer for the last publish once more, for engines that missed it;
        None where every manifest can be taken later too. `most_episodes` of an engine, where that
        adapts to its KV cache; 0: as many as come. `most_of`: environment -> episodes of it that
        one worker plays at once. `sampling` takes down what a replay needs."""
        self._sampling = sampling
        self._most_episodes = most_episodes
        self._engines = [self._engine(actor, number) for number, actor in enumerate(engines)]
        self._workers = [Member(actor, number=number) for number, actor in enumerate(workers)]
        self._joined = 0  # engines since the start: who starts meanwhile has to be told
        self._engine_seats = Seats(self._engines)
        self._worker_seats = Seats(self._workers, most_of)
        self._seating = Seating(
            self._engine_seats, self._worker_seats, recover=self._recover, hang_s=deadlines.hang_s
        )
        self._orders = 0
        self._deadlines = deadlines
        self._faults = faults
        self._restarts = restarts
        self._event = event
        self._delivery = Delivery(
            publish_s=deadlines.publish_s,
            on_update=on_update,
            recover=self._recover,
            taken=self._serves,
            event=event,
            resend=resend,
            sampling=sampling,
        )
        self._relief = Relief(
            recover=self._recover,
            event=event,
            look_every_s=deadlines.ping_every_s,
            patience_s=deadlines.hang_s,
        )
        self._recent: deque[bool] = deque(maxlen=faults.window)
        self._recovering: dict[Member, asyncio.Task[None]] = {}
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.infra_faults = 0

    @property
    def playing(self) -> int:
        """Episodes being played."""
        return sum(m.episodes for m in self._workers)

    @property
    def episodes_limit(self) -> int:
        """Episodes that all engines may have together; 0 where that is not limited."""
        return sum(m.throttle.limit for m in self._engines if m.throttle is not None)

    @property
    def resumed(self) -> int:
        """How often an episode went on after its engine was lost."""
        return self._seating.resumed

    def engine_stats(self) -> dict[int, EngineStats]:
        """The newest counters of each engine that has answered, by its number."""
        return {m.number: m.stats for m in self._engines if m.stats is not None}

    def members_of(self, role: Role) -> list[Member]:
        """Who is there of a kind, without those that leave."""
        return [m for m in self._of(role) if not m.leaving]

    async def start(self, manifest: WeightManifest) -> list[UpdateReport]:
        """Bring everyone up, side by side, and give the engines their first weights."""
        await first_exception(
            *(self._start_engine(m) for m in self._engines),
            *(self._start_worker(m) for m in self._workers),
        )
        return await self.publish(manifest)

    @property
    def version(self) -> int:
        """What was published last."""
        return self._delivery.version

    def members(self) -> tuple[str, ...]:
        """The engines that the next publish goes to, each with its life: a restarted one counts as
        another."""
        return tuple(m.key for m in self._taking_part())

    async def sleep(self) -> None:
        """All engines stand still and give back their KV, until the next publish."""
        await self._delivery.sleep(lambda: [m for m in self._engines if m.serving])

    async def publish(self, manifest: WeightManifest) -> list[UpdateReport]:
        """Every engine takes the weights and proves it. An engine that dies meanwhile is restarted
        and then given them; raises `WeightsNotProven` with the names of the tensors that differ."""
        return await self._delivery.publish(manifest, self._taking_part)

    async def identities(self) -> "dict[str, ModelIdentity]":
        """Who -> what it was started from, of every engine and worker that serves."""
        return await self._ask([*self._engines, *self._workers], "identity")

    async def probe(self, token_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Engine by name -> its logprobs [T-1] of given tokens [T]."""
        return await self._ask(self._engines, "probe", token_ids)

    async def _ask(self, members: list[Member], method: str, *args: Any) -> dict[str, Any]:
        serving = [m for m in members if m.serving]
        limits: dict[str, Any] = {"timeout_s": self._deadlines.publish_s, "waiting_for": method}
        found = await first_exception(*(m.actor.call(method, *args, **limits) for m in serving))
        return {m.actor.name: answer for m, answer in zip(serving, found, strict=True)}

    async def play(
        self,
        task: Task,
        attempt: int,
        *,
        seed: int,
        priority: int,
        limits: EpisodeLimits,
        take_back: asyncio.Event | None = None,
    ) -> tuple[Rollout, bytes]:
        """One finished rollout and its encoding. Episodes cut off by a lost worker go on, limited
        by `max_restarts` alone; those whose environment failed are played again, `retries` times,
        then the fault itself is returned. Raises `EpisodeTakenBack` once `take_back` is set."""
        if self._sampling is not None:
            self._sampling.episode(
                Episode(task=task, ticket=priority, attempt=attempt, seed=seed, limits=limits)
            )
        self._orders += 1
        order = EpisodeOrder(
            key=f"{self._orders}",
            task=encode_task(task),
            attempt=attempt,
            engine=-1,  # chosen when it is played
            seed=seed,
            priority=priority,
            limits=limits,
        )
        environment_faults = 0
        while True:
            waiting_for = f"episode {task.id}, attempt {attempt}"
            encoded = await self._seating.play(order, waiting_for, take_back)
            if encoded is None:
                order = replace(order, life=order.life + 1)
                continue
            rollout: Rollout = decode(encoded)
            self._count(rollout, task)
            environment_faults += rollout.outcome is Outcome.INFRA_FAULT
            if (
                rollout.outcome is not Outcome.INFRA_FAULT
                or environment_faults > self._faults.retries
            ):
                return rollout, encoded

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
        member.leaving, is_engine = True, member in self._engines
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
        (self._engines if member in self._engines else self._workers).remove(member)

    async def watch(self) -> None:
        """Ping everyone for ever: finds deaths that nobody's call runs into, and hangs that nothing
        else finds. Raises what made the pool unusable."""
        while True:
            await asyncio.wait([self._broken], timeout=self._deadlines.ping_every_s)
            if self._broken.done():
                self._broken.result()
            await asyncio.gather(*(self._ping(m) for m in self._engines + self._workers))

    async def watched(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` while watching: for what is played before the loop watches for itself."""
        working = asyncio.create_task(work)
        watching = asyncio.create_task(self.watch())
        try:
            await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                watching.result()
            return await working
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def close(self) -> None:
        """Stop recovering. The actors are the cluster's to end."""
        await self._relief.close()
        for task in self._recovering.values():
            task.cancel()
        await asyncio.gather(*self._recovering.values(), return_exceptions=True)
        if self._sampling is not None:
            self._sampling.close()
        if self._broken.done() and not self._broken.cancelled():
            self._broken.exception()  # seen: it was raised elsewhere, or the run is over anyway

    def _count(self, rollout: Rollout, task: Task) -> None:
        fault = rollout.outcome is Outcome.INFRA_FAULT
        self._recent.append(fault)
        if not fault:
            return
        self.infra_faults += 1
        self._event("infra_fault", task=task.id, attempt=rollout.attempt, fault=rollout.fault)
        share = sum(self._recent) / len(self._recent)
        if len(self._recent) >= 20 and share > self._faults.infra_fault_share:
            self._break(
                RunError(
                    f"{share:.0%} of the last {len(self._recent)} episodes were infra faults, "
                    f"run.infra_fault_limit is {self._faults.infra_fault_share:.0%}; "
                    f"the last one: {rollout.fault}"
                )
            )

    def _break(self, error: Exception) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)
            self._engine_seats.fail(error)
            self._worker_seats.fail(error)

    def _recover(self, member: Member, why: str, *, kill: bool = False, lost: bool = True) -> None:
        """As `Recover`."""
        if member in self._recovering or self._broken.done() or member.leaving:
            return
        member.ready.clear()
        member.life += 1
        if lost:
            self._event("actor_lost", actor=member.actor.name, pid=member.pid, why=why)
            try:
                self._restarts.spend(why)
            except RunError as error:
                self._break(error)
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
            self._break(error if isinstance(error, Exception) else RunError(str(error)))
            return
        # nobody depends on it yet: the run goes on without it
        self._forget(member)
        text = f"{member.actor.name} did not join: {error}"
        self._event("actor_not_joined", actor=member.actor.name, text=text)

    async def _bring_up(self, member: Member, told: str, kill: bool) -> None:
        started = asyncio.get_running_loop().time()
        if kill:
            await member.actor.restart()
        start = self._refill_engine if member in self._engines else self._start_worker
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
        kind = self._engines if member in self._engines else self._workers
        return sum(m.serving for m in kind if m is not member)

    def _of(self, role: Role) -> list[Member]:
        return self._engines if role == "rollout" else self._workers

    def _engine(self, actor: Actor, number: int) -> Member:
        throttle = Throttle(self._most_episodes) if self._most_episodes else None
        return Member(actor, throttle, number)

    async def _refill_engine(self, member: Member) -> None:
        await self._start_engine(member)
        if not member.introduced:
            await self._introduce(member)
        await self._delivery.refill(member)

    async def _introduce(self, engine: Member) -> None:
        """Let every worker know an engine that joins; one that is starting learns of all."""
        client = engine.actor.generate_client()
        for worker in [m for m in self._workers if m.ready.is_set()]:
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
                    self._recover(worker, str(error), kill=isinstance(error, DeadlinePassed))
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
                {m.number: m.actor.generate_client() for m in self._engines},
                timeout_s=self._deadlines.start_s,
                waiting_for="environment worker to start",
            )
            self._up(member, pid)
        member.ready.set()
        self._worker_seats.changed()

    def _serves(self, engine: Member) -> None:
        """It holds the current weights."""
        engine.ready.set()
        self._engine_seats.changed()

    def _up(self, member: Member, pid: int) -> None:
        if pid != member.pid:
            member.pid = pid
            self._event("actor_up", actor=member.actor.name, pid=pid)

    def _taking_part(self) -> list[Member]:
        return [
            m
            for m in self._engines
            if not m.leaving and (m.ready.is_set() or m not in self._recovering)
        ]

    async def _ping(self, member: Member) -> None:
        if not member.serving:
            return
        life = member.life
        try:
            answer = await member.actor.call(
                "ping", timeout_s=self._deadlines.hang_s, waiting_for="sign of life"
            )
        except (ActorLost, DeadlinePassed) as error:
            if life == member.life:
                self._recover(member, str(error), kill=isinstance(error, DeadlinePassed))
            return
        if member not in self._engines:
            restarted = answer["pid"] != member.pid
            if not restarted:
                self._relief.look(member, answer)
        else:
            restarted = answer is None
            self._observe(member, answer)
        if restarted and member.ready.is_set():  # died and came back between two pings
            self._recover(member, f"{member.actor.name}: restarted")

    def _observe(self, engine: Member, stats: EngineStats | None) -> None:
        engine.stats = stats
        if stats is None or engine.throttle is None:
            return
        if engine.throttle.observe(stats, engine.episodes):
            self._engine_seats.changed()


def episode_seed(run_seed: int, task: Task, attempt: int) -> int:
    """The seed of one episode's sampling: of run, task and attempt alone, so that a replay draws
    the same."""
    text = f"{run_seed}/{task.environment}/{task.id}/{task.split}/{attempt}".encode()
    return zlib.crc32(text) << 16 | (zlib.crc32(text[::-1]) & 0xFFFF)
