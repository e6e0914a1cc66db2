"""From the groups of a step to the trainer's batch: advantages, drops, flat arrays, a report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from loopwright.algorithms.advantages import CRITIC, AdvantageError, advantages
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
    lag_tokens: tuple[int, ...]  # tokens the policy chose at lag 0, 1, …, of all rollouts
    spanning_rollouts: int  # whose tokens come from more than one policy version

    def metrics(self) -> dict[str, float]:
        """All of it by name; the histogram as one count a lag, `lag_0_tokens` and on."""
        values = asdict(self)
        histogram = values.pop("lag_tokens")
        return {name: float(value) for name, value in values.items()} | {
            f"lag_{lag}_tokens": float(count) for lag, count in enumerate(histogram)
        }


def smallest_group(advantage: str) -> int:
    """How many rollouts of a task the estimator `advantage` needs: a critic is a baseline for one
    alone, the others of its group are not."""
    return 1 if advantage == CRITIC else 2


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
    left out and counted; 0 keeps all. With `gae` the advantages are the trainer's to find, and
    rollouts are dropped only where nothing was generated. `version` is the policy version trained
    at, `step − 1` by default. Raises `AdvantageError` for a group that is too small.
    """
    trained_at = step - 1 if version is None else version
    rewards = [np.array([r.reward for r in group.rollouts], dtype=np.float64) for group in groups]
    for group, found in zip(groups, rewards, strict=True):
        if found.size < smallest_group(advantage):
            raise AdvantageError(
                f"group of task {group.task_id} (ticket {group.ticket}) holds K={found.size} "
                f"rollout(s); {advantage} "
                f"needs at least {smallest_group(advantage)}: raise the group size or keep more "
                "rollouts of each task"
            )
    values = np.concatenate(advantages(advantage, rewards)) if rewards else np.zeros(0)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    kept = [
        i
        for i, rollout in enumerate(rollouts)
        if (advantage == CRITIC or abs(values[i]) >= drop_below) and rollout.generated_tokens
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
        lag_tokens=_lag_histogram(rollouts, trained_at),
        spanning_rollouts=sum(len(np.unique(_versions(r))) > 1 for r in rollouts),
    )
    return batch, report


def _versions(rollout: Rollout) -> np.ndarray:
    """Policy version of each token that the policy chose."""
    found = [c.policy_versions[c.action_mask] for c in rollout.contexts]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int32)


def _lag_histogram(rollouts: Sequence[Rollout], trained_at: int) -> tuple[int, ...]:
    versions = [_versions(r) for r in rollouts]
    lags = trained_at - np.concatenate(versions) if versions else np.zeros(0, dtype=np.int64)
    return tuple(np.bincount(np.maximum(lags, 0)).tolist())


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
        policy_versions=flat([c.policy_versions for _, c in contexts], np.int32),
        turn_ids=flat([c.turn_ids for _, c in contexts], np.int16),
        lengths=np.array([len(c.token_ids) for _, c in contexts], dtype=np.int32),
        rollout_ids=owners,
        rewards=np.array([rollouts[i].reward for i in owners], dtype=np.float32),
        advantages=values[owners].astype(np.float32),
        rollout_count=len(rollouts),
    )
