"""The advantage of every token of a batch: its rollout's, or what a critic finds, less a KL penalty
where that is part of the reward.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loopwright.actors.critic import Critic, Share, value_metrics
from loopwright.actors.objective import KLS, LossSettings, unit_keys
from loopwright.actors.packed_forward import MicroBatch
from loopwright.actors.ranks import Ranks
from loopwright.algorithms.gae import gae, reward_to_go, whitened
from loopwright.algorithms.records import TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchUnits:
    """The units of a whole batch, in the order of play: those that the loss has, or tokens."""

    places: np.ndarray  # [M] all tokens the policy chose
    unit_of_token: np.ndarray  # [M] the unit of each
    first: np.ndarray  # [U] index into `places` of each unit's first token
    rollout_ids: np.ndarray  # [U]
    sequences: np.ndarray  # [U] the sequence that holds its first token

    @classmethod
    def of(cls, settings: LossSettings, batch: TrainBatch) -> "BatchUnits":
        """Tokens, turns or whole rollouts, as `settings.level` says."""
        places = np.flatnonzero(batch.action_mask)
        owners = np.repeat(np.arange(len(batch.lengths)), batch.lengths)[places]
        keys = unit_keys(
            settings,
            places=places,
            turn_ids=batch.turn_ids,
            owners=owners,
            rollout_ids=batch.rollout_ids,
        )
        _, first, units = np.unique(keys, return_index=True, return_inverse=True)
        return cls(
            places=places,
            unit_of_token=units,
            first=first,
            rollout_ids=batch.rollout_ids[owners[first]],
            sequences=owners[first],
        )

    def spread(self, of_units: np.ndarray, tokens: int) -> np.ndarray:
        """Values [U] of units at each of their tokens: [N] float32, 0 elsewhere."""
        found = np.zeros(tokens, dtype=np.float32)
        found[self.places] = of_units[self.unit_of_token]
        return found

    def sums(self, of_tokens: np.ndarray) -> np.ndarray:
        """Sum of values [N] over the tokens of each unit: [U] float64."""
        return np.bincount(
            self.unit_of_token, weights=of_tokens[self.places], minlength=len(self.first)
        )

    def last_of_rollouts(self) -> np.ndarray:
        """Index of the last unit of each rollout."""
        _, from_end = np.unique(self.rollout_ids[::-1], return_index=True)
        return len(self.rollout_ids) - 1 - from_end


def kl_penalty(settings: LossSettings, lp: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """What each token's reward loses for leaving the reference policy: [N], of logprobs [N]."""
    divergence = KLS[settings.kl](torch.from_numpy(lp).double(), torch.from_numpy(reference))
    return settings.kl_coef * divergence.numpy()


def group_advantages(
    batch: TrainBatch, settings: LossSettings, penalty: np.ndarray | None
) -> np.ndarray:
    """Its rollout's advantage at each token: [N] float32. A penalty [N] is a reward of its own
    token, so a unit loses what is still to come of it: the exact policy gradient of the penalty's
    sum (Williams 1992), while the group stays the baseline of the task's reward alone.
    """
    found = np.repeat(batch.advantages, batch.lengths).astype(np.float32)
    if penalty is not None:
        units = BatchUnits.of(settings, batch)
        to_come = reward_to_go(units.sums(penalty), units.rollout_ids)
        found = found - units.spread(to_come, len(found))
    return found


def critic_advantages(
    batch: TrainBatch,
    settings: LossSettings,
    penalty: np.ndarray | None,
    *,
    critic: Critic,
    gamma: float,
    lam: float,
    states: Callable[[], list[tuple[MicroBatch, Tensor]]],
    minibatches: list[np.ndarray],
    ranks: Ranks,
) -> tuple[np.ndarray, dict[str, float]]:
    """Advantages [N] by GAE over units, whitened, and metrics; then the critic is trained on the
    returns, in the given minibatches of sequences.

    A rollout's reward comes with its last unit. `states` gives this rank's micro-batches with the
    hidden states [M, H] in front of their tokens.
    """
    units = BatchUnits.of(settings, batch)
    total = len(units.first)
    unit_of_place = np.full(len(batch.token_ids), -1, dtype=np.int64)
    unit_of_place[units.places[units.first]] = np.arange(total)
    own, found = [], []
    for micro, hidden in states():
        begins = unit_of_place[micro.tokens]
        own.append(begins[begins >= 0])
        found.append(hidden[torch.from_numpy(np.flatnonzero(begins >= 0)).to(hidden.device)])
    mine = np.concatenate(own) if own else np.zeros(0, dtype=np.int64)
    hidden = torch.cat(found)
    with torch.no_grad():
        before = critic.values(hidden)
    values = np.zeros(total)
    values[mine] = before.double().cpu().numpy()
    values = ranks.sum(values)
    rewards = np.zeros(total) if penalty is None else -units.sums(penalty)
    last = units.last_of_rollouts()
    rewards[last] += batch.rewards[units.sequences[last]]
    advantages, returns = gae(values, rewards, units.rollout_ids, gamma=gamma, lam=lam)
    share = Share(
        total=total,
        units=mine,
        states=hidden,
        before=before,
        targets=torch.from_numpy(returns[mine].astype(np.float32)).to(hidden.device),
    )
    loss = critic.fit(
        share,
        [np.flatnonzero(np.isin(units.sequences, chosen)) for chosen in minibatches],
        ranks,
    )
    tokens = len(batch.token_ids)
    return units.spread(whitened(advantages), tokens), value_metrics(values, returns, loss)
