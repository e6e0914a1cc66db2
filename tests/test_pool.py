"""The pool with scripted actors: what is played again, who is restarted, and when it gives up."""

import asyncio
from typing import Any

import pytest

from loopwright.actors.engine import UpdateReport
from loopwright.actors.env_worker import EpisodeOrder, Parked, WorkerLost
from loopwright.actors.weights import WeightManifest
from loopwright.algorithms.records import Outcome
from loopwright.orchestrator.delivery import WeightsNotProven
from loopwright.orchestrator.faults import ActorLost, DeadlinePassed, RunError
from tests.scripted import ScriptedActor
from tests.scripted_pool import (
    Events,
    acknowledged,
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

LOST = ActorLost("gone")
GONE = Parked(why="rollout 0: gone")


def parking_worker(play: Any = None, **answers: Any) -> ScriptedActor:
    """A worker whose first episode loses its engine, and goes on well on the next."""
    last: list[EpisodeOrder] = []

    def playing(order: EpisodeOrder) -> Any:
        last.append(order)
        return (play or then(GONE))(order)

    return worker(0, playing, **({"go_on": lambda _key, _engine: rollout_of(last[0])} | answers))


@pytest.mark.parametrize("error", [LOST, WorkerLost("restarted")])
def test_an_episode_of_a_lost_worker_is_played_again_with_the_same_seed(error: Exception) -> None:
    async def scenario() -> None:
        events, lost = Events(), worker(0, then(error, rollout_of))
        pool = pool_of([engine()], [lost], events)
        await pool.start(manifest(0))
        assert (await play(pool)).outcome is Outcome.SCORED
        first, second = orders(lost)
        assert (first.seed, first.attempt, first.task) == (second.seed, second.attempt, second.task)
        assert lost.called() == ["start", "play", "start", "play"]
        assert lost.restarts == 0, "a dead process needs no kill"
        assert (events.count("actor_lost"), events.count("infra_fault")) == (1, 0)
        await pool.close()

    run(scenario())


def test_a_worker_that_hangs_is_killed_and_restarted() -> None:
    async def scenario() -> None:
        hung = worker(0, then(DeadlinePassed("no answer"), rollout_of))
        pool = pool_of([engine()], [hung], Events())
        await pool.start(manifest(0))
        assert (await play(pool)).outcome is Outcome.SCORED
        assert hung.called() == ["start", "play", "restart", "start", "play"]
        await pool.close()

    run(scenario())


def test_a_lost_engine_gets_start_then_the_newest_weights_before_it_serves() -> None:
    async def scenario() -> None:
        lost = engine()
        player = parking_worker()
        pool = pool_of([lost], [player], Events())
        await pool.start(manifest(0))
        await pool.publish(manifest(1))
        assert (await play(pool)).outcome is Outcome.SCORED
        assert lost.called() == ["start", "update", "update", "start", "update"]
        assert [args[0].version for method, args in lost.calls if method == "update"] == [0, 1, 1]
        assert player.called() == ["start", "play", "go_on"], "nothing is played again"
        await pool.close()

    run(scenario())


def test_episodes_wait_until_the_restarted_engine_holds_the_weights() -> None:
    async def scenario() -> None:
        proceed = asyncio.Event()

        async def slowly(published: WeightManifest, on_update: str) -> UpdateReport:
            await proceed.wait()
            return acknowledged(published, on_update)

        events = Events()
        lost = engine(update=then(acknowledged, slowly))
        player = parking_worker()
        pool = pool_of([lost], [player], events)
        await pool.start(manifest(0))
        playing = asyncio.create_task(play(pool))
        while lost.called().count("update") < 2:
            await asyncio.sleep(0)
        assert len(orders(player)) == 1, "an engine without weights was given an episode"
        proceed.set()
        assert (await playing).outcome is Outcome.SCORED
        assert events.count("actor_back") == 1
        await pool.close()

    run(scenario())


def test_an_engine_lost_during_a_publish_is_given_the_weights_afterwards() -> None:
    async def scenario() -> None:
        events = Events()
        lost, other = engine(0, update=then(acknowledged, LOST, acknowledged)), engine(1)
        pool = pool_of([lost, other], [worker()], events)
        await pool.start(manifest(0))
        reports = await pool.publish(manifest(1))
        assert [r.version for r in reports] == [1], "the other engine holds it"
        await events.wait_for("actor_back")
        assert lost.called() == ["start", "update", "update", "start", "update"]
        assert lost.calls[-1][1][0].version == 1
        await pool.close()

    run(scenario())


def test_a_loss_seen_by_an_episode_before_the_publish_sees_it_does_not_end_the_run() -> None:
    """The engine dies while it takes the weights; an episode's fault starts the recovery first."""

    async def scenario() -> None:
        events, die = Events(), asyncio.Event()

        async def dies(_published: WeightManifest, _on_update: str) -> Exception:
            await die.wait()
            return ActorLost("rollout 0: died while updating")

        lost = engine(update=then(acknowledged, dies, acknowledged))
        player = parking_worker()
        pool = pool_of([lost], [player], events)
        await pool.start(manifest(0))
        publishing = asyncio.create_task(pool.publish(manifest(1)))
        playing = asyncio.create_task(play(pool))
        await events.wait_for("actor_lost")
        die.set()
        assert await publishing == []
        assert (await playing).outcome is Outcome.SCORED
        assert lost.calls[-1][1][0].version == 1
        assert events.count("actor_lost") == 1
        await pool.close()

    run(scenario())


def test_late_reports_about_a_former_life_restart_nothing() -> None:
    """Two episodes run into the same death; one of them reports it after the recovery."""

    async def scenario() -> None:
        events, late = Events(), asyncio.Event()

        async def reports_late(_order: EpisodeOrder) -> Parked:
            await late.wait()
            return GONE

        player = parking_worker(then(reports_late, lambda _: GONE))
        pool = pool_of([engine()], [player], events)
        await pool.start(manifest(0))
        playing = [asyncio.create_task(play(pool, attempt)) for attempt in range(2)]
        await events.wait_for("actor_back")
        late.set()
        assert [(await p).attempt for p in playing] == [0, 0]
        assert events.count("actor_lost") == 1 and pool.resumed == 2
        await pool.close()

    run(scenario())


def test_an_episode_goes_on_on_the_other_engine_at_once() -> None:
    async def scenario() -> None:
        events, proceed = Events(), asyncio.Event()

        async def slowly() -> int:
            await proceed.wait()
            return 100

        dying = engine(0, start=then(100, slowly))
        player = parking_worker()
        pool = pool_of([dying, engine(1)], [player], events)
        await pool.start(manifest(0))
        assert (await play(pool)).outcome is Outcome.SCORED
        assert orders(player)[0].engine == 0
        (went_on,) = [args for method, args in player.calls if method == "go_on"]
        assert went_on == (orders(player)[0].key, 1), "the other one, while the first restarts"
        assert events.count("actor_back") == 0 and pool.resumed == 1
        assert pool.playing == 0
        proceed.set()
        await events.wait_for("actor_back")
        await pool.close()

    run(scenario())


def test_a_parked_episode_whose_worker_dies_is_played_again() -> None:
    async def scenario() -> None:
        events = Events()
        player = parking_worker(then(GONE, rollout_of), go_on=then(LOST))
        pool = pool_of([engine()], [player], events)
        await pool.start(manifest(0))
        assert (await play(pool)).outcome is Outcome.SCORED
        assert [m for m in player.called() if m != "start"] == ["play", "go_on", "play"]
        assert events.count("actor_lost") == 2
        await pool.close()

    run(scenario())


def test_environment_faults_are_retried_then_returned() -> None:
    async def scenario() -> None:
        events = Events()
        broken = worker(0, lambda order: rollout_of(order, "scripted raised in step: KeyError"))
        pool = pool_of([engine()], [broken], events, retries=2)
        await pool.start(manifest(0))
        rollout = await play(pool)
        assert (rollout.outcome, rollout.contexts) == (Outcome.INFRA_FAULT, ())
        assert len(orders(broken)) == 3
        assert (pool.infra_faults, events.count("infra_fault")) == (3, 3)
        assert events.count("actor_lost") == 0, "nobody died: nobody is restarted"
        await pool.close()

    run(scenario())


def test_a_spent_restart_budget_ends_the_run() -> None:
    async def scenario() -> None:
        pool = pool_of([engine()], [worker(0, lambda _: LOST)], Events(), restarts=2)
        await pool.start(manifest(0))
        with pytest.raises(RunError, match=r"3 actors were lost, run.max_restarts allows 2.*gone"):
            await play(pool)
        with pytest.raises(RunError, match="max_restarts"):
            await pool.watch()
        await pool.close()

    run(scenario())


def test_too_many_infra_faults_end_the_run() -> None:
    async def scenario() -> None:
        broken = worker(0, lambda order: rollout_of(order, "scripted raised in reset: OSError"))
        pool = pool_of([engine()], [broken], Events(), retries=0)
        await pool.start(manifest(0))
        for attempt in range(19):
            await play(pool, attempt)
        await play(pool, 19)
        with pytest.raises(RunError, match=r"100% of the last 20 episodes.*limit is 20%.*OSError"):
            await pool.watch()
        await pool.close()

    run(scenario())


def test_weights_that_differ_are_named() -> None:
    def wrong(published: WeightManifest, _on_update: str) -> UpdateReport:
        return UpdateReport(version=0, checksums={"a": 0, "b": 5}, pause_s=0, seconds=0)

    async def scenario() -> None:
        pool = pool_of([engine(update=wrong)], [worker()], Events())
        with pytest.raises(WeightsNotProven, match=r"rollout 0 .*tensors that differ: b$"):
            await pool.start(manifest(0))
        await pool.close()

    run(scenario())


def test_an_engine_at_another_version_is_refused() -> None:
    def stale(published: WeightManifest, on_update: str) -> UpdateReport:
        report = acknowledged(published, on_update)
        return UpdateReport(version=7, checksums=report.checksums, pause_s=0, seconds=0)

    async def scenario() -> None:
        pool = pool_of([engine(update=stale)], [worker()], Events())
        with pytest.raises(WeightsNotProven, match="holds version 7, published 0"):
            await pool.start(manifest(0))
        await pool.close()

    run(scenario())


@pytest.mark.parametrize(
    ("answer", "killed"),
    [(LOST, 0), (DeadlinePassed("silence"), 1), (None, 0)],
    ids=["dead", "hung", "restarted"],
)
def test_watching_finds_deaths_and_hangs(answer: Any, killed: int) -> None:
    async def scenario() -> None:
        events = Events()
        sick = engine(ping=then(answer, engine().answers["ping"]))
        pool = pool_of([sick], [worker()], events)
        await pool.start(manifest(0))
        watching = asyncio.create_task(pool.watch())
        await events.wait_for("actor_back")
        assert sick.restarts == killed
        assert [m for m in sick.called() if m != "ping"][-2:] == ["start", "update"]
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await pool.close()

    run(scenario())


def test_episodes_go_to_whoever_plays_fewest_and_stay_with_one_engine() -> None:
    async def scenario() -> None:
        proceed = asyncio.Event()

        async def slowly(order: EpisodeOrder) -> bytes:
            await proceed.wait()
            return rollout_of(order)

        workers = [worker(0, slowly), worker(1, slowly)]
        pool = pool_of([engine(0), engine(1), engine(2)], workers, Events())
        await pool.start(manifest(0))
        playing = [asyncio.create_task(play(pool, attempt)) for attempt in range(6)]
        while sum(len(orders(w)) for w in workers) < 6:
            await asyncio.sleep(0)
        assert pool.playing == 6
        assert [len(orders(w)) for w in workers] == [3, 3]
        engines = [order.engine for w in workers for order in orders(w)]
        assert sorted(engines) == [0, 0, 1, 1, 2, 2], "one order, one engine for all its turns"
        proceed.set()
        await asyncio.gather(*playing)
        assert pool.playing == 0
        await pool.close()

    run(scenario())
