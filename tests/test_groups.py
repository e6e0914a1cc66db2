"""Groups of tickets over scripted actors: cut, redrawn, and the same again after a crash."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopwright.actors.env_worker import Cut, EpisodeOrder
from loopwright.algorithms.admission import Schedule
from loopwright.algorithms.batching import build_batch
from loopwright.algorithms.records import Context, EndReason, Group, Outcome, Rollout, encode
from loopwright.envs.protocol import Task, TaskError, decode_task
from loopwright.orchestrator.buffer import GroupBuffer
from loopwright.orchestrator.groups import DRAW_STRIDE, Groups
from loopwright.orchestrator.ledger import Ledger, audit
from loopwright.orchestrator.recorder import Recorder
from loopwright.orchestrator.tasks import DRAWS, TaskStream
from tests.scripted_pool import LIMITS, Events, engine, manifest, pool_of, run, worker

K = 6


class Quiet:
    """A tracker that keeps nothing."""

    def log(self, step: int, metrics: Any) -> None:
        """Not kept."""

    def event(self, kind: str, **fields: Any) -> None:
        """Not kept."""

    def span(self, name: str, seconds: float, **attributes: Any) -> None:
        """Not wanted."""

    def phase(self, text: str) -> None:
        """Not kept."""

    def progress(self, text: str, done: int, total: int) -> None:
        """Not kept."""


@dataclass
class Numbers:
    """Tasks 0, 1, 2, …; `count` of them, then again from the first."""

    count: int = 10_000

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """Named by their number."""
        for number in range(self.count):
            yield Task(environment="n", id=str(number), seed=number, split=split, scenario="s")


def rollout(order: EpisodeOrder, reward: float, *, tokens: int = 1, fault: str = "") -> bytes:
    """The episode ordered, with this reward."""
    size = tokens + 1
    context = Context(
        token_ids=np.zeros(size, np.int32),
        action_mask=np.arange(size) > 0,
        behavior_logprobs=np.zeros(size, np.float32),
        policy_versions=np.where(np.arange(size) > 0, 0, -1).astype(np.int32),
        turn_ids=np.where(np.arange(size) > 0, 0, -1).astype(np.int16),
    )
    return encode(
        Rollout(
            task_id=decode_task(order.task).id,
            environment="n",
            environment_version="1",
            scenario="s",
            attempt=order.attempt,
            contexts=() if fault else (context,),
            reward=reward,
            success=False,
            end_reason=EndReason.ERROR if fault else EndReason.DONE,
            outcome=Outcome.INFRA_FAULT if fault else Outcome.SCORED,
            turns=1,
            fault=fault,
        )
    )


@dataclass
class Stage:
    """Groups over a scripted worker, and what was played on it."""

    folder: Path
    play: Callable[[EpisodeOrder], Any]
    schedule: Schedule = field(
        default_factory=lambda: Schedule(groups_per_step=1, max_lag=0, group_size=K)
    )
    draws: int = 1
    source: Numbers = field(default_factory=Numbers)
    played: list[tuple[str, int]] = field(default_factory=list)
    late: dict[str, asyncio.Event] = field(default_factory=dict)

    async def open(self) -> Groups:
        """Everything up; the ledger of `folder` as it is."""

        async def play(order: EpisodeOrder) -> Any:
            self.played.append((decode_task(order.task).id, order.attempt))
            answer = self.play(order)
            if answer != "late":
                return answer
            self.late[order.key] = asyncio.Event()
            await self.late[order.key].wait()
            return Cut(turns=1, tokens=40, seconds=2.0)

        def take_back(key: str) -> Cut:
            self.late[key].set()
            return Cut(turns=1, tokens=40, seconds=2.0)

        pool = pool_of([engine()], [worker(0, play, take_back=take_back)], Events(), retries=0)
        await pool.start(manifest(0))
        return Groups(
            group_size=K,
            least=2,
            seed=0,
            limits=LIMITS,
            stream=TaskStream(self.source, "train", 0, draws=self.draws),
            buffer=GroupBuffer(self.schedule),
            pool=pool,
            ledger=Ledger(self.folder),
            recorder=Recorder(Quiet()),
        )


async def play_and_take(groups: Groups) -> Group:
    """One ticket's group, while the trainer waits for it."""
    taking = asyncio.create_task(groups.buffer.take(timeout_s=10))
    group = await groups.play(await groups.buffer.admit())
    await groups.buffer.fulfil(group)
    assert [g.ticket for g in await taking] == [group.ticket]
    return group


def attempts(group: Group) -> list[int]:
    """Which rollouts are in it."""
    return [r.attempt for r in group.rollouts]


CUT = Schedule(groups_per_step=1, max_lag=0, group_size=K, cut=0.5, cut_group=0.75)


