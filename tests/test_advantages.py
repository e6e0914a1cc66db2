"""Advantages against the numbers of their papers, and the batch that comes of them."""

import numpy as np
import pytest

from loopwright.algorithms.advantages import (
    ADVANTAGES,
    CRITIC,
    AdvantageError,
    advantages,
    batch_normalized,
    group_mean,
    group_normalized,
    leave_one_out,
)
from loopwright.algorithms.batching import build_batch
from loopwright.algorithms.records import Context, EndReason, Group, Outcome, Rollout


def _context(length: int, actions: int, version: int = 0) -> Context:
    mask = np.arange(length) >= length - actions
    return Context(
        token_ids=np.arange(length, dtype=np.int32),
        action_mask=mask,
        behavior_logprobs=np.where(mask, -1, 0).astype(np.float32),
        policy_versions=np.where(mask, version, -1).astype(np.int32),
        turn_ids=np.where(mask, 0, -1).astype(np.int16),
    )


def _group(task: str, rewards: list[float], *, version: int = 0, contexts: int = 1) -> Group:
    rollouts = tuple(
        Rollout(
            task_id=task,
            environment="e",
            environment_version="1",
            scenario="s",
            attempt=k,
            contexts=tuple(_context(4 + k, 2, version) for _ in range(contexts)),
            reward=reward,
            success=reward == 1,
            end_reason=EndReason.DONE,
            outcome=Outcome.SCORED,
            turns=1,
        )
        for k, reward in enumerate(rewards)
    )
    return Group(ticket=0, task_id=task, rollouts=rollouts)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0.5, 0, 0, 1, 0.25], [0.65, 0.05, -0.55, -0.55, 0.65, -0.25]),
        ([1, 0, 0.5, 0.25], [0.75, -0.58333333, 0.08333333, -0.25]),
        ([0.3, 0.3, 0.3], [0, 0, 0]),
    ],
)
def test_leave_one_out_is_reward_minus_the_mean_of_the_others(
    rewards: list[float], expected: list[float]
) -> None:
    found = leave_one_out(np.array(rewards))
    others = [r - np.mean(rewards[:k] + rewards[k + 1 :]) for k, r in enumerate(rewards)]
    np.testing.assert_allclose(found, expected, atol=5e-9)
    np.testing.assert_allclose(found, others, atol=1e-12)
    assert abs(found.sum()) < 1e-12


def test_group_mean_and_group_normalized_follow_their_formulas() -> None:
    rewards = np.array([1.0, 0.0, 0.5, 0.25])
    centred = rewards - 0.4375
    np.testing.assert_allclose(group_mean(rewards), centred)
    std = np.sqrt((centred**2).sum() / 3)
    np.testing.assert_allclose(group_normalized(rewards), centred / (std + 1e-6))
    np.testing.assert_allclose(group_normalized(rewards, std_floor=2.0), centred / (2 + 1e-6))
    np.testing.assert_array_equal(group_normalized(np.full(4, 0.5)), np.zeros(4))


def test_batch_normalized_divides_all_groups_by_one_deviation() -> None:
    groups = [np.array([1.0, 0.0]), np.array([0.5, 0.5, 0.5]), np.array([0.0, 0.25])]
    found = batch_normalized(groups)
    centred = [group_mean(g) for g in groups]
    scale = np.concatenate(centred).std(ddof=1) + 1e-6
    for values, expected in zip(found, centred, strict=True):
        np.testing.assert_allclose(values, expected / scale)


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name != CRITIC])
def test_a_group_of_one_is_an_error_that_says_so(name: str) -> None:
    with pytest.raises(AdvantageError, match="K=1"):
        advantages(name, [np.array([1.0])])


def test_unknown_estimators_and_rewards_that_are_not_finite_are_refused() -> None:
    with pytest.raises(AdvantageError, match="leave_one_out"):
        advantages("loo", [np.array([1.0, 0.0])])
    with pytest.raises(AdvantageError, match="finite"):
        leave_one_out(np.array([1.0, np.nan]))


def test_batch_drops_what_carries_no_gradient_and_counts_it() -> None:
    groups = [_group("a", [1, 0, 0, 1]), _group("b", [0.5, 0.5]), _group("c", [0.5, 0.503, 0])]
    batch, report = build_batch(groups, step=3)
    assert (report.groups, report.rollouts, report.dropped_rollouts) == (3, 9, 2)
    assert report.zero_variance_groups == 1
    assert batch.rollout_count == 9
    assert batch.rollout_ids.tolist() == [0, 1, 2, 3, 6, 7, 8]
    np.testing.assert_allclose(batch.advantages[:4], [2 / 3, -2 / 3, -2 / 3, 2 / 3], rtol=1e-6)
    assert report.lag_max == 2 and report.lag_mean == 2
    assert report.success_mean == pytest.approx(2 / 9)
    assert report.tokens == len(batch.token_ids) == int(batch.lengths.sum())
    assert (report.action_tokens, report.generated_tokens) == (14, 18)
    assert [c.tolist() for c in np.split(batch.token_ids, np.cumsum(batch.lengths)[:-1])][1] == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip


def test_nothing_is_dropped_where_a_critic_or_a_penalty_gives_every_rollout_a_gradient() -> None:
    groups = [_group("a", [1, 1]), _group("b", [0.5])]
    batch, report = build_batch(groups, step=1, advantage=CRITIC)
    assert (report.dropped_rollouts, batch.rollout_ids.tolist()) == (0, [0, 1, 2])
    assert batch.rewards.tolist() == [1, 1, 0.5] and not batch.advantages.any()
    batch, report = build_batch(groups[:1], step=1, drop_below=0.0)
    assert (report.dropped_rollouts, batch.advantages.tolist()) == (0, [0, 0])


def test_lags_are_counted_by_token() -> None:
    groups = [_group("a", [1, 0], version=3), _group("b", [1, 0, 0], version=1)]
    batch, report = build_batch(groups, step=4)
    assert report.lag_tokens == (4, 0, 6)
    assert batch.policy_versions[batch.action_mask].tolist() == [3] * 4 + [1] * 6
    assert report.spanning_rollouts == 0


def test_context_instances_of_a_rollout_share_its_advantage_and_id() -> None:
    batch, report = build_batch([_group("a", [1, 0], contexts=3)], step=1, version=5)
    assert batch.rollout_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.advantages.tolist() == [1, 1, 1, -1, -1, -1]
    assert (report.sequences, report.trained_rollouts, report.lag_max) == (6, 2, 5)


def test_a_batch_of_a_single_rollout_group_names_the_task() -> None:
    with pytest.raises(AdvantageError, match=r"task lonely.*K=1"):
        build_batch([_group("lonely", [1])], step=1)


def test_a_step_in_which_nothing_teaches_is_an_empty_batch() -> None:
    batch, report = build_batch([_group("a", [1, 1])], step=1)
    assert (len(batch.lengths), batch.rollout_count, report.dropped_rollouts) == (0, 2, 2)
