"""Episodes that are taken back, and how many an engine gets: seats over scripted actors."""

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from loopwright.actors.engine import EngineStats
from loopwright.actors.env_worker import Cut, EpisodeOrder
from loopwright.algorithms.records import Outcome
from loopwright.envs.protocol import decode_task
from loopwright.orchestrator.faults import DeadlinePassed
from loopwright.orchestrator.members import Member, Seats, Throttle
from loopwright.orchestrator.pool import Pool
from loopwright.orchestrator.seating import EpisodeTakenBack
from tests.scripted import TASK
from tests.scripted_pool import (
    LIMITS,
    Events,
    engine,
    manifest,
    orders,
    play,
    pool_of,
    rollout_of,
    run,
    worker,
)

STATS = EngineStats(
    version=0,
    running=0,
    waiting=0,
    generated_tokens=0,
    prefill_tokens=0,
    cached_prefix_tokens=0,
    busy_s=0.0,
    uptime_s=1.0,
)


async def play_unless(pool: Pool, take_back: asyncio.Event) -> Any:
    """One episode that may be taken back."""
    return await pool.play(TASK, 0, seed=9, priority=1, limits=LIMITS, take_back=take_back)


class TestTakingBack:
    """Episodes that are not wanted any more."""

    def test_it_says_how_far_it_had_come(self) -> None:
        async def scenario() -> None:
            playing, over = asyncio.Event(), asyncio.Event()
            cut = Cut(turns=2, tokens=31, seconds=0.5)

            async def long(_order: EpisodeOrder) -> Cut:
                playing.set()
                await over.wait()
                return cut

            def take_back(_key: str) -> Cut:
                over.set()
                return cut

            player = worker(0, long, take_back=take_back)
            pool = pool_of([engine()], [player], Events())
            await pool.start(manifest(0))
            wanted = asyncio.Event()
            task = asyncio.create_task(play_unless(pool, wanted))
            await playing.wait()
            wanted.set()
            with pytest.raises(EpisodeTakenBack) as taken:
                await task
            assert taken.value.cut == cut and pool.playing == 0
            assert player.calls[-1] == ("take_back", (orders(player)[0].key,))
            await pool.close()

        run(scenario())

    def test_one_that_ends_in_the_same_moment_counts(self) -> None:
        async def scenario() -> None:
            playing, over = asyncio.Event(), asyncio.Event()

            async def nearly_done(order: EpisodeOrder) -> bytes:
                playing.set()
                await over.wait()
                return rollout_of(order)

            def too_late(_key: str) -> None:
                over.set()

            player = worker(0, nearly_done, take_back=too_late)
            pool = pool_of([engine()], [player], Events())
            await pool.start(manifest(0))
            wanted = asyncio.Event()
            task = asyncio.create_task(play_unless(pool, wanted))
            await playing.wait()
            wanted.set()
            assert (await task)[0].outcome is Outcome.SCORED
            await pool.close()

        run(scenario())

    def test_one_that_waits_for_an_engine_has_not_begun(self) -> None:
        async def scenario() -> None:
            busy = asyncio.Event()

            async def slowly(order: EpisodeOrder) -> bytes:
                await busy.wait()
                return rollout_of(order)

            pool = pool_of([engine()], [worker(0, slowly)], Events(), most_episodes=1)
            await pool.start(manifest(0))
            first = asyncio.create_task(play(pool))
            wanted = asyncio.Event()
            second = asyncio.create_task(play_unless(pool, wanted))
            while pool.playing < 1:
                await asyncio.sleep(0)
            wanted.set()
            with pytest.raises(EpisodeTakenBack, match="0 tokens"):
                await second
            busy.set()
            assert (await first).outcome is Outcome.SCORED
            await pool.close()

        run(scenario())

    def test_a_worker_that_hangs_does_not_hold_the_step(self) -> None:
        async def scenario() -> None:
            playing = asyncio.Event()

            async def hangs(_order: EpisodeOrder) -> bytes:
                playing.set()
                await asyncio.Event().wait()
                raise AssertionError("nobody sets it")

            silence = DeadlinePassed("an episode to be handed back: no answer")
            player = worker(0, hangs, take_back=lambda _key: silence)
            events = Events()
            pool = pool_of([engine()], [player], events)
            await pool.start(manifest(0))
            wanted = asyncio.Event()
            task = asyncio.create_task(play_unless(pool, wanted))
            await playing.wait()
            wanted.set()
            with pytest.raises(EpisodeTakenBack):
                await task
            await events.wait_for("actor_back")
            assert player.restarts == 1
            await pool.close()

        run(scenario())


