"""Admission over thousands of schedules on a simulated clock: lag, order, nothing lost, resume."""

import random
from dataclasses import dataclass

import pytest

from loopwright.algorithms.admission import Admission, Schedule, lag_bound, outstanding_limit
from loopwright.algorithms.loop_simulation import Episode, SimulatedRun, long_tailed, simulate

SCHEDULES, SHARDS = 10_000, 10


@dataclass(frozen=True)
class Case:
    """One random schedule, and who is fast and slow under it."""

    schedule: Schedule
    slots: int
    steps: int
    seed: int

    def episode(self, ticket: int, attempt: int) -> Episode:
        """Mostly short; some late by far, some lost on the way, some faults, some groups void."""
        chance = random.Random((self.seed * 1009 + ticket) * 31 + attempt)
        seconds = chance.choice((0.0, 0.5, 1.0, 1.0, 2.0, 40.0)) + chance.random()
        void = (self.seed + ticket) % 23 == 0
        return Episode(
            seconds=seconds,
            scored=not void and chance.random() > 0.05,
            lost_at_s=seconds * chance.random() if chance.random() < 0.15 else None,
            resumes=chance.random() < 0.7,
        )

    def train_s(self, step: int) -> float:
        """Now and then a step takes long."""
        return (0.0, 0.1, 1.0, 25.0)[(step * 7 + self.seed) % 4]


def _case(seed: int) -> Case:
    chance = random.Random(seed)
    per_step, max_lag = chance.randint(1, 4), chance.randint(0, 4)
    window, cut, cut_group = 1, 1.0, 1.0
    relief = chance.choice(("none", "cut", "window"))
    if relief == "window":
        window = chance.randint(1, max(1, max_lag * per_step))
    elif relief == "cut":
        cut, cut_group = chance.choice((0.5, 0.75, 0.9)), chance.choice((0.4, 0.75, 1.0))
    return Case(
        schedule=Schedule(
            groups_per_step=per_step,
            max_lag=max_lag,
            group_size=chance.randint(2, 3),
            window=window,
            cut=cut,
            cut_group=cut_group,
        ),
        slots=chance.randint(1, 8),
        steps=chance.randint(2, 4),
        seed=seed,
    )


def _check(case: Case, run: SimulatedRun, *, before: list[int]) -> None:
    schedule = case.schedule
    used = [t for step in run.steps for t in step.tickets]
    assert run.lag_max <= schedule.max_lag
    assert all(len(step.tickets) == schedule.groups_per_step for step in run.steps)
    done = set(before)
    for ticket in used:
        lowest = next(t for t in range(len(done) + 1) if t not in done)
        assert ticket not in done, "taken twice"
        assert ticket < lowest + schedule.window, "within the window, one after the other"
        done.add(ticket)
    if schedule.window == 1:
        assert used == list(range(len(before), len(before) + len(used)))
    turns = {ticket: turn for turn, ticket in enumerate(before + used)}
    assert all(turn <= ticket + schedule.window - 1 for ticket, turn in turns.items())
    assert max(turns) < len(turns) + schedule.window - 1, "nobody is lost below the newest"
    waiting = set(run.admitted) - set(used)
    assert len(waiting) <= schedule.outstanding, "the rest is admitted, and waits its turn"
    for ticket in used:
        whole = run.rollouts[ticket]
        assert 0 <= whole <= schedule.group_size


