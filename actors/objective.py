"""The objective of one minibatch: which loss over which units with which weights, and what it says
about itself.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from loopwright.actors.ranks import Ranks
from loopwright.algorithms import losses
from loopwright.algorithms.aggregation import Aggregation, unit_weights

Level = Literal["token", "turn", "trajectory"]


class ObjectiveError(ValueError):
    """Loss settings that name nothing known or contradict each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """Everything about the loss, plain values; meanings in `algorithms.losses` and
    `algorithms.aggregation`.
    """

    loss: Literal["ppo", "aipo", "reinforce", "cispo", "gspo"] = "ppo"
    level: Level = "token"
    clip_form: losses.ClipForm = "code"
    clip: float = 0.1
    dual_clip: float = 3.0  # 0: off
    mismatch: Literal["none", "truncated_is", "masked_is"] = "truncated_is"
    mismatch_cap: float = 2.0
    mismatch_low: float = 0.5
    aggregation: Aggregation = "rollout_mean_over_constant"
    fixed_length_tokens: float = 1024.0  # of `fixed_length` alone
    aipo_rho: float = 4.0
    aipo_grad: Literal["stopgrad", "through"] = "stopgrad"

    def __post_init__(self) -> None:
        known = {
            "loss": ("ppo", "aipo", "reinforce", "cispo", "gspo"),
            "level": ("token", "turn", "trajectory"),
            "clip_form": ("paper", "code"),
            "mismatch": ("none", "truncated_is", "masked_is"),
            "aipo_grad": ("stopgrad", "through"),
            "aggregation": get_args(Aggregation),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ObjectiveError(
                    f"{name}={getattr(self, name)!r}, expected one of {', '.join(values)}"
                )
        if 0 < self.dual_clip <= 1:
            raise ObjectiveError(f"dual_clip={self.dual_clip}, expected 0 (off) or more than 1")
        if self.level != "token" and self.loss != "ppo":
            raise ObjectiveError(
                f"level={self.level!r} is of loss 'ppo' alone, not {self.loss!r}; use 'token'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MinibatchUnits:
    """The action tokens of one minibatch and the units they form. `unit_of_place` is [N], −1 off
    the minibatch.
    """

    unit_of_place: np.ndarray  # [N] int64
    weights: np.ndarray  # [U] float32
    advantages: np.ndarray  # [U] float32
    rollouts: int  # that take part


def minibatch_units(
    settings: LossSettings,
    *,
    action_mask: np.ndarray,
    turn_ids: np.ndarray,
    sequence_of_place: np.ndarray,
    rollout_ids: np.ndarray,
    advantages: np.ndarray,
    chosen: np.ndarray,
    minibatch_size: float,
) -> MinibatchUnits:
    """Units of the `chosen` sequences [s] of a batch of N tokens and S sequences.

    `sequence_of_place` [N] is the sequence of each token; `rollout_ids`, `advantages` are [S];
    `minibatch_size` is the constant number of rollouts, dropped ones included, that the loss is
    divided by.
    """
    taking_part = np.zeros(len(rollout_ids), dtype=bool)
    taking_part[chosen] = True
    places = np.flatnonzero(action_mask & taking_part[sequence_of_place])
    owners = sequence_of_place[places]
    if settings.loss == "gspo" or settings.level == "trajectory":
        keys = rollout_ids[owners].astype(np.int64)
    elif settings.level == "turn":
        keys = owners.astype(np.int64) * (1 << 16) + turn_ids[places]
    else:
        keys = np.arange(len(places), dtype=np.int64)
    _, first, units = np.unique(keys, return_index=True, return_inverse=True)
    unit_rollouts = rollout_ids[owners[first]]
    unit_of_place = np.full(len(action_mask), -1, dtype=np.int64)
    unit_of_place[places] = units
    weights = unit_weights(
        settings.aggregation,
        unit_rollouts,
        minibatch_size=minibatch_size,
        fixed_length_tokens=settings.fixed_length_tokens,
    )
    return MinibatchUnits(
        unit_of_place=unit_of_place,
        weights=weights.astype(np.float32),
        advantages=advantages[owners[first]].astype(np.float32),
        rollouts=len(np.unique(unit_rollouts)),
    )


@dataclass(slots=True, kw_only=True)
class Tally:
    """Sums over the action tokens of a step; `means` turns them into metrics."""

    tokens: int = 0
    units: int = 0
    loss: float = 0.0
    clipped_units: float = 0.0
    negative_logprob: float = 0.0  # its mean over sampled tokens estimates the entropy
    kl_k1: float = 0.0  # of proximal against current
    mismatch_tokens: int = 0
    mismatch_k3: float = 0.0  # of proximal against behavior
    mismatch_abs: float = 0.0
    mismatch_max: float = 0.0
    log_ratio_by_minibatch: list[float] = field(default_factory=list)

    def add_mismatch(self, proximal: Tensor, behavior: Tensor) -> None:
        """Count how far the trainer's proximal logprobs [M] lie from the sampler's [M]."""
        gap = (proximal - behavior).abs()
        self.mismatch_tokens += len(gap)
        self.mismatch_k3 += float(losses.k3(behavior, proximal).sum())
        self.mismatch_abs += float(gap.sum())
        self.mismatch_max = max(self.mismatch_max, float(gap.max()) if len(gap) else 0.0)

    def summed(self, ranks: Ranks) -> "Tally":
        """Over all ranks: sums, and the largest where the name ends in _max; the log-ratios are of
        all ranks already."""
        names = [f.name for f in fields(self) if f.name != "log_ratio_by_minibatch"]
        own = np.array([float(getattr(self, name)) for name in names])
        largest = [name.endswith("_max") for name in names]
        totals = np.where(largest, ranks.max(own), ranks.sum(own))
        return replace(self, **dict(zip(names, totals.tolist(), strict=True)))

    def means(self) -> dict[str, float]:
        """The metrics, by name."""
        tokens, units = max(self.tokens, 1), max(self.units, 1)
        compared = max(self.mismatch_tokens, 1)
        return {
            "train/ratio_clipped_frac": self.clipped_units / units,
            "train/entropy_mean": self.negative_logprob / tokens,
            "train/kl_k1_mean": self.kl_k1 / tokens,
            "train/mismatch_kl_k3_mean": self.mismatch_k3 / compared,
            "train/mismatch_abs_mean": self.mismatch_abs / compared,
            "train/mismatch_abs_max": self.mismatch_max,
            "train/log_ratio_sum_max": max(
                (abs(v) for v in self.log_ratio_by_minibatch), default=0.0
            ),
        }


def weighted_loss(
    settings: LossSettings,
    units: MinibatchUnits,
    places: np.ndarray,
    lp: Tensor,
    prox: Tensor,
    mu: Tensor,
    tally: Tally,
) -> tuple[Tensor, float]:
    """Part of the minibatch's loss that the tokens at `places` [M] make, and the sum of their
    log-ratios.

    `lp`, `prox`, `mu` are their current, proximal and behavior logprobs [M]. Tokens of one unit
    must come together.
    """
    present, local = np.unique(units.unit_of_place[places], return_inverse=True)
    device, count = lp.device, len(present)
    advantage = torch.from_numpy(units.advantages[present]).to(device)
    weight = torch.from_numpy(units.weights[present]).to(device)
    unit_ids = torch.from_numpy(local).to(device)
    unit_loss, clipped = _unit_loss(settings, lp, prox, mu, advantage, unit_ids, count)
    loss = (unit_loss * weight).sum()
    log_ratio = lp.detach() - prox
    tally.tokens += len(lp)
    tally.units += count
    tally.loss += float(loss.detach())
    tally.clipped_units += float(clipped)
    tally.negative_logprob -= float(lp.detach().sum())
    tally.kl_k1 -= float(log_ratio.sum())
    return loss, float(log_ratio.sum())


def _unit_loss(
    settings: LossSettings,
    lp: Tensor,
    prox: Tensor,
    mu: Tensor,
    advantage: Tensor,
    unit_ids: Tensor,
    count: int,
) -> tuple[Tensor, float]:
    """Loss [count] of each unit, mismatch weight included, and how many are clipped."""
    low, high = losses.clip_bounds(settings.clip, settings.clip_form)
    if settings.loss == "gspo":
        loss = losses.gspo(lp, prox, advantage, unit_ids, count, low=low, high=high)
        prox, mu = (losses.mean_by_unit(v, unit_ids, count) for v in (prox, mu))
        return loss * _mismatch_weight(settings, prox, mu), 0.0
    lp, prox, mu = (losses.sum_by_unit(v, unit_ids, count) for v in (lp, prox, mu))
    clipped = 0.0
    if settings.loss == "ppo":
        dual = settings.dual_clip or None
        loss = losses.ppo(lp, prox, advantage, low=low, high=high, dual_clip=dual)
        clipped = float(
            losses.ppo_clipped(
                lp.detach(), prox, advantage, low=low, high=high, dual_clip=dual
            ).sum()
        )
    elif settings.loss == "aipo":  # corrects against the sampler itself: no mismatch weight on top
        return losses.aipo(lp, mu, advantage, cap=settings.aipo_rho, grad=settings.aipo_grad), 0.0
    elif settings.loss == "cispo":
        loss = losses.cispo(lp, prox, advantage, low=low, high=high)
    else:
        loss = losses.reinforce(lp, advantage)
    return loss * _mismatch_weight(settings, prox, mu), clipped


def _mismatch_weight(settings: LossSettings, prox: Tensor, mu: Tensor) -> Tensor | float:
    if settings.mismatch == "truncated_is":
        return losses.truncated_is(prox, mu, cap=settings.mismatch_cap)
    if settings.mismatch == "masked_is":
        return losses.masked_is(prox, mu, low=settings.mismatch_low, high=settings.mismatch_cap)
    return 1.0