class TestThrottle:
    """How many episodes an engine gets, by what its KV cache holds."""

    def test_it_falls_to_what_is_served_and_grows_again(self) -> None:
        throttle = Throttle(most=32)
        full = replace(STATS, running=10, waiting=10, kv_waits=7)
        assert throttle.observe(full, 32) and throttle.limit == 16
        assert not throttle.observe(replace(STATS, running=10, kv_waits=7), 12), "nobody waits"
        assert throttle.observe(replace(STATS, running=16, kv_waits=7), 16)
        assert throttle.limit == 18
        for _ in range(20):
            throttle.observe(replace(STATS, running=16, kv_waits=7), throttle.limit)
        assert throttle.limit == 32

    def test_waits_between_two_looks_count(self) -> None:
        throttle = Throttle(most=32)
        assert throttle.observe(replace(STATS, running=20, kv_waits=1), 32), "gone by now"
        assert throttle.limit == 28

    def test_waiting_for_a_slot_is_no_pressure(self) -> None:
        throttle = Throttle(most=32)
        assert not throttle.observe(replace(STATS, running=4, waiting=28), 32)

    def test_a_restarted_engine_counts_from_nothing(self) -> None:
        throttle = Throttle(most=8)
        throttle.observe(replace(STATS, running=6, waiting=2, kv_waits=5), 8)
        assert throttle.limit == 6
        assert not throttle.observe(STATS, 6), "fewer than before: no news"
        assert throttle.observe(STATS, 6) and throttle.limit == 7

    def test_one_episode_always_runs(self) -> None:
        throttle = Throttle(most=4)
        for looks in range(1, 9):
            throttle.observe(replace(STATS, running=1, waiting=3, kv_waits=looks), 1)
        assert throttle.limit == 1

    def test_who_waits_gets_seats_by_age(self) -> None:
        async def scenario() -> None:
            gate = asyncio.Semaphore(0)

            async def slowly(order: EpisodeOrder) -> bytes:
                await gate.acquire()
                return rollout_of(order)

            player = worker(0, slowly)
            pool = pool_of([engine()], [player], Events(), most_episodes=1)
            await pool.start(manifest(0))
            playing = [
                asyncio.create_task(pool.play(TASK, 0, seed=1, priority=p, limits=LIMITS))
                for p in (0, 7, 3, 5)
            ]
            for _ in range(30):
                await asyncio.sleep(0)
            for _ in playing:
                gate.release()
            await asyncio.gather(*playing)
            assert [order.priority for order in orders(player)] == [0, 3, 5, 7]
            await pool.close()

        run(scenario())


class TestLimitsOfEnvironments:
    """What an environment declares: how many of its episodes one worker plays at once."""

    def test_a_full_environment_waits_and_others_pass(self) -> None:
        most: dict[tuple[int, str], int] = {}

        async def scenario() -> None:
            playing: Counter[tuple[int, str]] = Counter()

            def plays(index: int) -> Any:
                async def play(order: EpisodeOrder) -> bytes:
                    key = index, decode_task(order.task).environment
                    playing[key] += 1
                    most[key] = max(most.get(key, 0), playing[key])
                    for _ in range(20):
                        await asyncio.sleep(0)
                    playing[key] -= 1
                    return rollout_of(order)

                return play

            workers = [worker(index, plays(index)) for index in range(2)]
            pool = pool_of([engine()], workers, Events(), most_of={"heavy": 3})
            await pool.start(manifest(0))
            orders = [
                pool.play(replace(TASK, environment=name), n, seed=n, priority=n, limits=LIMITS)
                for n in range(100)
                for name in ("heavy", "light")
            ]
            played = await asyncio.gather(*orders)
            assert len(played) == 200 and all(r.outcome is Outcome.SCORED for r, _ in played)
            await pool.close()

        run(scenario())
        assert [most[index, "heavy"] for index in range(2)] == [3, 3]
        assert all(most[index, "light"] > 20 for index in range(2))

    def test_a_seat_given_up_while_waiting_is_nobodys(self) -> None:
        async def scenario() -> None:
            member = Member(worker())
            member.ready.set()
            seats = Seats([member], {"heavy": 1})
            await seats.take(0, "heavy")
            waiting = asyncio.ensure_future(seats.take(1, "heavy"))
            await asyncio.sleep(0)
            assert (await seats.take(2, "light")) is member, "it passes who waits for the other"
            waiting.cancel()
            await asyncio.wait([waiting])
            seats.leave(member, "heavy")
            assert member.episodes == 1 and member.of["heavy"] == 0
            assert await seats.take(3, "heavy") is member

        run(scenario())
