"""The group of a ticket: which task it plays, its rollouts, and what becomes of those that are not
needed.

Everything is on record before it counts: a rollout when it arrives, an episode that was taken back,
a group that was replaced, and last the group itself. A group on record stays as it is, so that a
step which is taken again after a crash trains the same.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from loopwright.actors.episode import EpisodeLimits
from loopwright.algorithms.records import Group, Outcome, Rollout, decode
from loopwright.algorithms.unused import Cancelled, Unused
from loopwright.envs.protocol import Task, TaskError, encode_task
from loopwright.orchestrator.buffer import GroupBuffer
from loopwright.orchestrator.ledger import Ledger
from loopwright.orchestrator.pool import Pool, episode_seed
from loopwright.orchestrator.recorder import Recorder
from loopwright.orchestrator.seating import EpisodeTakenBack
from loopwright.orchestrator.tasks import Played, TaskStream

DRAW_STRIDE = 1000  # attempt 1003 is rollout 3 of a ticket's second task


@dataclass(slots=True, kw_only=True)
class Groups:
    """Plays the groups of tickets."""

    group_size: int
    least: int  # rollouts without which there is no baseline
    seed: int
    limits: EpisodeLimits
    stream: TaskStream
    buffer: GroupBuffer
    pool: Pool
    ledger: Ledger
    recorder: Recorder

    async def play(self, ticket: int) -> Group:
        """The ticket's group, as whole as it gets. What is on record from before a crash is not
        played again."""
        state = self.ledger.state
        draws = self.stream.draws
        made = self._draws_made(ticket)
        played = [self._played(ticket, draw) for draw in range(made)]
        for draw in range(made, draws):
            task = self.stream.of(ticket, draw)
            attempts = [draw * DRAW_STRIDE + k for k in range(self.group_size)]
            if ticket in state.groups:
                rollouts = self._on_record(ticket, draw)
                return _group(ticket, task, rollouts, state.voids.get(ticket, ""))
            rollouts, broken = await self._rollouts(ticket, task, attempts)
            void = _why_void(rollouts, broken, self.least)
            if void or draw == draws - 1 or varies(rollouts) or self.buffer.is_cut(ticket):
                break
            self.ledger.discarded(ticket, [r.attempt for r in rollouts], "all rewards are equal")
            played.append(self._played(ticket, draw))
            await self.buffer.redrawn(ticket)
        group = _group(ticket, task, rollouts, void)
        passed = tuple(r.success for r in group.rollouts)
        played.append(Played(task_id=task.id, passed=passed))
        self.ledger.group(ticket, encode_task(task), void, played)
        if void:
            kind = "task_quarantined" if broken else "group_void"
            self.recorder.event(kind, task=task.id, why=void)
        return group

    def unused(self, groups: Sequence[Group]) -> Unused:
        """What the tickets of a step's groups sampled beside what is in the groups."""
        state = self.ledger.state
        rollouts = [r for g in groups for r in g.rollouts]
        discarded = [
            decode(state.rollouts[g.ticket][attempt])
            for g in groups
            for attempt in sorted(state.discarded.get(g.ticket, ()))
        ]
        return Unused(
            cancelled=tuple(
                c for g in groups for _, c in sorted(state.cancelled.get(g.ticket, {}).items())
            ),
            discarded_groups=len({(r.task_id, r.attempt // DRAW_STRIDE) for r in discarded}),
            discarded_rollouts=len(discarded),
            discarded_tokens=sum(r.generated_tokens for r in discarded),
            draws_spent=sum(
                self.stream.draws > 1 and len(g.rollouts) > 1 and not varies(g.rollouts)
                for g in groups
            ),
            resumed_rollouts=sum(r.saved_tokens > 0 for r in rollouts),
            saved_tokens=sum(r.saved_tokens for r in rollouts),
        )

    def _played(self, ticket: int, draw: int) -> Played:
        """How a group went that was replaced, from what is on record."""
        known = self.ledger.state.rollouts[ticket]
        attempts = range(draw * DRAW_STRIDE, draw * DRAW_STRIDE + self.group_size)
        found = [decode(known[k]) for k in attempts if k in known]
        passed = tuple(r.success for r in found if r.outcome is not Outcome.INFRA_FAULT)
        return Played(task_id=self.stream.of(ticket, draw).id, passed=passed)

    def _on_record(self, ticket: int, draw: int) -> list[Rollout]:
        """What the ledger has of a ticket's task number `draw`, whatever the group size was."""
        known = self.ledger.state.rollouts.get(ticket, {})
        return [decode(known[k]) for k in sorted(known) if k // DRAW_STRIDE == draw]

    def _draws_made(self, ticket: int) -> int:
        """How many tasks of the ticket were played and replaced before a crash."""
        discarded = self.ledger.state.discarded.get(ticket, set())
        return max((attempt // DRAW_STRIDE + 1 for attempt in discarded), default=0)

    async def _rollouts(
        self, ticket: int, task: Task, attempts: Sequence[int]
    ) -> tuple[list[Rollout], list[TaskError]]:
        """All that come in of one task before the cut; infra faults are among them."""
        known = self.ledger.state.rollouts.get(ticket, {})
        taken_back = self.ledger.state.cancelled.get(ticket, {})
        found = self._on_record(ticket, attempts[0] // DRAW_STRIDE)
        for rollout in found:
            await self._arrived(ticket, rollout)
        missing = [k for k in attempts if k not in known and k not in taken_back]
        async with self._cut_of(ticket) as cut:
            played = await asyncio.gather(
                *(self._play(task, ticket, k, cut) for k in missing), return_exceptions=True
            )
        broken: list[TaskError] = []
        for one in played:
            if isinstance(one, TaskError):
                broken.append(one)
            elif isinstance(one, BaseException):
                raise one
            elif one is not None:
                found.append(one)
        return sorted(found, key=lambda r: r.attempt), broken

    @contextlib.asynccontextmanager
    async def _cut_of(self, ticket: int) -> AsyncIterator[asyncio.Event | None]:
        """Set once the ticket's step goes on without what is missing; None where nothing is cut."""
        if self.buffer.schedule.cut == 1:
            yield None
            return
        cut = asyncio.Event()

        async def watch() -> None:
            await self.buffer.until_cut(ticket)
            cut.set()

        watching = asyncio.create_task(watch())
        try:
            yield cut
        finally:
            watching.cancel()

    async def _play(
        self, task: Task, ticket: int, attempt: int, cut: asyncio.Event | None
    ) -> Rollout | None:
        """One rollout, on record; None if it was taken back, which is on record too."""
        try:
            rollout, encoded = await self.pool.play(
                task,
                attempt,
                seed=episode_seed(self.seed + ticket, task, attempt),
                priority=ticket,
                limits=self.limits,
                take_back=cut,
            )
        except EpisodeTakenBack as taken:
            self.ledger.cancelled(
                Cancelled(
                    ticket=ticket,
                    attempt=attempt,
                    turns=taken.cut.turns,
                    tokens=taken.cut.tokens,
                    seconds=taken.cut.seconds,
                )
            )
            return None
        self.ledger.rollout(ticket, encoded)
        self.recorder.played(rollout)
        await self._arrived(ticket, rollout)
        return rollout

    async def _arrived(self, ticket: int, rollout: Rollout) -> None:
        if self.buffer.schedule.cut < 1 and rollout.outcome is not Outcome.INFRA_FAULT:
            await self.buffer.arrived(ticket)


def varies(rollouts: Sequence[Rollout]) -> bool:
    """Whether these rollouts of one task can teach anything: their rewards differ."""
    rewards = {r.reward for r in rollouts if r.outcome is not Outcome.INFRA_FAULT}
    return len(rewards) > 1


def _group(ticket: int, task: Task, rollouts: Sequence[Rollout], void: str) -> Group:
    used = [] if void else [r for r in rollouts if r.outcome is not Outcome.INFRA_FAULT]
    return Group(ticket=ticket, task_id=task.id, rollouts=tuple(used))


def _why_void(rollouts: Sequence[Rollout], broken: Sequence[BaseException], least: int) -> str:
    """Why no group comes of these rollouts; empty if one does: at least `least` have a baseline."""
    if broken:
        return f"task quarantined: {broken[0]}"
    scored = [r for r in rollouts if r.outcome is not Outcome.INFRA_FAULT]
    if len(scored) >= least:
        return ""
    faults = [r.fault for r in rollouts if r.fault]
    last = faults[-1] if faults else "none"
    return f"{len(scored)} of {len(rollouts)} rollouts scored; the last fault: {last}"
