"""The group buffer: tickets, the groups fulfilled under them, and who waits for whom.

The rules are in `algorithms/admission.py`: which ticket may be admitted, which tickets make the
next step, whom a step no longer waits for. Here they get an event loop, deadlines, and the check
that no rollout is older than the bound allows. Nothing here knows actors or Ray.
"""

import asyncio
from collections.abc import Collection, Mapping

from loopwright.algorithms.admission import Admission, Schedule
from loopwright.algorithms.records import Group
from loopwright.orchestrator.faults import DeadlinePassed, RunError


class LagExceeded(RunError):
    """A rollout is older than the bound allows: a defect, never a matter of configuration."""


class GroupBuffer:
    """Admits tickets, keeps fulfilled groups, hands them out oldest first."""

    def __init__(
        self,
        schedule: Schedule,
        *,
        version: int = 0,
        consumed: Collection[int] | None = None,
        planned: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.schedule = schedule
        self._admission = Admission(schedule, version=version, consumed=consumed, planned=planned)
        self._groups: dict[int, Group] = {}
        self._taken: tuple[int, ...] = ()
        self._changed = asyncio.Condition()

    @property
    def version(self) -> int:
        """The version that engines hold; its step is the last one published."""
        return self._admission.version

    @property
    def admitted(self) -> int:
        """Tickets admitted and not yet released."""
        return self._admission.outstanding

    @property
    def ready(self) -> int:
        """Groups fulfilled and not yet released."""
        return len(self._groups)

    @property
    def oldest(self) -> int:
        """The lowest ticket that somebody may still ask for."""
        return self._admission.oldest

    async def admit(self) -> int:
        """The next ticket, as soon as the lag bound allows it."""
        async with self._changed:
            await self._changed.wait_for(self._admission.may_admit)
            return self._admission.admit()

    async def arrived(self, ticket: int) -> None:
        """A rollout of the ticket's group is in."""
        async with self._changed:
            self._admission.arrived(ticket)
            self._changed.notify_all()

    async def redrawn(self, ticket: int) -> None:
        """The ticket's group teaches nothing; another is played in its place."""
        async with self._changed:
            self._admission.redrawn(ticket)

    def is_cut(self, ticket: int) -> bool:
        """Whether the ticket's step goes on without what is missing from its group."""
        return self._admission.is_cut(ticket)

    async def until_cut(self, ticket: int) -> None:
        """Until the ticket's step goes on without what is missing from its group."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._admission.is_cut(ticket))

    async def fulfil(self, group: Group) -> None:
        """Put a finished group under its ticket."""
        async with self._changed:
            try:
                self._admission.fulfil(group.ticket, len(group.rollouts))
            except ValueError as error:
                raise RunError(str(error)) from None
            self._groups[group.ticket] = group
            self._changed.notify_all()

    async def take(self, *, timeout_s: float) -> list[Group]:
        """The groups of the next step, in order of admission, once they are fulfilled."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                while (chosen := self._admission.choose()) is None:
                    if self._admission.stragglers():
                        self._changed.notify_all()
                    await self._changed.wait()
        except TimeoutError:
            missing = self._admission.missing()
            raise DeadlinePassed(
                f"batch of step {self.version + 1}: groups {list(missing[:8])} of {len(missing)} "
                f"missing after {timeout_s:g} s; lower environment.episode_timeout_s or raise "
                "cluster.step_timeout_s"
            ) from None
        self._taken = chosen
        groups = [self._groups[t] for t in chosen]
        for group in groups:
            self._assert_lag(group)
        return groups

    async def release(self, version: int) -> None:
        """The step is published as `version`: forget its groups, admit as many tickets."""
        async with self._changed:
            if version != self.version + 1:
                raise RunError(f"version {version} published after {self.version}")
            self._admission.release(self._taken)
            for ticket in self._taken:
                del self._groups[ticket]
            self._changed.notify_all()

    def _assert_lag(self, group: Group) -> None:
        oldest = min(
            (r.oldest_version for r in group.rollouts if r.oldest_version >= 0), default=None
        )
        if oldest is not None and self.version - oldest > self.schedule.max_lag:
            raise LagExceeded(
                f"group {group.ticket} ({group.task_id}) holds tokens of version {oldest}, trained "
                f"at {self.version}: lag {self.version - oldest} > max_lag {self.schedule.max_lag}"
            )
