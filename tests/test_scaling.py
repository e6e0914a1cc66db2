"""Rollout actors and environment workers join and leave while a run goes on."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopwright.actors.engine import Completion, EngineSettings, FinishReason, GenerateRequest
from loopwright.actors.env_worker import EpisodeOrder, Parked
from loopwright.actors.envelopes import Mailbox
from loopwright.actors.episode import EngineLost
from loopwright.actors.rollout import RolloutActor
from loopwright.algorithms.records import Outcome
from loopwright.configs.load import load
from loopwright.orchestrator.cli import DONE, REFUSED, STOPPED, main
from loopwright.orchestrator.faults import ActorGone, ActorLost, DeadlinePassed, Refused, RunError
from loopwright.orchestrator.ledger import FILE, audit
from loopwright.orchestrator.members import Member
from loopwright.orchestrator.pool import Pool
from loopwright.orchestrator.processes import Actor
from loopwright.orchestrator.room import Room
from loopwright.orchestrator.scale_command import _size, ask
from loopwright.orchestrator.scaling import REQUEST, SIZES, Scaling, Size, Sizes, as_reached
from tests.driven_run import DrivenRun, build_policy, write_config
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
            joining = pool.join("rollout", spawned(new))
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
            pool.join("environments", spawned(worker(1, start=slowly)))
            while not starts:
                await asyncio.sleep(0)
            pool.join("rollout", spawned(engine(1)))
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
            await pool.leave(pool.members_of("rollout")[1])
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
            await pool.leave(pool.members_of("rollout")[1])
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
            leaving = asyncio.create_task(pool.leave(pool.members_of("environments")[1]))
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
            pool.join("rollout", spawned(new))
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
            pool.join("rollout", spawned(broken))
            await events.wait_for("actor_not_joined")
            assert (await play(pool)).outcome is Outcome.SCORED
            assert broken.ended == 1 and len(pool.members_of("rollout")) == 1
            again = pool.join("rollout", spawned(engine(1)))
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


async def _scaling(folder: Path, pool: Pool, events: Events, **more: Any) -> "asyncio.Task[None]":
    async def engines_up(count: int) -> None:
        events("engines_up", count=count)

    scaling = Scaling(
        folder,
        pool,
        engines_up=engines_up,
        event=events,
        look_every_s=0.005,
        **{"fixed": {}, "spawn": {"rollout": engine, "environments": worker}, **more},
    )
    return asyncio.create_task(scaling.watch())


class TestRequests:
    """Through the run's folder."""

    def test_asked_for_and_answered(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            events = Events()
            pool = pool_of([engine(0)], [worker(0)], events)
            await pool.start(manifest(4))
            watching = await _scaling(tmp_path, pool, events)
            answer = await asyncio.to_thread(ask, tmp_path, {"rollout": 3}, 20)
            assert answer.text == (
                "rollout 1 → 3: rollout 1, rollout 2 start; each serves once it has proven version "
                "4 or a later one"
            )
            assert not answer.refused and not (tmp_path / REQUEST).exists()
            while Sizes.read(tmp_path).roles["rollout"].reached < 3:
                await asyncio.sleep(0.005)
            assert Sizes.read(tmp_path).roles == {"rollout": Size(configured=1, asked=3, reached=3)}
            assert ("engines_up", {"count": 3}) in events.seen
            answer = await asyncio.to_thread(ask, tmp_path, {}, 20)
            assert answer.text == "rollout: 3 of 3 serve\nenvironments: 1 of 1 serve"
            answer = await asyncio.to_thread(ask, tmp_path, {"rollout": 1, "environments": 1}, 20)
            assert answer.text.splitlines() == [
                "rollout 3 → 1: rollout 2, rollout 1 leave; their 0 episodes go on on the others "
                "from the tokens they have",
                "environments 1: as it is",
            ]
            while events.count("actor_left") < 2:
                await asyncio.sleep(0.005)
            assert pool.members() == ("rollout 0/0",)
            watching.cancel()
            await pool.close()

        run(scenario())

    def test_what_cannot_be_is_refused_and_the_run_goes_on(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            events = Events()
            pool = pool_of([engine(0)], [worker(0)], events)
            await pool.start(manifest(0))
            watching = await _scaling(tmp_path, pool, events, fixed={"rollout": "by turns"})
            answer = await asyncio.to_thread(ask, tmp_path, {"rollout": 2, "environments": 2}, 20)
            assert answer.refused and answer.text == "by turns"
            assert len(pool.members_of("environments")) == 1, "all of it or nothing"
            for count, text in enumerate(("{", "[]", '{"id": "1", "sizes": {"rollout": 0}}'), 2):
                (tmp_path / "aside").write_text(text)
                (tmp_path / "aside").rename(tmp_path / REQUEST)
                while events.count("scale_refused") < count:
                    await asyncio.sleep(0.005)
            assert not watching.done() and Sizes.read(tmp_path).roles == {}
            watching.cancel()
            await pool.close()

        run(scenario())

    def test_without_a_place_it_says_what_it_waits_for(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            events = Events()
            pool = pool_of([engine(0)], [worker(0)], events)
            await pool.start(manifest(0))

            async def never() -> int:
                await asyncio.Event().wait()
                return 0

            def spawn(number: int) -> Actor:
                actor = engine(number, start=never)
                actor.lack = "no node has room for 1 CPUs"
                return actor

            watching = await _scaling(tmp_path, pool, events, spawn={"rollout": spawn})
            answer = await asyncio.to_thread(ask, tmp_path, {"rollout": 2}, 20)
            assert answer.text.splitlines()[1] == (
                "rollout 1 waits: no node has room for 1 CPUs; the run goes on"
            )
            answer = await asyncio.to_thread(ask, tmp_path, {"rollout": 1}, 20)
            while not events.count("actor_left"):
                await asyncio.sleep(0.005)
            assert len(pool.members_of("rollout")) == 1 and not watching.done()
            watching.cancel()
            await pool.close()

        run(scenario())

    def test_nobody_answers(self, tmp_path: Path) -> None:
        with pytest.raises(Refused, match=r"does not answer within 0.3 s: it is not running"):
            ask(tmp_path, {"rollout": 2}, 0.3)
        assert not (tmp_path / REQUEST).exists(), "and nobody is asked any more"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rolout=3", "did you mean rollout?"),
        ("engines=3", "did you mean rollout?"),
        ("worker=3", "did you mean environments?"),
        ("trainer=2", "go on with --resume --set trainer.ranks=N"),
        ("rollout=0", "a whole number of at least 1"),
        ("rollout=-1", "a whole number of at least 1"),
        ("rollout=two", "a whole number of at least 1"),
        ("rollout", "expected ROLE=N"),
        ("xyz=1", "expected one of rollout, environments"),
    ],
)
def test_bad_sizes_are_refused(text: str, said: str) -> None:
    with pytest.raises(Refused) as refused:
        _size(text)
    assert said in str(refused.value)


def test_a_run_that_goes_on_keeps_the_size_unless_its_configuration_was_changed(
    tmp_path: Path,
) -> None:
    loaded = load("quickstart")
    assert loaded.config.rollout.engines == 1
    assert as_reached(loaded, tmp_path) == loaded
    sizes = Sizes({"rollout": Size(configured=1, asked=4, reached=3)})
    sizes.write(tmp_path)
    kept = as_reached(loaded, tmp_path)
    assert kept.config.rollout.engines == 3
    assert kept.origins["rollout.engines"] == "scale.json, 4 asked for"
    assert kept.config.environment == loaded.config.environment
    changed = load("quickstart", ["rollout.engines=2"])
    assert as_reached(changed, tmp_path).config.rollout.engines == 2
    assert Sizes.read(tmp_path).roles == {}, "forgotten"
    (tmp_path / SIZES).write_text(json.dumps({"roles": 3}))
    with pytest.raises(RunError, match=r"cannot be read .*remove it"):
        as_reached(loaded, tmp_path)


def test_what_was_not_reached_is_gone_on_with(tmp_path: Path) -> None:
    async def scenario() -> None:
        events = Events()
        pool = pool_of([engine(0), engine(1)], [worker(0)], events)
        await pool.start(manifest(0))
        Sizes({"rollout": Size(configured=1, asked=3, reached=2)}).write(tmp_path)
        watching = await _scaling(tmp_path, pool, events)
        await events.wait_for("actor_joined")
        assert [m.number for m in pool.members_of("rollout")] == [0, 1, 2]
        assert all(isinstance(m, Member) for m in pool.members_of("rollout"))
        watching.cancel()
        await pool.close()

    run(scenario())


def test_a_run_grows_shrinks_and_goes_on_with_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line, in one process; what is trained, and on which versions, is as if
    nothing had happened."""
    config = write_config(
        tmp_path, build_policy(tmp_path / "model"), environment="Chatty", steps=60, max_lag=1
    )
    options = f'environment.options={{folder = "{tmp_path}", pause_s = 0.05}}'
    more = (options, "rollout.concurrency=4")

    def scale(*sizes: str) -> str:
        assert main(["scale", str(driven.folder), *sizes]) == DONE, capsys.readouterr().err
        return capsys.readouterr().out

    with DrivenRun(config, *more) as driven:
        driven.wait("step 1", lambda: driven.steps() >= 1)
        assert "rollout 1 → 3: rollout 1, rollout 2 start" in scale("rollout=3", "environments=2")
        driven.wait("all to join", lambda: len(driven.events("actor_joined")) == 3)
        assert scale() == "rollout: 3 of 3 serve\nenvironments: 2 of 2 serve\n"
        step = driven.steps()
        driven.wait("two more steps", lambda: driven.steps() > step + 2)
        assert main(["scale", str(driven.folder), "rollout=1e3"]) == REFUSED
        assert "rollout 3 → 2: rollout 2 leave" in scale("rollout=2")
        driven.wait("one to leave", lambda: bool(driven.events("actor_left")))
        step = driven.steps()
        driven.wait("another step", lambda: driven.steps() > step + 1)
        os.kill(driven.process.pid, signal.SIGTERM)
        assert driven.finish() == STOPPED, driven.errors()
        reached = driven.steps()
    with DrivenRun(config, *more, f"run.steps={reached + 2}", resume=True) as driven:
        assert driven.finish() == DONE, driven.errors()
    assert "engines = 2" in (driven.folder / "config.toml").read_text()
    served = [e["actor"] for e in driven.events("actor_up") if e["actor"].startswith("rollout")]
    assert served == ["rollout 0", "rollout 1", "rollout 2", "rollout 0", "rollout 1"]
    assert driven.events("actor_lost") == [] and driven.summary()["restarts"] == 0
    assert driven.summary()["lag"]["max"] <= 1
    found = audit(driven.folder / "ledger" / FILE)
    assert (found.unused, found.twice, found.unknown) == ((), (), ())
    assert found.trained == (reached + 2) * 12
    assert main(["scale", str(driven.folder), "rollout=2"]) == REFUSED
    assert "the run is complete" in capsys.readouterr().err