class TestCut:
    """A step goes on without its stragglers."""

    def test_stragglers_are_taken_back_and_on_record(self, tmp_path: Path) -> None:
        def plays(order: EpisodeOrder) -> Any:
            return "late" if order.attempt in (1, 4) else rollout(order, float(order.attempt))

        async def scenario() -> None:
            groups = await Stage(tmp_path, plays, CUT).open()
            group = await play_and_take(groups)
            assert attempts(group) == [0, 2, 3, 5], "4 of 6; nobody is scored 0 for being late"
            unused = groups.unused([group])
            assert [(c.ticket, c.attempt, c.tokens, c.turns) for c in unused.cancelled] == [
                (0, 1, 40, 1),
                (0, 4, 40, 1),
            ]
            assert unused.cancelled_tokens_mean == 40
            groups.ledger.step(1, [0], [(0, k) for k in attempts(group)], 7)
            groups.ledger.close()
            found = audit(groups.ledger.path)
            assert (found.trained, found.cancelled, found.unused) == (4, 2, ())

        run(scenario())

    def test_nobody_is_cut_while_nobody_waits(self, tmp_path: Path) -> None:
        stage = Stage(tmp_path, lambda o: "late" if o.attempt == 1 else rollout(o, 1.0), CUT)

        async def scenario() -> None:
            groups = await stage.open()
            playing = asyncio.create_task(groups.play(await groups.buffer.admit()))
            for _ in range(200):
                await asyncio.sleep(0)
            assert not playing.done() and len(stage.played) == K
            taking = asyncio.create_task(groups.buffer.take(timeout_s=10))
            group = await playing
            assert attempts(group) == [0, 2, 3, 4, 5]
            await groups.buffer.fulfil(group)
            await taking

        run(scenario())

    def test_a_resumed_run_trains_the_same_and_plays_nothing(self, tmp_path: Path) -> None:
        def plays(order: EpisodeOrder) -> Any:
            return "late" if order.attempt in (0, 2) else rollout(order, 1.0)

        async def scenario() -> None:
            groups = await Stage(tmp_path, plays, CUT).open()
            before = await play_and_take(groups)
            groups.ledger.close()
            stage = Stage(tmp_path, lambda order: rollout(order, 0.5), CUT)
            again = await (await stage.open()).play(0)
            assert attempts(again) == attempts(before) == [1, 3, 4, 5]
            assert not stage.played

        run(scenario())

    def test_after_a_crash_in_between_what_was_taken_back_stays_so(self, tmp_path: Path) -> None:
        """The ledger ends before the group's end: rollout 5 was not in yet, 0 was taken back."""

        def plays(order: EpisodeOrder) -> Any:
            return "late" if order.attempt == 0 else rollout(order, 1.0)

        async def scenario() -> None:
            groups = await Stage(tmp_path / "first", plays, CUT).open()
            await play_and_take(groups)
            groups.ledger.close()
            written = Ledger(tmp_path / "first").state
            ledger = Ledger(tmp_path / "second")
            for attempt in range(1, 5):
                ledger.rollout(0, written.rollouts[0][attempt])
            ledger.cancelled(written.cancelled[0][0])
            ledger.close()
            stage = Stage(tmp_path / "second", lambda order: rollout(order, 1.0), CUT)
            groups = await stage.open()
            group = await groups.play(await groups.buffer.admit())
            assert stage.played == [("0", 5)]
            assert attempts(group) == [1, 2, 3, 4, 5]

        run(scenario())


