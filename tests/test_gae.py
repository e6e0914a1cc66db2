"""Generalised advantage estimation against a slow reading of its definition."""

import numpy as np
import pytest

from loopwright.actors.objective import LossSettings
from loopwright.actors.token_advantages import BatchUnits, group_advantages
from loopwright.algorithms.gae import explained_variance, gae, reward_to_go, whitened
from loopwright.algorithms.records import TrainBatch


def _by_definition(values: list[float], rewards: list[float], gamma: float, lam: float) -> list:  # type: ignore[type-arg]
    """Â_t as the λ-weighted mean of all n-step advantages (Schulman et al. 2016, before eq. 16)."""
    found = []
    for t in range(len(values)):
        left = len(values) - t
        n_step = []
        for n in range(1, left + 1):
            ahead = sum(gamma**i * rewards[t + i] for i in range(n))
            beyond = gamma**n * values[t + n] if n < left else 0.0
            n_step.append(ahead + beyond - values[t])
        weights = [(1 - lam) * lam**i for i in range(left - 1)] + [lam ** (left - 1)]
        found.append(sum(w * a for w, a in zip(weights, n_step, strict=True)))
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.0), (0.9, 0.95), (0.5, 0.3)])
def test_gae_is_the_weighted_mean_of_n_step_advantages(gamma: float, lam: float) -> None:
    random = np.random.default_rng(0)
    values, rewards = random.normal(size=(2, 12))
    owners = np.array([0, 1, 0, 2, 1, 1, 0, 2, 0, 1, 0, 0])  # three rollouts, interleaved
    found, returns = gae(values, rewards, owners, gamma=gamma, lam=lam)
    for owner in range(3):
        own = owners == owner
        expected = _by_definition(list(values[own]), list(rewards[own]), gamma, lam)
        np.testing.assert_allclose(found[own], expected, atol=1e-12)
    np.testing.assert_allclose(returns, found + values)


def test_numbers_by_hand() -> None:
    """V = (.5, .6, .2), the reward 1 at the end, γ = .9, λ = .5: δ = (.04, −.42, .8)."""
    owners = np.zeros(3, dtype=int)
    found, _ = gae(np.array([0.5, 0.6, 0.2]), np.array([0, 0, 1.0]), owners, gamma=0.9, lam=0.5)
    np.testing.assert_allclose(found, [0.04 + 0.45 * (-0.42 + 0.45 * 0.8), -0.42 + 0.36, 0.8])


def test_a_perfect_critic_leaves_no_advantage_and_a_silent_one_leaves_the_return() -> None:
    owners, rewards = np.array([0, 0, 1, 0]), np.array([0.0, 0.0, 0.5, 1.0])
    known = np.array([1.0, 1.0, 0.5, 1.0])
    assert not gae(known, rewards, owners, gamma=1.0, lam=0.7)[0].any()
    np.testing.assert_array_equal(gae(0 * known, rewards, owners, gamma=1, lam=1)[0], known)


def test_reward_to_go_whitening_and_explained_variance() -> None:
    rewards, owners = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0, 1, 0, 0])
    assert reward_to_go(rewards, owners).tolist() == [13, 2, 12, 8]
    white = whitened(np.array([1.0, 2.0, 6.0]))
    assert abs(white.mean()) < 1e-12 and white.std(ddof=1) == pytest.approx(1.0)
    assert whitened(np.array([3.0])).tolist() == [3.0]
    returns = np.array([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(np.full(4, 1.5), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, np.ones(4)) == 0.0


def _batch() -> TrainBatch:
    """Two rollouts: one of two contexts (turns 0, 1 and turn 2), one of a single turn."""
    mask = np.array([0, 1, 1, 0, 1, 0, 1, 1, 0, 1], dtype=bool)
    turns = np.array([-1, 0, 0, -1, 1, -1, 2, 2, -1, 0], dtype=np.int16)
    return TrainBatch(
        step=1,
        token_ids=np.arange(10, dtype=np.int32),
        action_mask=mask,
        behavior_logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        policy_versions=np.where(mask, 0, -1).astype(np.int32),
        turn_ids=turns,
        lengths=np.array([5, 3, 2], dtype=np.int32),
        rollout_ids=np.array([0, 0, 1], dtype=np.int32),
        rewards=np.array([1.0, 1.0, 0.25], dtype=np.float32),
        advantages=np.array([0.5, 0.5, -0.5], dtype=np.float32),
        rollout_count=2,
    )


@pytest.mark.parametrize(
    ("level", "first", "last", "owners"),
    [
        ("token", [1, 2, 4, 6, 7, 9], [4, 5], [0, 0, 0, 0, 0, 1]),
        ("turn", [1, 4, 6, 9], [2, 3], [0, 0, 0, 1]),
        ("trajectory", [1, 9], [0, 1], [0, 1]),
    ],
)
def test_units_skip_observations_and_span_contexts(
    level: str, first: list[int], last: list[int], owners: list[int]
) -> None:
    units = BatchUnits.of(LossSettings(level=level), _batch())  # type: ignore[arg-type]
    assert units.places[units.first].tolist() == first
    assert units.last_of_rollouts().tolist() == last
    assert units.rollout_ids.tolist() == owners
    ones = units.sums(np.ones(10))
    assert ones.sum() == 6
    np.testing.assert_array_equal(units.spread(ones, 10) > 0, _batch().action_mask)


def test_a_penalty_counts_from_its_unit_on_and_leaves_the_group_baseline_alone() -> None:
    batch = _batch()
    penalty = np.where(batch.action_mask, 0.1, 0.0)
    plain = group_advantages(batch, LossSettings(), None)
    assert plain.tolist() == [0.5] * 8 + [-0.5] * 2
    by_token = group_advantages(batch, LossSettings(kl="k1"), penalty)
    expected = [0.0, 0.1, 0.2, 0.3, 0.4, -0.6]
    np.testing.assert_allclose(by_token[batch.action_mask], expected, atol=1e-7)
    by_turn = group_advantages(batch, LossSettings(kl="k1", level="turn"), penalty)
    expected = [0.0, 0.0, 0.2, 0.3, 0.3, -0.6]
    np.testing.assert_allclose(by_turn[batch.action_mask], expected, atol=1e-7)
