"""Several trainer processes as one actor: every call reaches all, one's loss is that of all."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from loopwright.orchestrator.faults import ActorLost, DeadlinePassed, RestartBudget
from loopwright.orchestrator.ranked_trainer import RankedTrainer
from loopwright.orchestrator.training import Training


@dataclass(slots=True)
class World:
    """What the ranks share: a step is an exchange, which nobody leaves before all have come."""

    size: int
    address: str = ""
    joined: set[int] = field(default_factory=set)
    waiting: dict[int, asyncio.Future[None]] = field(default_factory=dict)

    async def exchange(self, pid: int) -> None:
        """Wait for all others, or for ever."""
        assert len(self.joined) == self.size and pid in self.joined, "an exchange of strangers"
        self.waiting[pid] = asyncio.get_running_loop().create_future()
        if len(self.waiting) == self.size:
            for future in self.waiting.values():
                future.set_result(None)
            self.waiting = {}
        else:
            await self.waiting[pid]


@dataclass(slots=True)
class RankActor:
    """One rank, whose weights are the list of steps it was trained on. `faults` maps the n-th step
    that it is asked for to what happens then."""

    rank: int
    world: World
    faults: dict[int, Exception] = field(default_factory=dict)
    history: list[int] = field(default_factory=list)
    disk: dict[str, list[int]] = field(default_factory=dict)
    asked: int = 0
    lives: int = 1

    @property
    def name(self) -> str:
        """As in events."""
        return f"trainer rank {self.rank}"

    @property
    def pid(self) -> int:
        """Of this life."""
        return 1000 * self.rank + self.lives

    async def call(self, method: str, *args: Any, timeout_s: float, waiting_for: str) -> Any:
        """Do it, or fail at it."""
        if method == "ping":
            return {"step": float(len(self.history)), "pid": float(self.pid)}
        if method == "meet":
            self.world.address, self.world.joined = f"life {self.lives}", set()
            return self.world.address
        if method == "join":
            assert args[0] == self.world.address
            self.world.joined.add(self.pid)
        elif method == "step":
            await self._step(args[0], timeout_s)
        elif method == "reset":
            self.history = []
        elif method == "save":
            self.disk[Path(args[0]).name] = list(self.history)
        elif method == "load":
            self.history = list(self.disk[Path(args[0]).name])
        return (self.rank, method)

    async def _step(self, step: int, timeout_s: float) -> None:
        self.asked += 1
        fault = self.faults.get(self.asked)
        if isinstance(fault, ActorLost):
            self._die()
        if fault is not None:
            raise fault
        pid = self.pid
        try:
            await asyncio.wait_for(self.world.exchange(pid), timeout_s)
        except TimeoutError:
            raise DeadlinePassed(f"{self.name}: no answer") from None
        if pid != self.pid:
            raise ActorLost(f"{self.name}: killed in an exchange")
        assert step == len(self.history) + 1
        self.history.append(step)

    def _die(self) -> None:
        self.lives += 1
        self.history = []
        self.world.joined = set()
        self.world.waiting = {}

    async def restart(self) -> None:
        """Killed and back."""
        self._die()

    def end(self) -> None:
        """Never asked for here."""
        raise AssertionError("end")

    async def lacks(self) -> str:
        """It has its place."""
        return ""

    def generate_client(self) -> Any:
        """Never asked for here."""
        raise AssertionError("generate")


def ranked(
    count: int, faults: dict[int, dict[int, Exception]], events: list[Any] | None = None
) -> tuple[RankedTrainer, list[RankActor]]:
    """`count` ranks; `faults` by rank."""
    world = World(count)
    ranks = [RankActor(rank=r, world=world, faults=faults.get(r, {})) for r in range(count)]
    seen = events if events is not None else []
    trainer = RankedTrainer(
        ranks,
        join_s=5,
        exchange_s=5,
        event=lambda kind, **fields: seen.append((kind, fields)),
        grace_s=0.05,
    )
    return trainer, ranks


def run(test: Coroutine[Any, Any, None]) -> None:
    """A test's coroutine, with an end."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test

    asyncio.run(bounded())


DIED, HUNG = ActorLost("died"), DeadlinePassed("silence")
BROKEN = RuntimeError("Connection closed by peer")
FAULTS: dict[str, dict[int, dict[int, Exception]]] = {
    "none": {},
    "rank 0 dies": {0: {3: DIED}},
    "rank 1 dies, the other waits": {1: {3: DIED}},
    "rank 1 dies, the other notices first": {1: {3: DIED}, 0: {3: BROKEN}},
    "rank 1 hangs": {1: {3: HUNG}},
    "an exchange breaks off": {0: {4: BROKEN}, 1: {4: BROKEN}, 2: {4: BROKEN}},
    "twice": {0: {2: DIED}, 2: {4: DIED}},
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_whatever_dies_every_rank_has_every_step_once(
    faults: dict[int, dict[int, Exception]], tmp_path: Path
) -> None:
    async def scenario() -> None:
        events: list[Any] = []
        trainer, ranks = ranked(3, faults, events)
        training = Training(
            trainer,
            initial="model",
            start_s=5,
            step_s=0.5,
            restarts=RestartBudget(3),
            event=lambda kind, **fields: events.append((kind, fields)),
        )
        await training.start(None)
        for step in range(1, 6):
            await training.step(step, b"")
            if step == 2:
                await training.save(tmp_path / "step-2", step)
                training.saved(tmp_path / "step-2", step)
        assert [rank.history for rank in ranks] == [[1, 2, 3, 4, 5]] * 3
        lost = len({step for by_step in faults.values() for step in by_step})
        assert [kind for kind, _ in events].count("actor_lost") == lost
        met = [fields["pids"] for kind, fields in events if kind == "ranks_met"]
        assert len(met) == lost + 1
        assert len({pid for pids in met for pid in pids}) == 3 * len(met), "all restart, or none"

    run(scenario())


def test_the_answer_is_rank_0s_and_some_calls_are_its_alone() -> None:
    async def scenario() -> None:
        trainer, _ = ranked(3, {})
        await trainer.call("ping", timeout_s=5, waiting_for="ping")
        assert await trainer.call("reset", "m", timeout_s=5, waiting_for="") == (0, "reset")
        assert await trainer.call("resend", 1, timeout_s=5, waiting_for="") == (0, "resend")

    run(scenario())


def test_an_error_of_one_rank_is_raised_as_it_is_and_nobody_waits_for_ever() -> None:
    async def scenario() -> None:
        trainer, ranks = ranked(2, {1: {1: ValueError("the disk is full")}})
        await trainer.call("ping", timeout_s=5, waiting_for="ping")
        with pytest.raises(ValueError, match="the disk is full"):
            await trainer.call("step", 1, b"", timeout_s=5, waiting_for="step 1")
        assert [rank.lives for rank in ranks] == [2, 2], "the other was waiting in an exchange"

    run(scenario())


def test_a_rank_restarted_behind_our_back_is_noticed() -> None:
    async def scenario() -> None:
        trainer, ranks = ranked(2, {})
        await trainer.call("ping", timeout_s=5, waiting_for="ping")
        ranks[1]._die()
        with pytest.raises(ActorLost, match="a rank was restarted"):
            await trainer.call("ping", timeout_s=5, waiting_for="ping")
        await trainer.call("ping", timeout_s=5, waiting_for="ping")
        assert [rank.lives for rank in ranks] == [2, 2]
        await trainer.call("step", 1, b"", timeout_s=5, waiting_for="step 1")

    run(scenario())
