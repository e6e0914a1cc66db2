"""The pool: rollout actors and environment workers as one thing that plays episodes, takes weights,
and is watched.

How an episode finds its engine and its worker, and survives losing one, is in `seating.py`; who is
in the pool, and how those that are lost come back, in `membership.py`.
"""

import asyncio
import zlib
from collections import deque
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from loopwright.actors.engine import EngineStats, OnUpdate, UpdateReport
from loopwright.actors.env_worker import EpisodeOrder
from loopwright.actors.episode import EpisodeLimits
from loopwright.actors.weights import WeightManifest
from loopwright.algorithms.records import Outcome, Rollout, decode
from loopwright.envs.protocol import Task, encode_task
from loopwright.orchestrator.delivery import Delivery, Event, Resend
from loopwright.orchestrator.faults import (
    ActorLost,
    DeadlinePassed,
    RestartBudget,
    RunError,
)
from loopwright.orchestrator.members import Member
from loopwright.orchestrator.membership import Deadlines, Membership
from loopwright.orchestrator.processes import Actor, first_exception
from loopwright.orchestrator.relief import Relief
from loopwright.orchestrator.sampling_record import Episode, SamplingRecord
from loopwright.orchestrator.seating import Seating

if TYPE_CHECKING:
    from loopwright.actors.model_identity import ModelIdentity

T = TypeVar("T")


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
        self.membership = Membership(
            engines,
            workers,
            deadlines=deadlines,
            restarts=restarts,
            event=event,
            refill=self._refill,
            most_episodes=most_episodes,
            most_of=most_of,
        )
        members = self.membership
        self._seating = Seating(
            members.engine_seats,
            members.worker_seats,
            recover=members.recover,
            hang_s=deadlines.hang_s,
        )
        self._orders = 0
        self._deadlines = deadlines
        self._faults = faults
        self._event = event
        self._delivery = Delivery(
            publish_s=deadlines.publish_s,
            on_update=on_update,
            recover=members.recover,
            taken=members.serves,
            event=event,
            resend=resend,
            sampling=sampling,
        )
        self._relief = Relief(
            recover=members.recover,
            event=event,
            look_every_s=deadlines.ping_every_s,
            patience_s=deadlines.hang_s,
        )
        self._recent: deque[bool] = deque(maxlen=faults.window)
        self.infra_faults = 0

    @property
    def playing(self) -> int:
        """Episodes being played."""
        return sum(m.episodes for m in self.membership.workers)

    @property
    def episodes_limit(self) -> int:
        """Episodes that all engines may have together; 0 where that is not limited."""
        return sum(m.throttle.limit for m in self.membership.engines if m.throttle is not None)

    @property
    def resumed(self) -> int:
        """How often an episode went on after its engine was lost."""
        return self._seating.resumed

    def engine_stats(self) -> dict[int, EngineStats]:
        """The newest counters of each engine that has answered, by its number."""
        return {m.number: m.stats for m in self.membership.engines if m.stats is not None}

    async def start(self, manifest: WeightManifest) -> list[UpdateReport]:
        """Bring everyone up, side by side, and give the engines their first weights."""
        await self.membership.start()
        return await self.publish(manifest)

    @property
    def version(self) -> int:
        """What was published last."""
        return self._delivery.version

    def members(self) -> tuple[str, ...]:
        """The engines that the next publish goes to, each with its life: a restarted one counts as
        another."""
        return tuple(m.key for m in self.membership.taking_part())

    async def sleep(self) -> None:
        """All engines stand still and give back their KV, until the next publish."""
        await self._delivery.sleep(lambda: [m for m in self.membership.engines if m.serving])

    async def publish(self, manifest: WeightManifest) -> list[UpdateReport]:
        """Every engine takes the weights and proves it. An engine that dies meanwhile is restarted
        and then given them; raises `WeightsNotProven` with the names of the tensors that differ."""
        return await self._delivery.publish(manifest, self.membership.taking_part)

    async def identities(self) -> "dict[str, ModelIdentity]":
        """Who -> what it was started from, of every engine and worker that serves."""
        return await self._ask([*self.membership.engines, *self.membership.workers], "identity")

    async def probe(self, token_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Engine by name -> its logprobs [T-1] of given tokens [T]."""
        return await self._ask(self.membership.engines, "probe", token_ids)

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

    async def watch(self) -> None:
        """Ping everyone for ever: finds deaths that nobody's call runs into, and hangs that nothing
        else finds. Raises what made the pool unusable."""
        while True:
            await asyncio.wait([self.membership.broken], timeout=self._deadlines.ping_every_s)
            if self.membership.broken.done():
                self.membership.broken.result()
            await asyncio.gather(
                *(self._ping(m) for m in self.membership.engines + self.membership.workers)
            )

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
        await self.membership.close()
        if self._sampling is not None:
            self._sampling.close()

    async def _refill(self, engine: Member) -> None:
        await self._delivery.refill(engine)

    def _count(self, rollout: Rollout, task: Task) -> None:
        fault = rollout.outcome is Outcome.INFRA_FAULT
        self._recent.append(fault)
        if not fault:
            return
        self.infra_faults += 1
        self._event("infra_fault", task=task.id, attempt=rollout.attempt, fault=rollout.fault)
        share = sum(self._recent) / len(self._recent)
        if len(self._recent) >= 20 and share > self._faults.infra_fault_share:
            self.membership.fail(
                RunError(
                    f"{share:.0%} of the last {len(self._recent)} episodes were infra faults, "
                    f"run.infra_fault_limit is {self._faults.infra_fault_share:.0%}; "
                    f"the last one: {rollout.fault}"
                )
            )

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
                self.membership.recover(member, str(error), kill=isinstance(error, DeadlinePassed))
            return
        if member not in self.membership.engines:
            restarted = answer["pid"] != member.pid
            if not restarted:
                self._relief.look(member, answer)
        else:
            restarted = answer is None
            self._observe(member, answer)
        if restarted and member.ready.is_set():  # died and came back between two pings
            self.membership.recover(member, f"{member.actor.name}: restarted")

    def _observe(self, engine: Member, stats: EngineStats | None) -> None:
        engine.stats = stats
        if stats is None or engine.throttle is None:
            return
        if engine.throttle.observe(stats, engine.episodes):
            self.membership.engine_seats.changed()


def episode_seed(run_seed: int, task: Task, attempt: int) -> int:
    """The seed of one episode's sampling: of run, task and attempt alone, so that a replay draws
    the same."""
    text = f"{run_seed}/{task.environment}/{task.id}/{task.split}/{attempt}".encode()
    return zlib.crc32(text) << 16 | (zlib.crc32(text[::-1]) & 0xFFFF)
