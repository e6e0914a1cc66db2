"""Advantages: how much better a rollout did than the others of its group. Pure NumPy, float64.

`rewards_K` are the rewards of the K rollouts that really arrived for one task; early stops make K
vary.
"""

from collections.abc import Callable, Sequence

import numpy as np

STD_EPSILON = 1e-6


class AdvantageError(ValueError):
    """A group from which no baseline can be formed."""


def _checked(rewards_K: np.ndarray, estimator: str) -> np.ndarray:
    rewards = np.asarray(rewards_K, dtype=np.float64)
    if rewards.ndim != 1 or rewards.size < 2:
        raise AdvantageError(
            f"{estimator}: a group of K={rewards.size} rollouts (shape {list(rewards.shape)}), at "
            "least 2 are needed for a baseline; raise the group size or keep more rollouts of each "
            "task"
        )
    if not np.isfinite(rewards).all():
        raise AdvantageError(f"{estimator}: rewards {rewards.tolist()}, expected finite numbers")
    return rewards


def leave_one_out(rewards_K: np.ndarray) -> np.ndarray:
    """A_k = R_k − mean of the other rewards (LOOP eq. 3; RLOO): [K]. No division by std."""
    rewards = _checked(rewards_K, "leave_one_out")
    return (rewards - rewards.mean()) * (rewards.size / (rewards.size - 1))


def group_mean(rewards_K: np.ndarray) -> np.ndarray:
    """A_k = R_k − mean of the group (Dr. GRPO; LlamaRL). Returns [K]."""
    rewards = _checked(rewards_K, "group_mean")
    return rewards - rewards.mean()


def group_normalized(rewards_K: np.ndarray, *, std_floor: float = 0.0) -> np.ndarray:
    """A_k = (R_k − mean) / (unbiased std + 1e-6), the std at least `std_floor` (GRPO): [K]."""
    rewards = _checked(rewards_K, "group_normalized")
    std = max(float(rewards.std(ddof=1)), std_floor)
    return (rewards - rewards.mean()) / (std + STD_EPSILON)


def batch_normalized(groups: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Group means removed, then divided by the batch's unbiased std (REINFORCE++-baseline).

    Takes the rewards of all groups of the step, since the deviation is theirs together; returns one
    [K] each.
    """
    centred = [group_mean(rewards) for rewards in groups]
    if not centred:
        return []
    std = float(np.concatenate(centred).std(ddof=1))
    return [values / (std + STD_EPSILON) for values in centred]


_PER_GROUP: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "leave_one_out": leave_one_out,
    "group_mean": group_mean,
    "group_normalized": group_normalized,
}
CRITIC = (
    "gae"  # the one that a critic finds, token by token, where the model is (algorithms/gae.py)
)
ADVANTAGES = (*_PER_GROUP, "batch_normalized", CRITIC)


def advantages(name: str, groups: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The advantages of every group of a step by the estimator `name`, one of `ADVANTAGES`.

    Those of `gae` need values: zeros stand in their place.
    """
    if name == CRITIC:
        return [np.zeros(len(rewards)) for rewards in groups]
    if name == "batch_normalized":
        return batch_normalized(groups)
    if name not in _PER_GROUP:
        raise AdvantageError(f"unknown advantage {name!r}, expected one of {', '.join(ADVANTAGES)}")
    return [_PER_GROUP[name](rewards) for rewards in groups]
