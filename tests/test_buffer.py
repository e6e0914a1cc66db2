"""The group buffer alone: order, lag bound, and who waits for whom, over random schedules."""

import asyncio
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwright.algorithms.admission import Schedule
from loopwright.algorithms.records import Context, EndReason, Group, Outcome, Rollout
from loopwright.orchestrator.buffer import GroupBuffer, LagExceeded
from loopwright.orchestrator.faults import DeadlinePassed, RunError


def group(ticket: int, version: int) -> Group:
    """A group whose one rollout sampled one token at `version`."""
    context = Context(
        token_ids=np.zeros(1, np.int32),
        action_mask=np.ones(1, np.bool_),
        behavior_logprobs=np.zeros(1, np.float32),
        policy_versions=np.full(1, version, np.int32),
        turn_ids=np.zeros(1, np.int16),
    )
    rollout = Rollout(
        task_id=str(ticket),
        environment="e",
        environment_version="1",
        scenario="s",
        attempt=0,
        contexts=(context,),
        reward=0.0,
        success=False,
        end_reason=EndReason.DONE,
        outcome=Outcome.SCORED,
        turns=1,
    )
    return Group(ticket=ticket, task_id=str(ticket), rollouts=(rollout,))


async def simulate(
    groups_per_step: int, max_lag: int, samplers: int, steps: int, seed: int
) -> tuple[list[int], int]:
    """Samplers of random speed and a trainer of random speed; (tickets in order of use, largest
    lag)."""
    chance = random.Random(seed)
    buffer = GroupBuffer(Schedule(groups_per_step=groups_per_step, max_lag=max_lag))
    used: list[int] = []
    largest = 0

    async def some_turns_of_the_event_loop() -> None:
        for _ in range(chance.choice((0, 1, 2, 5, 30))):
            await asyncio.sleep(0)

    async def sampler() -> None:
        while True:
            ticket = await buffer.admit()
            oldest = buffer.version
            await some_turns_of_the_event_loop()
            await buffer.fulfil(group(ticket, oldest))

    tasks = [asyncio.create_task(sampler()) for _ in range(samplers)]
    try:
        for step in range(1, steps + 1):
            groups = await buffer.take(timeout_s=30)
            used += [g.ticket for g in groups]
            largest = max(largest, *(buffer.version - g.rollouts[0].oldest_version for g in groups))
            await some_turns_of_the_event_loop()
            await buffer.release(step)
    finally:
        for task in tasks:
            task.cancel()
    return used, largest


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    groups_per_step=st.integers(1, 5),
    max_lag=st.integers(0, 4),
    samplers=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_lag_never_exceeds_the_bound_and_order_is_admission(
    groups_per_step: int, max_lag: int, samplers: int, seed: int
) -> None:
    used, largest = asyncio.run(simulate(groups_per_step, max_lag, samplers, 8, seed))
    assert used == list(range(8 * groups_per_step))
    assert largest <= max_lag


def test_the_lag_bound_is_used_and_not_only_kept() -> None:
    largest = [asyncio.run(simulate(2, 2, 6, 20, seed))[1] for seed in range(10)]
    assert max(largest) == 2


def test_admission_stops_at_the_bound() -> None:
    async def body() -> None:
        buffer = GroupBuffer(Schedule(groups_per_step=2, max_lag=1))
        assert [await buffer.admit() for _ in range(4)] == [0, 1, 2, 3]
        fifth = asyncio.ensure_future(buffer.admit())
        await asyncio.sleep(0)
        assert not fifth.done()
        for ticket in (1, 0):
            await buffer.fulfil(group(ticket, 0))
        assert [g.ticket for g in await buffer.take(timeout_s=1)] == [0, 1]
        assert not fifth.done(), "take alone must not admit: the new version is not out yet"
        await buffer.release(1)
        assert await asyncio.wait_for(fifth, 1) == 4

    asyncio.run(body())


def test_a_stale_group_is_refused_with_both_versions() -> None:
    async def body() -> None:
        buffer = GroupBuffer(Schedule(groups_per_step=1, max_lag=1), version=5)
        await buffer.fulfil(group(await buffer.admit(), 3))
        with pytest.raises(LagExceeded, match="version 3, trained at 5: lag 2 > max_lag 1"):
            await buffer.take(timeout_s=1)

    asyncio.run(body())


def test_a_missing_group_is_named_at_the_deadline() -> None:
    async def body() -> None:
        buffer = GroupBuffer(Schedule(groups_per_step=2, max_lag=0))
        await buffer.admit()
        await buffer.fulfil(group(0, 0))
        with pytest.raises(DeadlinePassed, match=r"step 1: groups \[1\]"):
            await buffer.take(timeout_s=0.01)

    asyncio.run(body())


def test_a_ticket_is_fulfilled_once() -> None:
    async def body() -> None:
        buffer = GroupBuffer(Schedule(groups_per_step=1, max_lag=0))
        await buffer.admit()
        await buffer.fulfil(group(0, 0))
        with pytest.raises(RunError, match="fulfilled twice or was never admitted"):
            await buffer.fulfil(group(0, 0))
        with pytest.raises(RunError, match="never admitted"):
            await buffer.fulfil(group(7, 0))

    asyncio.run(body())
