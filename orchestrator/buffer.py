"""The group buffer: tickets in admission order, and with them the bound on policy lag.

Ticket t belongs to step t // P (P = groups per step), which trains with version t // P and produces
the next one. A ticket is admitted only while t < (version + max_lag + 1) * P, so whatever its
episodes sample, they sample from version t // P - max_lag or later: the lag cannot exceed
`max_lag`. Steps take tickets in admission order, and `release` follows the publish of the new
version. Nothing here knows actors, Ray, or what a group is made of.
"""

import asyncio

from loopwright.algorithms.records import Group
from loopwright.orchestrator.faults import DeadlinePassed, RunError


class LagExceeded(RunError):
    """A rollout is older than the bound allows: a defect, never a matter of configuration."""


class GroupBuffer:
    """Admits tickets, keeps fulfilled groups, hands them out oldest first."""

    def __init__(self, *, groups_per_step: int, max_lag: int, version: int = 0) -> None:
        if groups_per_step < 1 or max_lag < 0:
            raise ValueError(
                f"groups_per_step {groups_per_step} ≥ 1 and max_lag {max_lag} ≥ 0 expected"
            )
        self.groups_per_step = groups_per_step
        self.max_lag = max_lag
        self.version = version
        self._next_ticket = version * groups_per_step
        self._ready: dict[int, Group] = {}
        self._changed = asyncio.Condition()

    @property
    def admitted(self) -> int:
        """Tickets admitted and not yet taken."""
        return self._next_ticket - self.version * self.groups_per_step

    @property
    def ready(self) -> int:
        """Groups fulfilled and not yet taken."""
        return len(self._ready)

    async def admit(self) -> int:
        """The next ticket, as soon as the lag bound allows it."""
        async with self._changed:
            await self._changed.wait_for(self._may_admit)
            ticket = self._next_ticket
            self._next_ticket += 1
            return ticket

    async def fulfil(self, group: Group) -> None:
        """Put a finished group under its ticket."""
        async with self._changed:
            if group.ticket in self._ready or not self._first <= group.ticket < self._next_ticket:
                raise RunError(f"ticket {group.ticket} is fulfilled twice or was never admitted")
            self._ready[group.ticket] = group
            self._changed.notify_all()

    async def take(self, *, timeout_s: float) -> list[Group]:
        """The groups of the next step, in admission order, once all of them are fulfilled."""
        wanted = range(self._first, self._first + self.groups_per_step)
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: all(t in self._ready for t in wanted))
        except TimeoutError:
            missing = [t for t in wanted if t not in self._ready]
            raise DeadlinePassed(
                f"batch of step {self.version + 1}: groups {missing[:8]} of {len(missing)} missing "
                f"after {timeout_s:g} s; lower environment.episode_timeout_s or raise "
                "cluster.step_timeout_s"
            ) from None
        groups = [self._ready[t] for t in wanted]
        for group in groups:
            self._assert_lag(group)
        return groups

    async def release(self, version: int) -> None:
        """The step is published as `version`: forget its groups, admit as many tickets."""
        async with self._changed:
            if version != self.version + 1:
                raise RunError(f"version {version} published after {self.version}")
            for ticket in range(self._first, self._first + self.groups_per_step):
                del self._ready[ticket]
            self.version = version
            self._changed.notify_all()

    @property
    def _first(self) -> int:
        return self.version * self.groups_per_step

    def _may_admit(self) -> bool:
        return self._next_ticket < (self.version + self.max_lag + 1) * self.groups_per_step

    def _assert_lag(self, group: Group) -> None:
        oldest = min(
            (r.oldest_version for r in group.rollouts if r.oldest_version >= 0), default=None
        )
        if oldest is not None and self.version - oldest > self.max_lag:
            raise LagExceeded(
                f"group {group.ticket} ({group.task_id}) holds tokens of version {oldest}, trained "
                f"at {self.version}: lag {self.version - oldest} > max_lag {self.max_lag}"
            )
