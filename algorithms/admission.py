"""Which groups may start, which make the next step, and whom it no longer waits for: the bound on
policy lag as arithmetic over ticket numbers.

A group is played under a ticket; tickets are admitted in ascending order. At most B are outstanding
(admitted, their step not yet published). A step takes P groups: always the oldest that are whole,
from the W lowest numbers that no step has taken yet. W = 1 is strict order of admission.

*The bound.* When ticket t is admitted at version v, at most B − 1 others are outstanding before it;
while it waits, at most W − 1 higher numbers can overtake it (they lie within W of the lowest, which
is t or lower). So at most B + W − 2 groups are taken between its admission and its turn, P a
version: its lag is at most (B + W − 2) // P. With B = (max_lag + 1)·P − (W − 1) that is `max_lag`,
whatever the speeds. (Windowed first-in-first-out after TitanRL; the bound derived here.)

*The cut* (LOOP's rule, generalised). While somebody waits for a step, it goes on as soon as the
share `cut` of all its rollouts is in, and of each group the share `cut_group`, at least two: what
is missing is taken back. Nothing here knows a clock, an actor, or what a group is made of.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_ROUNDING = 1e-9  # 0.7 · 10 is 7.000000000000001 and means 7


def outstanding_limit(*, groups_per_step: int, max_lag: int, window: int = 1) -> int:
    """B: how many tickets may be outstanding, so that no lag exceeds `max_lag`."""
    return (max_lag + 1) * groups_per_step - (window - 1)


def lag_bound(*, outstanding: int, groups_per_step: int, window: int = 1) -> int:
    """(B + W − 2) // P: the largest policy lag that B outstanding tickets allow."""
    return (outstanding + window - 2) // groups_per_step


