"""Who is stuck, and where: real processes that are stopped, blocked or gone, looked at from
outside."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from loopwright.orchestrator.faults import ActorLost, DeadlinePassed
from loopwright.orchestrator.inspection import (
    Effort,
    Home,
    _stat,
    effort,
    home,
    lives_here,
    look,
)
from loopwright.orchestrator.processes import Actor
from loopwright.orchestrator.watchdog import Watchdog

PROGRAM = """
import sys, threading
def waits_for_godot(event):
    print("up", flush=True)
    {}
waits_for_godot(threading.Event())
"""


@contextlib.contextmanager
def waiting_process(how: str = "event.wait()") -> Iterator[Home]:
    """A Python process that hangs in `waits_for_godot`, or does something else there."""
    command = [sys.executable, "-c", PROGRAM.format(how)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        yield replace(home(), pid=process.pid, begun=_stat(process.pid)[1])
    finally:
        process.kill()
        process.wait()


@dataclass(slots=True)
class StuckActor:
    """An actor whose process is `where`. It answers while `answers` has the method; else never."""

    where: Home
    answers: dict[str, Any] = field(default_factory=dict)
    name: str = "trainer"
    calls: list[str] = field(default_factory=list)

    async def call(self, method: str, *args: Any, timeout_s: float, waiting_for: str) -> Any:
        """The answer, or the deadline."""
        self.calls.append(method)
        answer = self.answers.get(method, asyncio.Event().wait)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer()
        except TimeoutError:
            text = f"{self.name}: {waiting_for}: no answer within {timeout_s:g} s"
            raise DeadlinePassed(text) from None

    async def lacks(self) -> str:
        """It has its place."""
        return ""

    async def home(self, *, timeout_s: float) -> Home:
        """As given."""
        return self.where

    async def restart(self) -> None:
        """Never asked for here."""
        raise AssertionError("restart")

    def end(self) -> None:
        """Never asked for here."""
        raise AssertionError("end")

    def generate_client(self) -> Any:
        """Never asked for here."""
        raise AssertionError("generate_client")


async def at_once() -> dict[str, float]:
    """An answer."""
    return {"pid": 1.0}


def watched(
    actor: StuckActor, *, pinged: bool = False, hang_s: float = 0.2
) -> tuple[Actor, Watchdog, list[dict[str, Any]]]:
    """The actor under a watchdog, and the events of that."""
    events: list[dict[str, Any]] = []
    watchdog = Watchdog(
        lambda kind, **fields: events.append({"kind": kind, **fields}),
        ping_every_s=0.02,
        hang_s=hang_s,
    )
    return watchdog.watch(actor, pinged=pinged), watchdog, events


def run(test: Coroutine[Any, Any, None]) -> None:
    """A test's coroutine, with an end."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test

    asyncio.run(bounded())


def test_the_stack_of_a_stopped_process_is_read() -> None:
    with waiting_process() as where:
        os.kill(where.pid, signal.SIGSTOP)
        os.waitpid(where.pid, os.WUNTRACED)
        seen = look(where)
        assert seen.state == "stopped by a signal"
        assert any("waits_for_godot" in line for line in seen.stack)
        assert "stopped by a signal, in " in str(seen)
        assert lives_here(where)
    assert not lives_here(where)
    assert look(where).why_not == f"process {where.pid} has ended"


def test_why_there_is_no_stack(tmp_path: Path) -> None:
    with waiting_process() as where:
        elsewhere = look(replace(where, host="node-7"))
        assert "it runs on node-7" in str(elsewhere) and f"--pid {where.pid}" in str(elsewhere)
        assert not lives_here(replace(where, host="node-7"))
        refusing = tmp_path / "py-spy"
        refusing.write_text("#!/bin/sh\necho 'Error: Permission denied (os error 13)' >&2; exit 1")
        refusing.chmod(0o755)
        seen = look(where, py_spy=str(refusing))
        assert seen.state in ("sleeping", "running")
        assert "Permission denied" in seen.why_not and "SYS_PTRACE" in seen.why_not
        assert "No such file" in look(where, py_spy=str(tmp_path / "none")).why_not