@pytest.mark.parametrize("shard", range(SHARDS))
def test_ten_thousand_schedules(shard: int) -> None:
    """Lag, order, exactly once; and from any step on, whatever the speeds, a resumed run takes the
    same tickets again where the ledger names them."""
    for seed in range(shard, SCHEDULES, SHARDS):
        case = _case(seed)
        run = simulate(
            case.schedule, case.episode, slots=case.slots, train_s=case.train_s, steps=case.steps
        )
        _check(case, run, before=[])
        checkpoint = seed % case.steps
        known = checkpoint + (seed // 7) % (case.steps - checkpoint + 1)
        steps = [step.tickets for step in run.steps]
        before = [t for tickets in steps[:checkpoint] for t in tickets]
        other = Case(case.schedule, case.slots % 8 + 1, case.steps, seed + 1_000_003)
        resumed = simulate(
            case.schedule,
            other.episode,
            slots=other.slots,
            train_s=other.train_s,
            steps=case.steps + 1,
            version=checkpoint,
            consumed=before,
            planned={i + 1: steps[i] for i in range(checkpoint, known)},
        )
        assert [s.tickets for s in resumed.steps[: known - checkpoint]] == steps[checkpoint:known]
        _check(case, resumed, before=before)


@pytest.mark.parametrize(
    ("per_step", "max_lag", "window"), [(1, 1, 1), (2, 2, 1), (2, 2, 3), (3, 1, 3), (4, 2, 8)]
)
def test_the_bound_is_reached(per_step: int, max_lag: int, window: int) -> None:
    """It is no larger than it must be: some schedule comes to it."""
    schedule = Schedule(groups_per_step=per_step, max_lag=max_lag, window=window)
    worst = 0
    for seed in range(300):
        case = Case(schedule, 12, 8, seed)
        run = simulate(schedule, case.episode, slots=12, train_s=case.train_s, steps=8)
        worst = max(worst, run.lag_max)
    assert worst == max_lag


@pytest.mark.parametrize(
    ("max_lag", "per_step", "window", "outstanding"),
    [(0, 4, 1, 4), (1, 4, 1, 8), (1, 4, 4, 5), (2, 16, 9, 40)],
)
def test_outstanding_tickets_and_the_bound_are_inverse(
    max_lag: int, per_step: int, window: int, outstanding: int
) -> None:
    found = outstanding_limit(groups_per_step=per_step, max_lag=max_lag, window=window)
    assert found == outstanding
    assert lag_bound(outstanding=found, groups_per_step=per_step, window=window) == max_lag
    more = lag_bound(outstanding=found + 1, groups_per_step=per_step, window=window)
    assert more == max_lag + 1, "one ticket more would break it"


@pytest.mark.parametrize(
    ("group_size", "share", "least"), [(6, 0.75, 4), (8, 0.75, 6), (4, 0.25, 2), (2, 0.5, 2)]
)
def test_the_least_of_a_group(group_size: int, share: float, least: int) -> None:
    """LOOP's 4 of 6 at 0.75; never fewer than two, which is what a baseline needs."""
    schedule = Schedule(
        groups_per_step=1, max_lag=0, group_size=group_size, cut=0.9, cut_group=share
    )
    assert schedule.least_of_group == least


@pytest.mark.parametrize(
    ("expected", "share", "least"), [(240, 0.9, 216), (10, 0.7, 7), (7, 0.9, 7), (11, 0.9, 10)]
)
def test_the_least_of_a_step(expected: int, share: float, least: int) -> None:
    schedule = Schedule(groups_per_step=1, max_lag=0, cut=share, cut_group=0.75)
    assert schedule.least_of_step(expected) == least


def _loop_rule() -> Admission:
    """Two groups of six, LOOP's shares: 11 of 12 and 4 of 6."""
    schedule = Schedule(groups_per_step=2, max_lag=1, group_size=6, cut=0.9, cut_group=0.75)
    admission = Admission(schedule)
    for _ in range(4):
        admission.admit()
    return admission


def test_a_step_is_cut_when_both_shares_are_in() -> None:
    admission = _loop_rule()
    for _ in range(6):
        admission.arrived(0)
    admission.fulfil(0, 6)
    for _ in range(4):
        admission.arrived(1)
    assert admission.stragglers() == (), "10 of 12 are in, 11 are needed"
    admission.arrived(1)
    assert admission.stragglers() == (1,)
    assert admission.stragglers() == (), "each is named once"
    assert admission.is_cut(1) and not admission.is_cut(2), "later steps go on"


def test_a_group_that_lags_behind_holds_the_cut_back() -> None:
    schedule = Schedule(groups_per_step=2, max_lag=0, group_size=6, cut=0.5, cut_group=0.75)
    admission = Admission(schedule)
    first, second = admission.admit(), admission.admit()
    for _ in range(5):
        admission.arrived(first)
    for _ in range(3):
        admission.arrived(second)
    assert admission.stragglers() == (), "3 of 6 in the second"
    admission.arrived(second)
    assert admission.stragglers() == (first, second)


def test_a_group_without_rollouts_is_expected_no_more() -> None:
    schedule = Schedule(groups_per_step=2, max_lag=0, group_size=6, cut=0.9, cut_group=0.75)
    admission = Admission(schedule)
    void, other = admission.admit(), admission.admit()
    admission.fulfil(void, 0)
    for _ in range(5):
        admission.arrived(other)
    assert admission.stragglers() == (), "5 of the 6 that can still come, and 0.9 of 6 is 6"
    admission.redrawn(other)
    for _ in range(6):
        admission.arrived(other)
    assert admission.stragglers() == (other,), "what was redrawn counts from nothing"


def test_the_window_takes_what_is_whole_and_not_too_young() -> None:
    admission = Admission(Schedule(groups_per_step=2, max_lag=2, window=3))
    for ticket in range(4):
        assert admission.admit() == ticket
    assert not admission.may_admit(), "B = 3 · 2 − 2"
    admission.fulfil(3, 2)
    assert admission.choose() is None
    admission.fulfil(2, 2)
    assert admission.choose() is None, "3 is not among the 3 lowest while 0 is out"
    admission.fulfil(1, 2)
    assert admission.choose() == (1, 2)
    admission.release((1, 2))
    assert admission.oldest == 0
    assert [admission.admit(), admission.admit()] == [4, 5]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"groups_per_step": 0}, "groups_per_step 0"),
        ({"max_lag": -1}, "max_lag -1"),
        ({"window": 0}, "window 0"),
        ({"window": 5}, r"window 5, expected 1 to 4"),
        ({"window": 2, "max_lag": 0}, r"window 2, expected 1 to 1"),
        ({"cut": 0.0}, "cut 0.0"),
        ({"cut": 0.9, "window": 2}, "not both"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Schedule(**({"groups_per_step": 4, "max_lag": 1} | changes))


def test_equal_halves_with_equal_lengths_overlap_completely() -> None:
    """Two equal halves, one process each: bound 2.0."""
    assert _speed_up(cv=0.0, max_lag=1) == pytest.approx(2.0, abs=0.02)


@pytest.mark.parametrize("cv", [0.5, 1.0])
def test_tails_cost_some_of_the_overlap_and_a_buffer_wins_it_back(cv: float) -> None:
    one, two = _speed_up(cv=cv, max_lag=1), _speed_up(cv=cv, max_lag=2)
    assert 1.8 < one < 2.35 and one - 0.02 <= two


def _speed_up(*, cv: float, max_lag: int) -> float:
    """Of a generator and a trainer that each take about one half of a synchronous step."""

    def step_s(lag: int) -> float:
        schedule = Schedule(groups_per_step=16, max_lag=lag, group_size=4)
        run = simulate(
            schedule, long_tailed(1.0, cv, 5), slots=8, train_s=lambda step: 8.0, steps=60
        )
        return run.step_s(skip=10)

    return step_s(0) / step_s(max_lag)
