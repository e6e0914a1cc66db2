"""The pool over channels whose bytes come but once: who is sent the weights again, and when."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from loopwright.actors.engine import UpdateReport
from loopwright.actors.weights import ChannelLost, WeightManifest
from loopwright.orchestrator.delivery import WeightsNotProven
from loopwright.orchestrator.faults import ActorLost, RestartBudget
from loopwright.orchestrator.membership import Deadlines
from loopwright.orchestrator.pool import FaultLimits, Pool
from tests.scripted import ScriptedActor
from tests.scripted_pool import Events, acknowledged, engine, manifest, run, then, worker

LOST = ActorLost("gone")
CUT_OFF = ChannelLost("the peer closed the connection")


def passing(version: int) -> WeightManifest:
    """A manifest that only engines of its group can take."""
    return replace(manifest(version), carrier="collective", segment=f"127.0.0.1:1/g{version}")


class Trainer:
    """Sends again what is asked for, and keeps who asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    async def resend(self, version: int, members: tuple[str, ...]) -> WeightManifest:
        """The version for a group of its own."""
        self.asked.append((version, members))
        return replace(passing(version), segment="127.0.0.1:1/again")


def pool_of(engines: list[ScriptedActor], events: Events, trainer: Trainer) -> Pool:
    """A pool that may ask the trainer."""
    return Pool(
        list(engines),
        [worker()],
        deadlines=Deadlines(start_s=5, publish_s=5, ping_every_s=0.01, hang_s=5),
        faults=FaultLimits(retries=1, infra_fault_share=0.2),
        restarts=RestartBudget(5),
        on_update="continue",
        event=events,
        resend=trainer.resend,
    )


def taken(actor: ScriptedActor) -> list[str]:
    """Where an engine was told to take each publish."""
    return [
        args[0].segment.rpartition("/")[2] for method, args in actor.calls if method == "update"
    ]


def test_an_engine_that_missed_a_publish_is_sent_it_again_alone() -> None:
    async def scenario() -> None:
        events, trainer = Events(), Trainer()
        missed = engine(0, update=then(acknowledged, CUT_OFF, acknowledged))
        other = engine(1)
        pool = pool_of([missed, other], events, trainer)
        assert pool.members() == ("rollout 0/0", "rollout 1/0")
        await pool.start(passing(0))
        reports = await pool.publish(passing(1))
        assert [r.version for r in reports] == [1, 1]
        assert trainer.asked == [(1, ("rollout 0/0",))]
        assert taken(missed) == ["g0", "g1", "again"] and taken(other) == ["g0", "g1"]
        assert (events.count("publish_again"), events.count("actor_lost")) == (1, 0)
        await pool.close()

    run(scenario())


def test_an_engine_that_came_back_cannot_take_what_passed_by() -> None:
    async def scenario() -> None:
        events, trainer = Events(), Trainer()
        lost = engine(0, update=then(acknowledged, LOST, acknowledged))
        pool = pool_of([lost], events, trainer)
        await pool.start(passing(0))
        assert await pool.publish(passing(1)) == []
        await events.wait_for("actor_back")
        assert trainer.asked == [(1, ("rollout 0/1",))]
        assert taken(lost) == ["g0", "g1", "again"]
        assert pool.members() == ("rollout 0/1",), "the trainer forms another group for it"
        await pool.close()

    run(scenario())


def test_an_engine_that_misses_it_twice_is_restarted() -> None:
    async def scenario() -> None:
        events, trainer = Events(), Trainer()
        cut_off = engine(0, update=then(acknowledged, CUT_OFF, CUT_OFF, CUT_OFF, acknowledged))
        pool = pool_of([cut_off], events, trainer)
        await pool.start(passing(0))
        assert await pool.publish(passing(1)) == []
        await events.wait_for("actor_back")
        assert (events.count("publish_again"), events.count("actor_lost")) == (1, 1)
        assert taken(cut_off)[-1] == "again"
        await pool.close()

    run(scenario())


def test_a_wrong_checksum_is_not_sent_again() -> None:
    def damaged(published: WeightManifest, on_update: Any) -> UpdateReport:
        return replace(acknowledged(published, on_update), checksums={"a": 1, "b": 7})

    async def scenario() -> None:
        trainer = Trainer()
        pool = pool_of([engine(0, update=then(acknowledged, damaged))], Events(), trainer)
        await pool.start(passing(0))
        with pytest.raises(WeightsNotProven, match="tensors that differ: b"):
            await pool.publish(passing(1))
        assert trainer.asked == []
        await pool.close()

    run(scenario())


def test_an_engine_that_dies_asleep_wakes_with_the_next_publish() -> None:
    async def scenario() -> None:
        events, trainer = Events(), Trainer()
        sleeper = engine(0, sleep=then(LOST, lambda: None))
        pool = pool_of([sleeper], events, trainer)
        await pool.start(passing(0))
        await pool.sleep()
        while sleeper.called().count("start") < 2:  # it is back, and must not be given weights
            await asyncio.sleep(0)
        assert taken(sleeper) == ["g0"], "the trainer changes what engines share"
        await pool.publish(passing(1))
        await events.wait_for("actor_back")
        assert trainer.asked == [(1, ("rollout 0/1",))]
        await pool.close()

    run(scenario())
