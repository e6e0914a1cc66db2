"""Memory of an environment worker: counted over real processes, and what a worker that holds too
much goes through."""

import asyncio
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from loopwright.actors.memory_watch import (
    Footprint,
    MemoryWatch,
    descendants,
    footprint,
    limit_bytes,
    machine_bytes,
    resident_bytes,
)
from loopwright.orchestrator.faults import ActorLost, RunError
from tests.scripted_pool import (
    Events,
    engine,
    manifest,
    orders,
    play,
    pool_of,
    rollout_of,
    run,
    then,
    worker,
)

MIB = 1 << 20
FAMILY = r"""
import os, sys
held = b"x" * (48 << 20)
for _ in range(2):
    if os.fork() == 0:
        if len(sys.argv) > 1:
            more = b"y" * (32 << 20)
        os.write(1, b"up\n")
        os.read(0, 1)
        os._exit(0)
os.write(1, b"up\n")
os.read(0, 1)
"""


@pytest.mark.parametrize("more_mib", [0, 32])
def test_what_processes_share_is_counted_once(more_mib: int) -> None:
    """A process of 48 MiB with two forks of it, which hold 32 MiB more of their own or nothing."""
    process = subprocess.Popen(
        [sys.executable, "-c", FAMILY, *(["more"] if more_mib else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)] == ["up\n"] * 3
        found = footprint(process.pid, "family", 5)
        assert found.children == 2 == len(list(descendants(process.pid)))
        assert process.pid in set(descendants(os.getpid()))
        expected = 48 + 2 * more_mib
        assert expected * MIB < found.resident_bytes < (expected + 24) * MIB
        assert found.children_bytes > 2 * more_mib * MIB
    finally:
        process.communicate("...")
    assert resident_bytes(process.pid) == 0


def test_the_limit_is_a_share_of_the_machine_or_the_shells() -> None:
    before = resource.getrlimit(resource.RLIMIT_RSS)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < machine_bytes() <= physical
    try:
        assert limit_bytes(0.25) == machine_bytes() // 4
        resource.setrlimit(resource.RLIMIT_RSS, (300 * MIB, before[1]))
        assert limit_bytes(0.25) == 300 * MIB
    finally:
        resource.setrlimit(resource.RLIMIT_RSS, before)


def test_a_watch_looks_beside_the_work() -> None:
    assert MemoryWatch("letters", 0.0).newest() is None
    watch = MemoryWatch("letters", 0.5)
    assert watch.newest() is None, "the first look has only begun"
    watch._looking.join(20)  # type: ignore[union-attr]
    found = watch.newest()
    assert found is not None and found.environment == "letters"
    assert found.own_bytes > 10 * MIB and found.limit_bytes == limit_bytes(0.5)


def signs(*resident_mib: int, played: int = 3, index: int = 0) -> Callable[..., Any]:
    """A worker's signs of life, with so much memory each time, of 100 MiB."""

    def answer(mib: int) -> dict[str, Any]:
        memory = Footprint(
            environment="leaky",
            own_bytes=30 * MIB,
            children_bytes=(mib - 30) * MIB,
            children=2,
            limit_bytes=100 * MIB,
        )
        return {"pid": 200 + index, "played": played, "memory": memory}

    return then(*map(answer, resident_mib))


def test_a_worker_over_its_limit_finishes_what_it_has_and_is_restarted() -> None:
    async def scenario() -> None:
        events, over, begun = Events(), asyncio.Event(), asyncio.Event()

        async def slowly(order: Any) -> bytes:
            begun.set()
            await over.wait()
            return rollout_of(order)

        leaky = worker(0, play=slowly, ping=signs(50, 101, 110, 110, 40))
        other = worker(1, ping=signs(50, index=1))
        pool = pool_of([engine()], [leaky, other], events, restarts=0)
        await pool.start(manifest(0))
        first = asyncio.create_task(play(pool))
        await begun.wait()
        watching = asyncio.create_task(pool.watch())
        await events.wait_for("worker_memory")
        for attempt in range(1, 4):
            await play(pool, attempt)
        assert len(orders(leaky)) == 1 and len(orders(other)) == 3, "nothing new for it"
        assert leaky.restarts == 0, "it has time for what it has"
        over.set()
        assert (await first).attempt == 0
        await events.wait_for("actor_back")
        assert leaky.restarts == 1 and events.count("actor_lost") == 0
        (told,) = (fields for kind, fields in events.seen if kind == "worker_memory")
        assert told["environment"] == "leaky" and told["actor"] == "environment worker 0"
        assert (told["own_bytes"], told["children_bytes"]) == (30 * MIB, 71 * MIB)
        assert (told["children"], told["limit_bytes"], told["episodes"]) == (2, 100 * MIB, 1)
        for part in ("environment worker 0", "30 MiB", "71 MiB in 2 processes", "100 MiB", "leaky"):
            assert part in told["text"]
        watching.cancel()
        await pool.close()

    run(scenario())


def test_episodes_of_one_that_goes_on_growing_are_played_again_elsewhere() -> None:
    async def scenario() -> None:
        events, dead = Events(), asyncio.Event()

        async def until_killed(order: Any) -> Any:
            await dead.wait()
            return ActorLost("environment worker 0: killed")

        leaky = worker(0, play=then(until_killed, rollout_of), ping=signs(101, 126, 40))
        other = worker(1, ping=signs(50, index=1))
        pool = pool_of([engine()], [leaky, other], events, restarts=0)
        await pool.start(manifest(0))
        cut_off = asyncio.create_task(play(pool))
        while not orders(leaky):
            await asyncio.sleep(0)
        watching = asyncio.create_task(pool.watch())
        await events.wait_for("actor_back")
        dead.set()
        assert (await cut_off).attempt == 0
        assert len(orders(leaky)) + len(orders(other)) == 2
        assert leaky.restarts == 1 and events.count("actor_lost") == 0
        watching.cancel()
        await pool.close()

    run(scenario())


def test_one_that_holds_too_much_before_it_has_played_anything_is_a_loss() -> None:
    async def scenario() -> None:
        events = Events()
        leaky = worker(0, ping=signs(150, played=0))
        pool = pool_of([engine()], [leaky], events, restarts=2)
        await pool.start(manifest(0))
        with pytest.raises(RunError, match=r"max_restarts allows 2.*leaky.*100 MiB"):
            await pool.watch()
        assert leaky.restarts == 2 and events.count("actor_lost") == 3
        await pool.close()

    run(scenario())


def test_one_that_dies_while_it_is_emptied_is_lost_once() -> None:
    async def scenario() -> None:
        events = Events()
        leaky = worker(0)
        over, fine = signs(150)(), signs(50)()
        leaky.answers["ping"] = then(over, ActorLost("environment worker 0: gone"), fine)
        pool = pool_of([engine()], [leaky], events, restarts=1)
        await pool.start(manifest(0))
        watching = asyncio.create_task(pool.watch())
        await events.wait_for("actor_back")
        assert events.count("actor_lost") == 1 and leaky.restarts == 0, "Ray restarts the dead"
        assert (await play(pool)).attempt == 0
        watching.cancel()
        await pool.close()

    run(scenario())