class TestDynamicSampling:
    """A task whose rollouts all earn the same is replaced, twice at most."""

    def test_a_group_without_variance_is_replaced(self, tmp_path: Path) -> None:
        boring = {"0", "1", "2"}

        def plays(order: EpisodeOrder) -> bytes:
            task = decode_task(order.task).id
            first = order.attempt < DRAW_STRIDE
            return rollout(order, 1.0 if first else order.attempt % 2, tokens=2 + (task in boring))

        async def scenario() -> None:
            stage = Stage(tmp_path, plays, draws=DRAWS)
            groups = await stage.open()
            group = await play_and_take(groups)
            assert attempts(group) == [DRAW_STRIDE + k for k in range(K)]
            tasks = list(dict.fromkeys(task for task, _ in stage.played))
            assert len(tasks) == 2 and set(tasks) <= boring, "of the ticket's own three"
            unused = groups.unused([group])
            assert (unused.discarded_groups, unused.discarded_rollouts) == (1, K)
            assert (unused.discarded_tokens, unused.draws_spent) == (3 * K, 0)

        run(scenario())

    def test_it_gives_up_and_says_so(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            stage = Stage(tmp_path, lambda order: rollout(order, 0.0), draws=DRAWS)
            groups = await stage.open()
            group = await play_and_take(groups)
            assert len(stage.played) == DRAWS * K and len(group.rollouts) == K
            unused = groups.unused([group])
            assert (unused.discarded_groups, unused.draws_spent) == (DRAWS - 1, 1)

        run(scenario())

    def test_a_resumed_run_goes_on_with_the_replacement(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            first = await Stage(tmp_path, lambda o: rollout(o, 0.0), draws=DRAWS).open()
            first.ledger.discarded(0, list(range(K)), "all rewards are equal")
            first.ledger.close()
            stage = Stage(tmp_path, lambda o: rollout(o, o.attempt % 2), draws=DRAWS)
            group = await play_and_take(await stage.open())
            assert attempts(group) == [DRAW_STRIDE + k for k in range(K)]
            assert {attempt // DRAW_STRIDE for _, attempt in stage.played} == {1}

        run(scenario())

    def test_a_cut_ticket_is_not_redrawn(self, tmp_path: Path) -> None:
        """The trainer waits already: it gets what is in, without variance as it is."""

        def plays(order: EpisodeOrder) -> Any:
            return "late" if order.attempt == 3 else rollout(order, 1.0)

        async def scenario() -> None:
            stage = Stage(tmp_path, plays, CUT, draws=DRAWS)
            group = await play_and_take(await stage.open())
            assert attempts(group) == [0, 1, 2, 4, 5] and len(stage.played) == K

        run(scenario())

    def test_every_task_is_drawn_first_by_some_ticket(self) -> None:
        """Also where the source is finite and its size a multiple of the draws."""
        stream = TaskStream(Numbers(12), "train", 0, draws=DRAWS)
        first = {stream.of(ticket).id for ticket in range(40)}
        assert first == {str(n) for n in range(12)}
        for ticket in range(40):
            assert len({stream.of(ticket, d).id for d in range(DRAWS)}) == DRAWS

    def test_without_draws_a_ticket_is_its_task(self) -> None:
        stream = TaskStream(Numbers(), "train", 0)
        assert [stream.of(ticket).id for ticket in range(5)] == ["0", "1", "2", "3", "4"]


def test_unequal_groups_are_whole_groups(tmp_path: Path) -> None:
    """Infra faults are missing from a group, which keeps its order and is not void with two."""

    def plays(order: EpisodeOrder) -> bytes:
        return rollout(order, 1.0, fault="" if order.attempt in (1, 4) else "world: KeyError")

    async def scenario() -> None:
        group = await play_and_take(await Stage(tmp_path, plays).open())
        assert attempts(group) == [1, 4]

    run(scenario())


def test_groups_of_unequal_size_keep_their_own_baselines(tmp_path: Path) -> None:
    """A cut group of 4 beside a whole one of 6: each rollout against the others of its own task,
    and the loss divided by the 10 that are there."""

    def plays(order: EpisodeOrder) -> Any:
        first = decode_task(order.task).id == "0"
        late = first and order.attempt in (1, 4)
        return "late" if late else rollout(order, float(order.attempt), tokens=1 + order.attempt)

    async def scenario() -> None:
        schedule = Schedule(groups_per_step=2, max_lag=0, group_size=K, cut=0.7, cut_group=0.6)
        groups = await Stage(tmp_path, plays, schedule).open()
        taking = asyncio.create_task(groups.buffer.take(timeout_s=10))

        async def one() -> None:
            await groups.buffer.fulfil(await groups.play(await groups.buffer.admit()))

        await asyncio.gather(one(), one())
        batch, report = build_batch(await taking, 1)
        assert (report.groups, report.rollouts, batch.rollout_count) == (2, 10, 10)
        cut, whole = np.array([0, 2, 3, 5.0]), np.arange(6.0)
        expected = [(r - (g.sum() - r) / (len(g) - 1)) for g in (cut, whole) for r in g]
        kept = [i for i, value in enumerate(expected) if abs(value) >= 0.01]
        assert batch.rollout_ids.tolist() == kept
        np.testing.assert_allclose(batch.advantages, np.array(expected)[kept], rtol=1e-6)
        tokens = [1 + int(r) for g in (cut, whole) for r in g]
        assert batch.lengths.tolist() == [tokens[i] + 1 for i in kept]

    run(scenario())


@pytest.mark.parametrize(
    ("good", "why"), [(1, "1 of 6 rollouts scored"), (0, "0 of 6 rollouts scored")]
)
def test_fewer_than_two_make_a_void_group(tmp_path: Path, good: int, why: str) -> None:
    def plays(order: EpisodeOrder) -> bytes:
        return rollout(order, 1.0, fault="" if order.attempt < good else "world: KeyError")

    async def scenario() -> None:
        groups = await Stage(tmp_path, plays).open()
        assert attempts(await play_and_take(groups)) == []
        assert why in groups.ledger.state.voids[0]

    run(scenario())


def test_a_broken_task_voids_its_ticket(tmp_path: Path) -> None:
    async def scenario() -> None:
        groups = await Stage(tmp_path, lambda _: TaskError("no such world")).open()
        assert attempts(await play_and_take(groups)) == []
        assert groups.ledger.state.voids == {0: "task quarantined: no such world"}

    run(scenario())
