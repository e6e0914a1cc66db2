"""Rollout actors and environment workers join and leave while a run goes on."""

import asyncio
from typing import Any

import numpy as np
import pytest

from loopwright.actors.engine import Completion, EngineSettings, FinishReason, GenerateRequest
from loopwright.actors.env_worker import EpisodeOrder, Parked
from loopwright.actors.envelopes import Mailbox
from loopwright.actors.episode import EngineLost
from loopwright.actors.rollout import RolloutActor
from loopwright.algorithms.records import Outcome
from loopwright.orchestrator.faults import ActorGone, ActorLost, DeadlinePassed
from loopwright.orchestrator.processes import Actor
from loopwright.orchestrator.room import Room
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


def spawned(*actors: ScriptedActor) -> Any:
    """Hands out these, one after the other; each must be given the number of its name."""
    waiting = list(actors)

    def spawn(number: int) -> Actor:
        actor = waiting.pop(0)
        assert actor.name.endswith(f" {number}")
        return actor

    return spawn


def held(player: ScriptedActor, release: asyncio.Event, ends: Any = rollout_of) -> None:
    """Its episodes end, one way or another, once `release` is set."""

    async def playing(order: EpisodeOrder) -> Any:
        await release.wait()
        return ends(order)

    player.answers["play"] = playing


