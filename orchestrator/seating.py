"""One episode's way through the pool: a seat on an engine and on a worker, and what happens when
one of them is lost, or the episode is taken back.

An episode stays with one engine for all its turns: its prefix is cached there. When that engine is
lost the episode waits in its worker, with all its tokens, and goes on from exactly these on the
next engine that has a seat. When its worker is lost, its world is: whoever plays it next brings a
fresh one to the same place from the turns on record, or begins again (actors/episode_record.py).
"""

import asyncio
from dataclasses import replace
from typing import Any

from loopwright.actors.env_worker import Cut, EpisodeOrder, Parked, WorkerLost
from loopwright.envs.protocol import decode_task
from loopwright.orchestrator.faults import ActorLost, DeadlinePassed
from loopwright.orchestrator.members import Member, Recover, Seats

_TAKE_BACK_S = 12.0  # for a worker to hand back an episode; a silent one is left behind
_NOT_BEGUN = Cut(turns=0, tokens=0, seconds=0.0)


class EpisodeTakenBack(Exception):
    """The caller took the episode back; how far it had come."""

    def __init__(self, cut: Cut) -> None:
        super().__init__(f"taken back after {cut.tokens} tokens")
        self.cut = cut


class Seating:
    """Plays orders on whoever has a seat."""

    def __init__(self, engines: Seats, workers: Seats, *, recover: Recover, hang_s: float) -> None:
        self._engines = engines
        self._workers = workers
        self._recover = recover
        self._hang_s = hang_s
        self.resumed = 0  # times that an episode outlived its engine

    async def play(
        self, order: EpisodeOrder, waiting_for: str, take_back: asyncio.Event | None
    ) -> bytes | None:
        """The encoded rollout, on as many engines as it takes; None if its worker is lost. Raises
        `EpisodeTakenBack` once `take_back` is set."""
        environment = decode_task(order.task).environment
        # First the worker: who waits for its environment keeps no engine from others.
        worker = await self._seat(self._workers, order, take_back, environment)
        if worker is None:
            raise EpisodeTakenBack(_NOT_BEGUN)
        engine: Member | None = None
        try:
            engine = await self._seat(self._engines, order, take_back)
            if engine is None:
                raise EpisodeTakenBack(_NOT_BEGUN)
            call: tuple[Any, ...] = ("play", replace(order, engine=engine.number))
            while True:
                life = engine.life
                outcome = await self._ask(worker, order, call, waiting_for, take_back)
                if isinstance(outcome, Cut):
                    raise EpisodeTakenBack(outcome)
                if not isinstance(outcome, Parked):
                    return outcome
                if life == engine.life:
                    self._recover(engine, outcome.why)
                self._engines.leave(engine)
                engine = None
                engine = await self._seat(self._engines, order, take_back)
                if engine is None:
                    raise EpisodeTakenBack(await self._hand_back(worker, order.key) or _NOT_BEGUN)
                self.resumed += 1
                call = ("go_on", order.key, engine.number)
        finally:
            if engine is not None:
                self._engines.leave(engine)
            self._workers.leave(worker, environment)

    async def _ask(
        self,
        worker: Member,
        order: EpisodeOrder,
        call: tuple[Any, ...],
        waiting_for: str,
        take_back: asyncio.Event | None,
    ) -> bytes | Parked | Cut | None:
        """What the worker says of the episode; None if it is lost."""
        life = worker.life
        method, *arguments = call
        asking: asyncio.Future[bytes | Parked | Cut] = asyncio.ensure_future(
            worker.actor.call(
                method,
                *arguments,
                timeout_s=order.limits.timeout_s + self._hang_s,
                waiting_for=waiting_for,
            )
        )
        try:
            if await _first(asking, take_back):
                return asking.result()
            cut = await self._hand_back(worker, order.key)
            await asyncio.wait([asking], timeout=_TAKE_BACK_S)
            return asking.result() if asking.done() else cut
        except (ActorLost, DeadlinePassed, WorkerLost) as error:
            if life == worker.life:
                self._recover(worker, str(error), kill=isinstance(error, DeadlinePassed))
            return None
        finally:
            asking.cancel()

    async def _hand_back(self, worker: Member, key: str) -> Cut | None:
        cut: Cut | None = await worker.actor.call(
            "take_back", key, timeout_s=_TAKE_BACK_S, waiting_for="an episode to be handed back"
        )
        return cut

    async def _seat(
        self,
        seats: Seats,
        order: EpisodeOrder,
        take_back: asyncio.Event | None,
        environment: str = "",
    ) -> Member | None:
        """A seat; None if the episode is taken back before there is one."""
        if take_back is None:
            return await seats.take(order.priority, environment)
        if take_back.is_set():
            return None
        waiting = asyncio.ensure_future(seats.take(order.priority, environment))
        try:
            return waiting.result() if await _first(waiting, take_back) else None
        finally:
            waiting.cancel()


async def _first(answer: "asyncio.Future[Any]", take_back: asyncio.Event | None) -> bool:
    """Wait for the answer; False where `take_back` is set before it is there."""
    if take_back is None:
        await asyncio.wait([answer])
        return True
    wanted = asyncio.ensure_future(take_back.wait())
    try:
        await asyncio.wait([answer, wanted], return_when=asyncio.FIRST_COMPLETED)
        return answer.done()
    finally:
        wanted.cancel()
