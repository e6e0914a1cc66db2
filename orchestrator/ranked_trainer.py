"""Several processes that train one model, seen from the controller as one actor.

Every call goes to all ranks, because each of them holds a share; the answer is rank 0's. The loss
of one is the loss of all: what the others hold is of no use alone, and they would wait for the lost
one in the next exchange. So all are restarted, meet anew, and `Training` rebuilds them from the
newest checkpoint as it does a single trainer.

    call ──▶ rank 0 ─ answer          a rank dies, hangs or is restarted:
       ├──▶ rank 1                      end the others ─▶ all fresh ─▶ meet, join ─▶ as one again
       └──▶ …
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from loopwright.actors.env_worker import EngineClient
from loopwright.orchestrator.faults import ActorGone, ActorLost, DeadlinePassed, RunError
from loopwright.orchestrator.inspection import Home
from loopwright.orchestrator.processes import Actor

_GRACE_S = 15.0  # after one rank failed: until Ray knows who died, and the others noticed
_RANK_0_ALONE = ("resend",)  # calls that exchange nothing between ranks


class RankedTrainer:
    """An `Actor` made of one actor a rank."""

    def __init__(
        self,
        ranks: Sequence[Actor],
        *,
        join_s: float,
        exchange_s: float,
        event: Callable[..., None],
        grace_s: float = _GRACE_S,
    ) -> None:
        """The ranks have `join_s` to meet, and every later exchange between them `exchange_s`."""
        self.name = "trainer"
        self._ranks = list(ranks)
        self._join_s = join_s
        self._exchange_s = exchange_s
        self._event = event
        self._grace_s = grace_s
        self._pids: list[int] = []  # of the processes that have met

    async def call(self, method: str, *args: Any, timeout_s: float, waiting_for: str) -> Any:
        """As `Actor.call`, on every rank."""
        limits: dict[str, Any] = {"timeout_s": timeout_s, "waiting_for": waiting_for}
        if method in _RANK_0_ALONE:
            return await self._ranks[0].call(method, *args, **limits)
        if method == "ping":
            return await self._ping(**limits)
        tasks = [asyncio.ensure_future(r.call(method, *args, **limits)) for r in self._ranks]
        try:
            _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if waiting:
                await asyncio.wait(tasks, timeout=self._grace_s)
            errors = [_error_of(task) for task in tasks]
            if any(errors):
                raise await self._failure(errors, waiting_for)
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()

    async def restart(self) -> None:
        """Kill all ranks and let fresh processes take their place."""
        self._pids = []
        await asyncio.gather(*(rank.restart() for rank in self._ranks))

    def end(self) -> None:
        """Free all processes for good."""
        for rank in self._ranks:
            rank.end()

    async def home(self, *, timeout_s: float) -> Home:
        """Rank 0's."""
        return await self._ranks[0].home(timeout_s=timeout_s)

    async def lacks(self) -> str:
        """What the first rank without a place lacks."""
        found = await asyncio.gather(*(rank.lacks() for rank in self._ranks))
        return next(filter(None, found), "")

    def generate_client(self) -> EngineClient:
        """A trainer generates nothing."""
        raise RunError("the trainer was asked for a turn: only rollout actors generate")

    async def _ping(self, *, timeout_s: float, waiting_for: str) -> dict[str, float]:
        """Rank 0's sign of life, once all are alive and have met."""
        answers = await asyncio.gather(
            *(r.call("ping", timeout_s=timeout_s, waiting_for=waiting_for) for r in self._ranks)
        )
        pids = [int(answer["pid"]) for answer in answers]
        if pids != self._pids:
            left = [rank for rank, pid in zip(self._ranks, pids, strict=True) if pid in self._pids]
            if left:
                await asyncio.gather(*(rank.restart() for rank in left))
                raise ActorLost(f"{self.name}: a rank was restarted, so all {len(pids)} are")
            await self._meet()
            self._pids = pids
            self._event("ranks_met", actor=self.name, pids=pids)
        first: dict[str, float] = answers[0]
        return first

    async def _meet(self) -> None:
        what = f"{len(self._ranks)} ranks to meet"
        limits: dict[str, Any] = {"timeout_s": self._join_s, "waiting_for": what}
        address = await self._ranks[0].call("meet", self._join_s, **limits)
        await asyncio.gather(
            *(rank.call("join", address, self._exchange_s, **limits) for rank in self._ranks)
        )

    async def _failure(self, errors: list[BaseException | None], waiting_for: str) -> BaseException:
        """What to raise for the errors of all ranks (None: it answered, or still waits for one that
        failed), after ending the processes that are of no use any more."""
        found = [error for error in errors if error is not None]
        gone = next((error for error in found if isinstance(error, ActorGone)), None)
        if gone is not None:
            return gone
        lost = next((error for error in found if isinstance(error, ActorLost)), None)
        if lost is not None:
            left = [
                rank
                for rank, error in zip(self._ranks, errors, strict=True)
                if not isinstance(error, ActorLost)
            ]
            await asyncio.gather(*(rank.restart() for rank in left))
            return lost
        late = next((error for error in found if isinstance(error, DeadlinePassed)), None)
        if late is not None:
            return late
        own = next((e for e in found if not _is_echo(e)), None)
        if own is None:  # nobody had a problem of its own: an exchange broke off
            return DeadlinePassed(f"{self.name}: {waiting_for}: {found[0]}")
        if len(found) < len(errors):  # the others wait in an exchange for the one that failed
            await self.restart()
        return own


def _error_of(task: "asyncio.Future[Any]") -> BaseException | None:
    if not task.done():
        return None
    with contextlib.suppress(asyncio.CancelledError):
        return task.exception()
    return None


def _is_echo(error: BaseException) -> bool:
    """Is it torch's report of an exchange that broke off, rather than the reason?"""
    return type(error) is RuntimeError or type(error).__name__.startswith("Dist")