def test_this_process_is_seen_too() -> None:
    assert any("test_this_process_is_seen_too" in line for line in look(home()).stack)


def test_a_process_number_used_again_is_another_process() -> None:
    with waiting_process() as where:
        assert not lives_here(replace(where, begun=where.begun - 1))
        assert look(replace(where, begun=where.begun - 1)).state == "dead"


def test_a_passed_deadline_tells_who_what_was_heard_last_and_where_it_stands() -> None:
    async def scenario(where: Home) -> None:
        actor, watchdog, events = watched(StuckActor(where, {"load": at_once}))
        watchdog.event("actor_up", actor="trainer", pid=where.pid)
        await actor.call("load", timeout_s=5, waiting_for="load of step 3")
        calls = [actor.call("step", timeout_s=0.05, waiting_for=f"step {n}") for n in range(3)]
        errors = await asyncio.gather(*calls, return_exceptions=True)
        for error in errors:
            assert isinstance(error, DeadlinePassed)
            for part in ("no answer within", "load of step 3", f"process {where.pid}", "godot"):
                assert part in str(error)
        (up, stuck) = events
        assert (up["kind"], stuck["kind"]) == ("actor_up", "actor_stuck"), "one look for all calls"
        assert stuck["actor"] == "trainer" and stuck["pid"] == where.pid
        assert stuck["waiting_for"].startswith("step ")
        assert stuck["last_event"].startswith("actor_up ")
        assert stuck["state"] in ("sleeping", "running")
        assert any("waits_for_godot" in line for line in stuck["stack"])
        assert "trainer" in stuck["text"] and "waits_for_godot" in stuck["text"]

    with waiting_process() as where:
        run(scenario(where))


def test_silence_during_a_long_call_is_found_before_its_deadline() -> None:
    async def scenario(where: Home) -> None:
        actor, _, events = watched(StuckActor(where, {"load": at_once}), pinged=True)
        await actor.call("load", timeout_s=5, waiting_for="load")
        with pytest.raises(DeadlinePassed, match=r"no answer within 0\.2 s") as caught:
            await actor.call("step", timeout_s=600, waiting_for="step 8")
        assert "sign of life during step 8" in str(caught.value)
        assert [e["kind"] for e in events] == ["actor_stuck"]

    with waiting_process() as where:
        run(scenario(where))


def test_one_that_is_too_busy_to_answer_is_not_stuck() -> None:
    """Holding Python's lock for long, it answers no ping, but it works: its call may go on."""

    async def scenario(where: Home) -> None:
        stuck = StuckActor(where, {"load": at_once})
        done = asyncio.Event()

        async def step() -> str:
            await done.wait()
            return "saved"

        stuck.answers["step"] = step
        actor, _, events = watched(stuck, pinged=True, hang_s=1.0)
        await actor.call("load", timeout_s=5, waiting_for="load")
        working = asyncio.create_task(actor.call("step", timeout_s=600, waiting_for="step 1"))
        while stuck.calls.count("ping") < 3:
            await asyncio.sleep(0.01)
            assert not working.done(), working.exception()
        done.set()
        assert await working == "saved" and events == []

    with waiting_process("while True: pass") as where:
        run(scenario(where))


def test_effort_tells_work_from_standing_still() -> None:
    with waiting_process("while True: pass") as where:
        before = after = effort(where)
        assert before is not None and after is not None
        while not after.busy_since(before, 1.0):
            after = effort(where)
            assert after is not None
        os.kill(where.pid, signal.SIGSTOP)
        os.waitpid(where.pid, os.WUNTRACED)
        stopped = effort(where)
        assert stopped is not None and not stopped.busy_since(stopped, 0.1)
        assert stopped == effort(where)
    assert effort(where) is None
    with waiting_process("open('/dev/zero', 'rb').read(16 << 20); event.wait()") as where:
        idle, found = Effort(cpu_s=1e9, io_bytes=0), effort(where)
        while found is not None and not found.busy_since(idle, 1.0):
            found = effort(where)
        assert found is not None, "so much was read"


