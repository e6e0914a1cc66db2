"""From the groups of a step to the trainer's batch: advantages, drops, flat arrays, a report."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loopwright.algorithms.advantages import AdvantageError, advantages
from loopwright.algorithms.records import Context, Group, Rollout, TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """What went into a step, and what did not."""

    groups: int
    rollouts: int  # dropped ones included
    trained_rollouts: int
    dropped_rollouts: int  # advantage below the threshold, or nothing generated
    zero_variance_groups: int  # all rewards equal: the group teaches nothing
    sequences: int  # context instances in the batch
    tokens: int  # in the batch, observations included
    action_tokens: int  # in the batch, chosen by the policy
    generated_tokens: int  # chosen by the policy in all rollouts, dropped ones included
    reward_mean: float
    success_mean: float
    advantage_abs_mean: float  # of the trained rollouts
    lag_mean: float  # versions between the trainer and a rollout's oldest token
    lag_max: int


def build_batch(
    groups: Sequence[Group],
    step: int,
    advantage: str = "leave_one_out",
    drop_below: float = 0.01,
    *,
    version: int | None = None,
) -> tuple[TrainBatch, BatchReport]:
    """The batch of `step` and its report.

    Groups keep their order. Rollouts whose |advantage| < `drop_below` carry no gradient: they are
    left out and counted. `version` is the policy version trained at, `step − 1` by default. Raises
    `AdvantageError` for a group of one rollout.
    """
    trained_at = step - 1 if version is None else version
    rewards = [np.array([r.reward for r in group.rollouts], dtype=np.float64) for group in groups]
    for group, values in zip(groups, rewards, strict=True):
        if values.size < 2:
            raise AdvantageError(
                f"group of task {group.task_id} (ticket {group.ticket}) holds K={values.size} "
                f"rollout(s); {advantage} "
                "needs at least 2 for a baseline: raise the group size or keep more rollouts of "
                "each task"
            )
    values = np.concatenate(advantages(advantage, rewards)) if rewards else np.zeros(0)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    kept = [
        i
        for i, rollout in enumerate(rollouts)
        if abs(values[i]) >= drop_below and values[i] != 0 and rollout.generated_tokens
    ]
    batch = _flatten(rollouts, kept, values, step)
    lags = [trained_at - r.oldest_version for r in rollouts if r.oldest_version >= 0]
    report = BatchReport(
        groups=len(groups),
        rollouts=len(rollouts),
        trained_rollouts=len(kept),
        dropped_rollouts=len(rollouts) - len(kept),
        zero_variance_groups=sum(1 for r in rewards if np.ptp(r) == 0),
        sequences=len(batch.lengths),
        tokens=len(batch.token_ids),
        action_tokens=int(batch.action_mask.sum()),
        generated_tokens=sum(r.generated_tokens for r in rollouts),
        reward_mean=float(np.mean([r.reward for r in rollouts])) if rollouts else 0.0,
        success_mean=float(np.mean([r.success for r in rollouts])) if rollouts else 0.0,
        advantage_abs_mean=float(np.abs(values[kept]).mean()) if kept else 0.0,
        lag_mean=float(np.mean(lags)) if lags else 0.0,
        lag_max=max(lags, default=0),
    )
    return batch, report


def _flatten(
    rollouts: Sequence[Rollout], kept: Sequence[int], values: np.ndarray, step: int
) -> TrainBatch:
    # An instance in which the policy chose nothing has no loss: it would only cost compute.
    contexts: list[tuple[int, Context]] = [
        (i, c) for i in kept for c in rollouts[i].contexts if c.action_mask.any()
    ]
    owners = np.array([i for i, _ in contexts], dtype=np.int32)

    def flat(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)

    return TrainBatch(
        step=step,
        token_ids=flat([c.token_ids for _, c in contexts], np.int32),
        action_mask=flat([c.action_mask for _, c in contexts], np.bool_),
        behavior_logprobs=flat([c.behavior_logprobs for _, c in contexts], np.float32),
        turn_ids=flat([c.turn_ids for _, c in contexts], np.int16),
        lengths=np.array([len(c.token_ids) for _, c in contexts], dtype=np.int32),
        rollout_ids=owners,
        advantages=values[owners].astype(np.float32),
        rollout_count=len(rollouts),
    )