def largest_window(*, groups_per_step: int, max_lag: int) -> int:
    """The largest W that leaves a step's groups beside a straggler's (B > P); 1 is always legal."""
    return max(1, max_lag * groups_per_step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What one run admits and waits for."""

    groups_per_step: int  # P
    max_lag: int
    group_size: int = 2  # K; matters to the cut alone
    window: int = 1  # W
    cut: float = 1.0  # share of a step's rollouts that must be in; 1: no cut
    cut_group: float = 1.0  # share of each group's, where there is a cut

    def __post_init__(self) -> None:
        if self.groups_per_step < 1 or self.max_lag < 0:
            raise ValueError(
                f"groups_per_step {self.groups_per_step} ≥ 1 and max_lag {self.max_lag} ≥ 0 "
                "expected"
            )
        largest = largest_window(groups_per_step=self.groups_per_step, max_lag=self.max_lag)
        if not 1 <= self.window <= largest:
            raise ValueError(
                f"window {self.window}, expected 1 to {largest} = max_lag · groups_per_step: with "
                "a larger one too few tickets are left to pass a straggler by"
            )
        if not (0 < self.cut <= 1 and 0 < self.cut_group <= 1):
            raise ValueError(f"cut {self.cut} and cut_group {self.cut_group}, expected (0, 1]")
        if self.cut < 1 and self.window > 1:
            raise ValueError("cut and window: one relief for stragglers, not both")

    @property
    def outstanding(self) -> int:
        """B."""
        return outstanding_limit(
            groups_per_step=self.groups_per_step, max_lag=self.max_lag, window=self.window
        )

    @property
    def least_of_group(self) -> int:
        """Rollouts of a group without which no step goes on: a share, halves to even, at least 2
        (or all of a smaller group)."""
        return max(min(2, self.group_size), round(self.cut_group * self.group_size))

    def least_of_step(self, expected: int) -> int:
        """Rollouts without which a step that expects `expected` does not go on."""
        return math.ceil(self.cut * expected - _ROUNDING)


class Admission:
    """The state: which tickets are out, how far each has come, what steps have taken.

    `consumed` are the tickets of the steps up to `version`, of a resumed run; `planned` are those
    of later steps that it took before it was cut off, and takes again.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        version: int = 0,
        consumed: Collection[int] | None = None,
        planned: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.schedule = schedule
        self.version = version
        taken = range(version * schedule.groups_per_step) if consumed is None else consumed
        self._consumed = set(taken)
        self._planned = dict(planned or {})
        self._arrived: dict[int, int] = {}  # being played -> its rollouts that are in
        self._whole: dict[int, int] = {}  # played and not yet released -> its rollouts
        self._cut: set[int] = set()
        self._oldest = 0
        self._settle()
        self._next = self._oldest

    @property
    def oldest(self) -> int:
        """The lowest ticket that no published step has taken."""
        return self._oldest

    @property
    def outstanding(self) -> int:
        """Tickets admitted whose step is not published."""
        return len(self._arrived) + len(self._whole)

    @property
    def whole(self) -> int:
        """Groups that are whole and not yet released."""
        return len(self._whole)

    def may_admit(self) -> bool:
        """Whether one more ticket keeps the bound."""
        return self.outstanding < self.schedule.outstanding

    def admit(self) -> int:
        """The next ticket. Raises `ValueError` where the bound forbids it."""
        if not self.may_admit():
            raise ValueError(f"{self.outstanding} tickets are outstanding, no more may be")
        ticket = max(self._next, self._oldest)
        while ticket in self._consumed:
            ticket += 1
        self._next = ticket + 1
        self._arrived[ticket] = 0
        return ticket

    def arrived(self, ticket: int) -> None:
        """One more rollout of the ticket's group is in."""
        if ticket not in self._arrived:
            raise ValueError(f"ticket {ticket} is not being played")
        self._arrived[ticket] += 1

    def redrawn(self, ticket: int) -> None:
        """The ticket's group is thrown away and another is played in its place."""
        if ticket not in self._arrived:
            raise ValueError(f"ticket {ticket} is not being played")
        self._arrived[ticket] = 0

    def fulfil(self, ticket: int, rollouts: int) -> None:
        """The ticket's group is whole (as whole as it gets), with so many rollouts."""
        if ticket not in self._arrived:
            raise ValueError(f"ticket {ticket} is fulfilled twice or was never admitted")
        del self._arrived[ticket]
        self._whole[ticket] = rollouts

    def choose(self) -> tuple[int, ...] | None:
        """The tickets of the next step, ascending; None while they are not whole."""
        planned = self._planned.get(self.version + 1)
        if planned is not None:
            return planned if all(t in self._whole for t in planned) else None
        chosen: list[int] = []
        lowest = self._oldest
        while len(chosen) < self.schedule.groups_per_step:
            window = range(lowest, lowest + self.schedule.window)
            found = next((t for t in window if t in self._whole and t not in chosen), None)
            if found is None:
                return None
            chosen.append(found)
            while lowest in chosen or lowest in self._consumed:
                lowest += 1
        return tuple(sorted(chosen))

    def missing(self) -> tuple[int, ...]:
        """Tickets that the next step waits for, as far as their numbers are known."""
        return tuple(t for t in self._wanted() if t not in self._whole)

    def stragglers(self) -> tuple[int, ...]:
        """Tickets whose missing rollouts the next step no longer waits for; each named once."""
        schedule, wanted = self.schedule, self._wanted()
        if schedule.cut == 1 or any(
            t not in self._whole and t not in self._arrived for t in wanted
        ):
            return ()
        playing = [t for t in wanted if t in self._arrived and t not in self._cut]
        if any(self._arrived[t] < schedule.least_of_group for t in playing):
            return ()
        arrived = sum(self._arrived.get(t, 0) + self._whole.get(t, 0) for t in wanted)
        expected = sum(self._whole.get(t, schedule.group_size) for t in wanted)
        if arrived < schedule.least_of_step(expected):
            return ()
        self._cut.update(playing)
        return tuple(playing)

    def is_cut(self, ticket: int) -> bool:
        """Whether what is missing from this ticket's group is to be taken back."""
        return ticket in self._cut

    def release(self, tickets: Collection[int]) -> None:
        """The step of these tickets is published: as many new ones may be admitted."""
        absent = [t for t in tickets if t not in self._whole]
        if absent:
            raise ValueError(f"tickets {absent} are released, but not whole")
        for ticket in tickets:
            del self._whole[ticket]
        self._cut.difference_update(tickets)
        self._consumed.update(tickets)
        self._planned.pop(self.version + 1, None)
        self.version += 1
        self._settle()

    def _wanted(self) -> tuple[int, ...]:
        planned = self._planned.get(self.version + 1)
        if planned is not None:
            return planned
        found: list[int] = []
        ticket = self._oldest
        while len(found) < self.schedule.groups_per_step:
            if ticket not in self._consumed:
                found.append(ticket)
            ticket += 1
        return tuple(found)

    def _settle(self) -> None:
        while self._oldest in self._consumed:
            self._consumed.discard(self._oldest)
            self._oldest += 1