def test_one_that_gives_signs_of_life_may_take_long() -> None:
    async def scenario() -> None:
        stuck = StuckActor(home(), {"ping": at_once})
        done = asyncio.Event()

        async def step() -> str:
            await done.wait()
            return "trained"

        stuck.answers["step"] = step
        actor, _, events = watched(stuck, pinged=True, hang_s=0.1)
        working = asyncio.create_task(actor.call("step", timeout_s=600, waiting_for="step 1"))
        while stuck.calls.count("ping") < 8:
            await asyncio.sleep(0)
        done.set()
        assert await working == "trained" and events == []

    run(scenario())


def test_a_ping_waits_longer_for_a_process_that_is_being_restarted() -> None:
    """One that ended is not stuck: the fresh one answers when it is up."""

    async def scenario(where: Home) -> None:
        late = asyncio.Event()

        async def ping() -> dict[str, float]:
            await late.wait()
            return {"pid": 2.0}

        stuck = StuckActor(where, {"load": at_once, "ping": ping})
        actor, _, events = watched(stuck, pinged=True, hang_s=0.05)
        await actor.call("load", timeout_s=5, waiting_for="load")
        asking = asyncio.create_task(actor.call("ping", timeout_s=20, waiting_for="step 2"))
        while stuck.calls.count("ping") < 2:
            await asyncio.sleep(0.001)
        late.set()
        assert (await asking)["pid"] == 2.0 and events == []

    with waiting_process() as where:
        pass
    run(scenario(where))


def test_a_death_during_a_call_is_the_calls_own_to_tell() -> None:
    async def scenario() -> None:
        died = asyncio.Event()

        async def lost() -> None:
            died.set()
            raise ActorLost("trainer: gone")

        async def step() -> None:
            await died.wait()
            raise ActorLost("trainer: died during step 1")

        actor, _, events = watched(StuckActor(home(), {"ping": lost, "step": step}), pinged=True)
        with pytest.raises(ActorLost, match="died during step 1"):
            await actor.call("step", timeout_s=600, waiting_for="step 1")
        assert events == []

    run(scenario())


def test_when_nothing_comes_back_from_anybody_the_longest_wait_is_named() -> None:
    async def scenario(where: Home) -> None:
        stuck = StuckActor(where, {"start": at_once}, name="environment worker 2")
        actor, watchdog, events = watched(stuck, hang_s=0.05)
        await actor.call("start", timeout_s=5, waiting_for="start")
        assert watchdog.longest() == ""
        waiting = asyncio.create_task(actor.call("play", timeout_s=600, waiting_for="episode 12"))
        watchdog.begin()
        while not events:
            await asyncio.sleep(0.01)
        assert "environment worker 2: episode 12, for" in watchdog.longest()
        await watchdog.close()
        waiting.cancel()
        (quiet, *_) = events
        assert (quiet["kind"], quiet["actor"]) == ("quiet", "environment worker 2")
        assert "episode 12" in quiet["text"] and "waits_for_godot" in quiet["text"]

    with waiting_process() as where:
        run(scenario(where))


def test_a_controller_that_stood_still_asks_again() -> None:
    """The deadline passed while nobody could keep it: that says nothing about the actor."""

    async def scenario() -> None:
        stuck = StuckActor(home())
        never_first = iter([asyncio.Event().wait, at_once])

        async def ping() -> Any:
            return await next(never_first)()

        stuck.answers["ping"] = ping
        actor, watchdog, events = watched(stuck, hang_s=0.2)
        watchdog.begin()
        await asyncio.sleep(0)
        asking = asyncio.create_task(actor.call("ping", timeout_s=0.2, waiting_for="sign of life"))
        await asyncio.sleep(0)
        time.sleep(0.3)
        assert await asking == {"pid": 1.0}
        while not events:
            await asyncio.sleep(0.01)
        await watchdog.close()
        assert events[0]["kind"] == "stood_still" and events[0]["seconds"] >= 0.3
        assert "actor_stuck" not in [e["kind"] for e in events]

    run(scenario())