class TestPool:
    """With scripted actors."""

    def test_an_engine_that_joins_meets_the_workers_and_proves_the_weights_before_it_serves(
        self,
    ) -> None:
        async def scenario() -> None:
            events, proceed = Events(), asyncio.Event()

            async def slowly(published: Any, on_update: str) -> Any:
                await proceed.wait()
                return acknowledged(published, on_update)

            first, new, player = engine(0), engine(1, update=slowly), worker(0)
            pool = pool_of([first], [player], events)
            await pool.start(manifest(0))
            await pool.publish(manifest(1))
            joining = pool.membership.join("rollout", spawned(new))
            assert pool.members() == ("rollout 0/0",), "a publish does not wait for it"
            while "update" not in new.called():
                await asyncio.sleep(0)
            assert player.calls[-1] == ("meet", ({1: "rollout 1"},))
            assert [(await play(pool, k)).attempt for k in range(2)] == [0, 1]
            assert {o.engine for o in orders(player)} == {0}, "it has no weights yet"
            proceed.set()
            await events.wait_for("actor_joined")
            assert new.called() == ["start", "update"] and new.calls[-1][1][0].version == 1
            release = asyncio.Event()
            held(player, release)
            both = [asyncio.create_task(play(pool, k)) for k in range(2)]
            while len(orders(player)) < 4:
                await asyncio.sleep(0)
            assert {o.engine for o in orders(player)[2:]} == {0, 1}
            assert joining.serving and pool.members() == ("rollout 0/0", "rollout 1/0")
            release.set()
            await asyncio.gather(*both)
            await pool.close()

        run(scenario())

    def test_a_worker_that_starts_while_an_engine_joins_knows_it(self) -> None:
        async def scenario() -> None:
            events, proceed, starts = Events(), asyncio.Event(), list[list[int]]()

            async def slowly(engines: dict[int, Any]) -> int:
                starts.append(sorted(engines))
                await proceed.wait()
                return 201

            pool = pool_of([engine(0)], [worker(0)], events)
            await pool.start(manifest(0))
            pool.membership.join("environments", spawned(worker(1, start=slowly)))
            while not starts:
                await asyncio.sleep(0)
            pool.membership.join("rollout", spawned(engine(1)))
            proceed.set()
            while events.count("actor_joined") < 2:
                await asyncio.sleep(0)
            assert starts == [[0], [0, 1]], "started again, with all of them"
            await pool.close()

        run(scenario())

    def test_episodes_of_an_engine_that_leaves_go_on_on_the_other(self) -> None:
        async def scenario() -> None:
            events, release = Events(), asyncio.Event()
            leaver = engine(1)

            def retire() -> int:
                release.set()  # its episodes find that it is gone
                return 1

            leaver.answers["retire"] = retire
            player = worker(0, go_on=lambda _key, _engine: rollout_of(orders(player)[0]))
            parked = Parked(why="rollout 1: it leaves the run")
            held(player, release, lambda order: parked if order.engine == 1 else rollout_of(order))
            pool = pool_of([engine(0), leaver], [player], events, restarts=0)
            await pool.start(manifest(0))
            playing = [asyncio.create_task(play(pool, k)) for k in range(2)]
            while len(orders(player)) < 2:
                await asyncio.sleep(0)
            await pool.membership.leave(pool.membership.members_of("rollout")[1])
            assert [(await p).outcome for p in playing] == [Outcome.SCORED] * 2
            assert [args[1] for method, args in player.calls if method == "go_on"] == [0]
            assert (leaver.ended, leaver.restarts) == (1, 0)
            assert events.seen[-1][0] == "actor_left" and events.seen[-1][1]["episodes"] == 1
            assert pool.members() == ("rollout 0/0",)
            await pool.close()

        run(scenario())

    def test_one_that_left_is_no_loss_and_spends_no_restart(self) -> None:
        """Late reports of the engine's end, and a ping under way, bring nobody back."""

        async def scenario() -> None:
            events, asked = Events(), asyncio.Event()

            async def silent() -> Any:
                asked.set()
                await release.wait()
                return ActorGone("rollout 1: died for good")

            release = asyncio.Event()
            leaver = engine(1, ping=silent)
            pool = pool_of([engine(0), leaver], [worker(0)], events, restarts=0)
            await pool.start(manifest(0))
            watching = asyncio.create_task(pool.watch())
            await asked.wait()
            await pool.membership.leave(pool.membership.members_of("rollout")[1])
            release.set()
            for _ in range(20):
                await asyncio.sleep(0.002)
            assert not watching.done() and events.count("actor_lost") == 0
            assert leaver.called().count("start") == 1 and leaver.ended == 1
            watching.cancel()
            await pool.close()

        run(scenario())

    def test_a_worker_leaves_once_its_episodes_are_over(self) -> None:
        async def scenario() -> None:
            events, release = Events(), asyncio.Event()
            leaver = worker(1)
            held(leaver, release)
            pool = pool_of([engine(0)], [worker(0), leaver], events)
            await pool.start(manifest(0))
            playing = [asyncio.create_task(play(pool, k)) for k in range(2)]
            while not orders(leaver):
                await asyncio.sleep(0)
            leaving = asyncio.create_task(
                pool.membership.leave(pool.membership.members_of("environments")[1])
            )
            assert (await playing[0]).attempt == 0
            assert (await play(pool, 2)).attempt == 2
            assert len(orders(leaver)) == 1 and leaver.ended == 0, "a world is being played in"
            release.set()
            await leaving
            assert (await playing[1]).attempt == 1 and leaver.ended == 1
            await pool.close()

        run(scenario())

    def test_without_room_it_waits_with_a_word_and_the_others_play(self) -> None:
        async def scenario() -> None:
            events, room = Events(), asyncio.Event()

            async def late() -> int:
                await room.wait()
                return 101

            new = engine(1, start=late)
            new.lack = "no node has room for 1 CPUs"
            pool = pool_of([engine(0)], [worker(0)], events, start_s=0.05)
            await pool.start(manifest(0))
            pool.membership.join("rollout", spawned(new))
            await events.wait_for("actor_waits")
            (text,) = [fields["text"] for kind, fields in events.seen if kind == "actor_waits"]
            assert text == (
                "rollout 1 waits: no node has room for 1 CPUs; the run goes on with 1 of its kind"
            )
            await asyncio.sleep(0.2)  # longer than the deadline of a start
            assert (await play(pool)).outcome is Outcome.SCORED
            new.lack = ""
            room.set()
            await events.wait_for("actor_joined")
            assert events.count("actor_waits") == 1
            await pool.close()

        run(scenario())

    def test_the_last_of_its_kind_does_not_wait_for_room_for_ever(self) -> None:
        async def scenario() -> None:
            lost = engine(0, start=then(100, ActorLost("gone")), ping=lambda: ActorLost("gone"))
            pool = pool_of([lost], [worker(0)], Events(), start_s=0.05)
            await pool.start(manifest(0))
            lost.lack = "no node has room for 1 CPUs"
            with pytest.raises(DeadlinePassed, match=r"rollout 0: .*within 0.05 s; no node has"):
                await pool.watch()
            await pool.close()

        run(scenario())

    def test_one_that_cannot_start_does_not_end_the_run(self) -> None:
        async def scenario() -> None:
            events = Events()
            broken = engine(1, start=lambda: ActorGone("rollout 1: no memory"))
            pool = pool_of([engine(0)], [worker(0)], events)
            await pool.start(manifest(0))
            pool.membership.join("rollout", spawned(broken))
            await events.wait_for("actor_not_joined")
            assert (await play(pool)).outcome is Outcome.SCORED
            assert broken.ended == 1 and len(pool.membership.members_of("rollout")) == 1
            again = pool.membership.join("rollout", spawned(engine(1)))
            assert again.number == 1, "its number is free"
            await pool.close()

        run(scenario())


