"""`loopwright scale`: sizes asked for through the run's folder, and kept by runs that go on."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from loopwright.configs.load import load
from loopwright.orchestrator.cli import DONE, REFUSED, STOPPED, main
from loopwright.orchestrator.faults import Refused, RunError
from loopwright.orchestrator.ledger import FILE, audit
from loopwright.orchestrator.members import Member
from loopwright.orchestrator.pool import Pool
from loopwright.orchestrator.processes import Actor
from loopwright.orchestrator.scale_command import _size, ask
from loopwright.orchestrator.scaling import REQUEST, SIZES, Scaling, Size, Sizes, as_reached
from tests.driven_run import DrivenRun, build_policy, write_config
from tests.scripted_pool import (
    Events,
    engine,
    manifest,
    pool_of,
    run,
    worker,
)


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
                "rollout 1 → 3, joining: rollout 1, rollout 2; each serves once it has proven "
                "version 4 or a later one"
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
                "rollout 3 → 1, leaving: rollout 2, rollout 1; their 0 episodes go on on the "
                "others, from the tokens they have",
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
            assert len(pool.membership.members_of("environments")) == 1, "all of it or nothing"
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
            assert len(pool.membership.members_of("rollout")) == 1 and not watching.done()
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
        assert [m.number for m in pool.membership.members_of("rollout")] == [0, 1, 2]
        assert all(isinstance(m, Member) for m in pool.membership.members_of("rollout"))
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
        assert "rollout 1 → 3, joining: rollout 1, rollout 2;" in scale(
            "rollout=3", "environments=2"
        )
        driven.wait("all to join", lambda: len(driven.events("actor_joined")) == 3)
        assert scale() == "rollout: 3 of 3 serve\nenvironments: 2 of 2 serve\n"
        step = driven.steps()
        driven.wait("two more steps", lambda: driven.steps() > step + 2)
        assert main(["scale", str(driven.folder), "rollout=1e3"]) == REFUSED
        assert "rollout 3 → 2, leaving: rollout 2;" in scale("rollout=2")
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
    assert served[0] == "rollout 0" and sorted(served[1:3]) == ["rollout 1", "rollout 2"]
    assert sorted(served[3:]) == ["rollout 0", "rollout 1"]
    assert driven.events("actor_lost") == [] and driven.summary()["restarts"] == 0
    assert driven.summary()["lag"]["max"] <= 1
    found = audit(driven.folder / "ledger" / FILE)
    assert (found.unused, found.twice, found.unknown) == ((), (), ())
    assert found.trained == (reached + 2) * 12
    assert main(["scale", str(driven.folder), "rollout=2"]) == REFUSED
    assert "the run is complete" in capsys.readouterr().err
