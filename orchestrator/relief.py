"""Relief for environment workers that hold too much memory: no new episodes, time for those under
way, then a fresh process.

A leaking environment so costs a restart now and then, and no machine. Episodes that do not end in
time, or while the memory goes on growing, are played again elsewhere, as those of any lost worker.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from loopwright.actors.memory_watch import Footprint
from loopwright.orchestrator.faults import ActorLost, DeadlinePassed
from loopwright.orchestrator.members import Member, Recover

_TOO_MUCH = 1.25  # of the limit: nothing under way is waited for any more


class Relief:
    """Empties and restarts workers."""

    def __init__(
        self,
        *,
        recover: Recover,
        event: Callable[..., None],
        look_every_s: float,
        patience_s: float,
    ) -> None:
        """Episodes under way have `patience_s`."""
        self._recover = recover
        self._event = event
        self._look_every_s = look_every_s
        self._patience_s = patience_s
        self._emptying: dict[Member, asyncio.Task[None]] = {}

    def look(self, worker: Member, answer: dict[str, Any]) -> None:
        """Take a worker's sign of life; begin to empty it if it holds too much."""
        memory: Footprint | None = answer.get("memory")
        if memory is None or memory.resident_bytes <= memory.limit_bytes:
            return
        if worker in self._emptying or not worker.ready.is_set():
            return
        worker.ready.clear()
        self._event(
            "worker_memory",
            actor=worker.actor.name,
            pid=worker.pid,
            environment=memory.environment,
            own_bytes=memory.own_bytes,
            children_bytes=memory.children_bytes,
            children=memory.children,
            limit_bytes=memory.limit_bytes,
            episodes=worker.episodes,
            text=f"{worker.actor.name} holds {memory}; it gets no more episodes, and is restarted "
            f"when the {worker.episodes} it has are over, or in {self._patience_s:g} s",
        )
        task = asyncio.get_running_loop().create_task(self._empty(worker, memory))
        self._emptying[worker] = task
        task.add_done_callback(lambda _: self._emptying.pop(worker, None))

    async def close(self) -> None:
        """Stop."""
        tasks = list(self._emptying.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _empty(self, worker: Member, memory: Footprint) -> None:
        life = worker.life
        try:
            played = await self._until_empty(worker)
        except (ActorLost, DeadlinePassed) as error:
            if life == worker.life:
                self._recover(worker, str(error), kill=isinstance(error, DeadlinePassed))
            return
        if life == worker.life:
            # one that outgrows its limit before it has played anything would be restarted for ever
            why = f"{worker.actor.name}: restarted, it held {memory}"
            self._recover(worker, why, kill=True, lost=not played)

    async def _until_empty(self, worker: Member) -> int:
        """Or until that cannot be waited for; how many episodes it has played."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience_s
        while True:
            answer = await worker.actor.call(
                "ping", timeout_s=self._patience_s, waiting_for="sign of life"
            )
            now: Footprint | None = answer.get("memory")
            too_much = now is not None and now.resident_bytes > _TOO_MUCH * now.limit_bytes
            if not worker.episodes or too_much or loop.time() > deadline:
                return int(answer["played"])
            await asyncio.sleep(self._look_every_s)