class HeldEngine:
    """Generates until it is cancelled; then it has three tokens."""

    def __init__(self, _settings: EngineSettings) -> None:
        self.ends: dict[str, asyncio.Event] = {}

    async def start(self) -> None:
        """At once."""

    async def generate(self, request: GenerateRequest) -> Completion:
        """Until cancelled."""
        self.ends[request.request_id] = asyncio.Event()
        await self.ends[request.request_id].wait()
        return Completion(
            request_id=request.request_id,
            token_ids=np.arange(3, dtype=np.int32),
            logprobs=np.full(3, -1, np.float32),
            versions=np.zeros(3, np.int32),
            finish_reason=FinishReason.CANCELLED,
        )

    async def cancel(self, request_id: str) -> bool:
        """Let it end."""
        self.ends[request_id].set()
        return True

    async def update_weights(self, published: Any, on_update: str) -> Any:
        """As published."""
        return acknowledged(published, on_update)


def _request(name: str) -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        session=name,
        prompt_ids=np.zeros(1, np.int32),
        max_new_tokens=8,
        stop_token_ids=(0,),
        seed=1,
    )


def test_an_engine_that_retires_hands_out_every_token_it_has() -> None:
    async def scenario() -> None:
        built: list[HeldEngine] = []

        def build(settings: EngineSettings) -> Any:
            built.append(HeldEngine(settings))
            return built[0]

        actor = RolloutActor(build, EngineSettings(model_path="none"))
        await actor.start()
        await actor.update(manifest(0), "continue")
        mailboxes = [Mailbox(actor.exchange) for _ in range(2)]
        turns = [asyncio.create_task(mailboxes[k % 2].generate(_request(f"{k}"))) for k in range(5)]
        while len(built[0].ends) < 5:
            await asyncio.sleep(0.001)
        assert await actor.retire() == 5
        found = await asyncio.gather(*turns)
        assert [c.token_ids.size for c in found] == [3] * 5
        for mailbox in mailboxes:
            with pytest.raises(EngineLost, match="leaves the run"):
                await mailbox.generate(_request("later"))
        await actor.update(manifest(1), "continue")  # a publish that was under way
        with pytest.raises(EngineLost, match="leaves the run"):
            await actor.generate(_request("later still"))

    run(scenario())


def test_a_room_that_grows_lets_in_who_waits_and_one_that_shrinks_sends_nobody_away() -> None:
    async def scenario() -> None:
        room, inside, leave = Room(1), list[int](), [asyncio.Event() for _ in range(4)]

        async def visit(number: int) -> None:
            async with room:
                inside.append(number)
                await leave[number].wait()

        visits = [asyncio.create_task(visit(n)) for n in range(4)]
        await asyncio.sleep(0.01)
        assert inside == [0]
        await room.resize(3)
        await asyncio.sleep(0.01)
        assert inside == [0, 1, 2]
        await room.resize(1)
        leave[0].set()
        leave[1].set()
        await asyncio.sleep(0.01)
        assert inside == [0, 1, 2], "one is still inside, and there is one place"
        leave[2].set()
        leave[3].set()
        await asyncio.gather(*visits)
        assert inside == [0, 1, 2, 3]

    run(scenario())
