"""How the losses of units become one number: loss = Σ weight·unit loss, the weights constant.

Weights are computed once for a whole minibatch. The sum can then be split over micro-batches and
ranks in any way and order, and the gradient stays the same: no mean of means. `rollout_ids` [U]
names the rollout of each unit; the units of one rollout are counted together however many context
instances hold them.
"""

from typing import Literal

import numpy as np

Aggregation = Literal["rollout_mean_over_constant", "token_mean", "sequence_mean", "fixed_length"]


def rollout_mean_over_constant(rollout_ids: np.ndarray, minibatch_size: float) -> np.ndarray:
    """Mean over a rollout's units, summed over rollouts, over the *constant* minibatch size (LOOP).

    Returns [U]. Dropped rollouts thus shrink the step instead of re-weighting the rest.
    """
    return 1.0 / (_units_of_own_rollout(rollout_ids) * minibatch_size)


def token_mean(rollout_ids: np.ndarray, total_units: int | None = None) -> np.ndarray:
    """Plain mean over all units (DAPO), `total_units` of them over all ranks. Returns [U]."""
    units = len(rollout_ids) if total_units is None else total_units
    return np.full(len(rollout_ids), 1.0 / max(units, 1))


def sequence_mean(rollout_ids: np.ndarray, total_rollouts: int | None = None) -> np.ndarray:
    """Mean over rollouts of the mean over their units (GRPO). Returns [U].

    `total_rollouts`: of all ranks, where this one holds a part.
    """
    rollouts = len(np.unique(rollout_ids)) if total_rollouts is None else total_rollouts
    return 1.0 / (_units_of_own_rollout(rollout_ids) * max(rollouts, 1))


def fixed_length(
    rollout_ids: np.ndarray, length: float, total_rollouts: int | None = None
) -> np.ndarray:
    """Sum over units, over a constant length, mean over rollouts (Dr. GRPO). Returns [U]."""
    rollouts = len(np.unique(rollout_ids)) if total_rollouts is None else total_rollouts
    return np.full(len(rollout_ids), 1.0 / (length * max(rollouts, 1)))


def unit_weights(
    mode: Aggregation, rollout_ids: np.ndarray, *, minibatch_size: float, fixed_length_tokens: float
) -> np.ndarray:
    """The weights [U] float64 of aggregation `mode` for all units of one minibatch."""
    if mode == "rollout_mean_over_constant":
        return rollout_mean_over_constant(rollout_ids, minibatch_size)
    if mode == "token_mean":
        return token_mean(rollout_ids)
    if mode == "sequence_mean":
        return sequence_mean(rollout_ids)
    if mode == "fixed_length":
        return fixed_length(rollout_ids, fixed_length_tokens)
    raise ValueError(
        f"unknown aggregation {mode!r}, expected rollout_mean_over_constant, token_mean, "
        "sequence_mean or fixed_length"
    )


def _units_of_own_rollout(rollout_ids: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(rollout_ids, return_inverse=True, return_counts=True)
    return counts[inverse].astype(np.float64)
