"""Bringing a process up, or back: until it answers, within a deadline that does not begin before
the cluster has a place for it."""

import asyncio
from collections.abc import Awaitable, Callable

from loopwright.actors.episode import EngineLost
from loopwright.actors.weights import ChannelLost
from loopwright.orchestrator.faults import ActorGone, ActorLost, DeadlinePassed
from loopwright.orchestrator.processes import Actor

_LOOK_S = 4.0  # between two looks at what it lacks
_AGAIN_S = 0.2


async def until_up(
    actor: Actor,
    start: Callable[[], Awaitable[None]],
    *,
    start_s: float,
    others: Callable[[], int],
    waits: Callable[[str], None],
) -> None:
    """Start it as often as it takes. `start` is repeated where it raised that the process is lost,
    and must bear that.

    Where the cluster lacks room for the process while `others` of its kind serve, `waits` is told
    once what is missing, and the deadline moves: a node may come, or come back. Raises `ActorGone`,
    and `DeadlinePassed` where it has a place and does not answer, or nobody else serves.
    """
    loop = asyncio.get_running_loop()
    ends, told, lacked = loop.time() + start_s, False, False
    work = _begin(start)
    try:
        while True:
            await asyncio.wait([work], timeout=min(_LOOK_S, max(ends - loop.time(), 0.0)))
            late = work.done() and isinstance(work.exception(), DeadlinePassed)
            if work.done() and not late:
                return work.result()
            lack = await actor.lacks()
            waiting = bool(lack) and others() > 0
            if waiting or lacked:  # it has had a place since this look at the earliest
                ends = loop.time() + start_s
            elif loop.time() >= ends:
                raise not_back(actor, start_s, lack)
            if waiting and not told:
                waits(lack)
                told = True
            lacked = waiting
            if late:
                work = _begin(start)
    finally:
        work.cancel()


def _begin(start: Callable[[], Awaitable[None]]) -> "asyncio.Task[None]":
    work = asyncio.get_running_loop().create_task(_until_it_answers(start))
    # who is cancelled looks at it no more, and its process may end at that moment
    work.add_done_callback(lambda done: done.cancelled() or done.exception())
    return work


def not_back(actor: Actor, start_s: float, lack: str) -> DeadlinePassed:
    """The error of a process that was not up in time, with what its place lacks, if anything."""
    return DeadlinePassed(
        f"{actor.name}: lost, and not back within {start_s:g} s; "
        + (lack or "look into its log, or raise cluster.start_timeout_s")
    )


async def _until_it_answers(start: Callable[[], Awaitable[None]]) -> None:
    """While an actor restarts, calls fail with `ActorLost` once or twice; later ones wait for
    it."""
    while True:
        try:
            return await start()
        except ActorGone:
            raise
        except (ActorLost, EngineLost, ChannelLost):
            await asyncio.sleep(_AGAIN_S)
