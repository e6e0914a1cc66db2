"""Schedules, weights of tasks, and key tokens, against the numbers of their papers."""

import asyncio

import numpy as np
import pytest

from loopwright.algorithms.admission import Schedule
from loopwright.algorithms.curricula import (
    CurriculumError,
    pass_rate_weight,
    pick,
    scheduled,
    settled_before,
)
from loopwright.algorithms.key_tokens import key_token_weights


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 0.0), (50, 0.06903559), (100, 0.16666667), (150, 0.30473785), (200, 0.5), (250, 0.5)],
)
def test_zerosearchs_schedule(step: int, value: float) -> None:
    assert scheduled(step, start=0.0, end=0.5, steps=200) == pytest.approx(value, abs=5e-9)


def test_schedules_are_monotone_and_may_fall() -> None:
    falling = [scheduled(i, start=0.8, end=0.2, steps=10, base=0.5) for i in range(12)]
    assert falling[0] == 0.8 and falling[-2:] == [0.2, 0.2] and falling == sorted(falling)[::-1]
    assert scheduled(5, start=0, end=1, steps=10, base=1.0) == 0.5
    assert scheduled(5, start=0, end=1, steps=10, base=1 + 1e-6) == pytest.approx(0.5, abs=1e-5)
    for wrong in ({"steps": 0}, {"base": 0.0}, {"base": -4.0}):
        with pytest.raises(CurriculumError):
            scheduled(1, **{"start": 0.0, "end": 1.0, "steps": 5, **wrong})  # type: ignore[arg-type]


def test_tasks_that_succeed_sometimes_weigh_most() -> None:
    weights = [pass_rate_weight(p, 0.1) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert weights == pytest.approx([0.1, 0.775, 1.0, 0.775, 0.1])
    assert pass_rate_weight(None, 0.1) == 1.0
    for floor in (0.0, 1.5):
        with pytest.raises(CurriculumError, match="floor"):
            pass_rate_weight(0.5, floor)


def test_each_index_owns_its_share() -> None:
    draws = [pick([1.0, 0.0, 3.0], u) for u in np.linspace(0, 1, 4000, endpoint=False)]
    assert [draws.count(i) / 4000 for i in range(3)] == pytest.approx([0.25, 0, 0.75], abs=1e-3)
    assert pick([0.1] * 10, 1.0 - 1e-16) == 9
    for wrong in ([], [0.0, 0.0], [1.0, -1.0], [float("nan")]):
        with pytest.raises(CurriculumError):
            pick(wrong, 0.5)


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_what_is_settled_is_released_before_the_ticket_is_admitted(max_lag: int) -> None:
    """Against the buffer itself: at the earliest moment of admission, every ticket below is
    released, and with strict order of admission the next one is not."""
    from loopwright.algorithms.records import Group
    from loopwright.orchestrator.buffer import GroupBuffer

    size = 4

    async def run() -> None:
        buffer = GroupBuffer(Schedule(groups_per_step=size, max_lag=max_lag))
        admitted = 0
        for version in range(6):
            while admitted < (version + max_lag + 1) * size:
                ticket = await buffer.admit()
                settled = settled_before(ticket, max_lag=max_lag, groups_per_step=size)
                assert settled <= version * size, f"ticket {ticket} would wait for ever"
                await buffer.fulfil(Group(ticket=ticket, task_id="t", rollouts=()))
                admitted += 1
            assert settled_before(admitted - 1, max_lag=max_lag, groups_per_step=size) == (
                version * size
            )
            await buffer.take(timeout_s=5)
            await buffer.release(version + 1)

    asyncio.run(run())


def test_the_few_tokens_that_name_the_tool_count_as_much_as_the_rest() -> None:
    key = np.array([0, 0, 1, 1, 0, 0, 0, 0, 0, 0], dtype=bool)
    trained = np.array([0, 0, 1, 1, 1, 1, 1, 1, 0, 0], dtype=bool)
    weights = key_token_weights(key, trained)
    assert weights.tolist() == [1, 1, 2, 2, 1, 1, 1, 1, 1, 1]
    assert weights[key].sum() == weights[trained & ~key].sum() == 4
    one = np.zeros(40, dtype=bool)
    one[0] = True
    assert key_token_weights(one, np.ones(40, dtype=bool))[0] == 9, "39, capped"
    most = np.array([1, 1, 1, 0], dtype=bool)
    assert key_token_weights(most, np.ones(4, dtype=bool)).tolist() == [1, 1, 1, 1]
    none = np.zeros(4, dtype=bool)
    assert key_token_weights(none, np.ones(4, dtype=bool)).tolist() == [1, 1, 1, 1]
