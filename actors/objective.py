"""The objective of one minibatch: which loss over which units with which weights.

Composed of pure functions by three tables: `LOSSES` (what a unit's loss is), `MISMATCHES` (how the
weight of proximal against behavior policy is taken and bounded) and `KLS`. The units are tokens,
turns or whole rollouts; `algorithms.aggregation` weights them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from loopwright.actors.tally import Tally
from loopwright.algorithms import losses
from loopwright.algorithms.aggregation import Aggregation, unit_weights

Level = Literal["token", "turn", "trajectory"]
LossName = Literal["ppo", "decoupled", "aipo", "reinforce", "cispo", "gspo"]
MismatchName = Literal[
    "none",
    "truncated_is",
    "masked_is",
    "sequence_is",
    "sequence_mask",
    "geometric_is",
    "geometric_mask",
]
KlName = Literal["none", "k1", "k2", "k3"]


class ObjectiveError(ValueError):
    """Loss settings that name nothing known or contradict each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """Everything about the loss, plain values; meanings in `algorithms.losses` and
    `algorithms.aggregation`.
    """

    loss: LossName = "ppo"
    level: Level = "token"
    clip_form: losses.ClipForm = "code"
    clip: float = 0.1
    dual_clip: float = 3.0  # 0: off
    mismatch: MismatchName = "truncated_is"
    mismatch_cap: float = 2.0
    mismatch_low: float = 0.5
    aggregation: Aggregation = "rollout_mean_over_constant"
    fixed_length_tokens: float = 1024.0  # of `fixed_length` alone
    aipo_rho: float = 4.0
    aipo_grad: Literal["stopgrad", "through"] = "stopgrad"
    kl: KlName = "none"  # against the reference policy
    kl_coef: float = 0.0
    kl_in: Literal["loss", "reward"] = "loss"

    def __post_init__(self) -> None:
        known = {
            "loss": get_args(LossName),
            "level": get_args(Level),
            "clip_form": get_args(losses.ClipForm),
            "mismatch": get_args(MismatchName),
            "aipo_grad": ("stopgrad", "through"),
            "aggregation": get_args(Aggregation),
            "kl": get_args(KlName),
            "kl_in": ("loss", "reward"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ObjectiveError(
                    f"{name}={getattr(self, name)!r}, expected one of {', '.join(values)}"
                )
        if 0 < self.dual_clip <= 1:
            raise ObjectiveError(f"dual_clip={self.dual_clip}, expected 0 (off) or more than 1")
        if self.level != "token" and self.loss not in ("ppo", "decoupled"):
            raise ObjectiveError(
                f"level={self.level!r} is of losses 'ppo' and 'decoupled' alone, not "
                f"{self.loss!r}; use 'token'"
            )

    @property
    def needs_whole_rollouts(self) -> bool:
        """Whether all tokens of a rollout, in all its instances, must meet in one micro-batch."""
        return (
            self.level == "trajectory"
            or self.loss == "gspo"
            or MISMATCHES[self.mismatch].scope == "rollout"
        )


@dataclass(frozen=True, slots=True)
class _Units:
    """U units with one ratio each."""

    lp: Tensor  # [U], differentiable
    prox: Tensor  # [U]
    mu: Tensor  # [U]
    advantage: Tensor  # [U]


@dataclass(frozen=True, slots=True)
class _Loss:
    """A loss of the table: the function gives the loss [U] and which units are at a bound [U]."""

    function: Callable[[_Units, LossSettings], tuple[Tensor, Tensor]]
    # how a unit's logprob comes of those of its tokens: [M], ids [M], U -> [U]
    unit_logprob: Callable[[Tensor, Tensor, int], Tensor] = losses.sum_by_unit
    weighs: bool = False  # against the behavior policy by itself: no mismatch weight on top


@dataclass(frozen=True, slots=True)
class _Mismatch:
    """How exp(proximal − behavior) is taken, and bounded: masked outside bounds, or capped."""

    scope: Literal["none", "unit", "rollout"]
    masked: bool = False
    geometric: bool = False


def _ppo(units: _Units, settings: LossSettings) -> tuple[Tensor, Tensor]:
    low, high = losses.clip_bounds(settings.clip, settings.clip_form)
    dual = settings.dual_clip or None
    lp, prox, advantage = units.lp, units.prox, units.advantage
    loss = losses.ppo(lp, prox, advantage, low=low, high=high, dual_clip=dual)
    clipped = losses.ppo_clipped(lp.detach(), prox, advantage, low=low, high=high, dual_clip=dual)
    return loss, clipped


def _decoupled(units: _Units, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """`mismatch` says how its weight is bounded; with "none" it is not, and stands in the loss."""
    loss, clipped = _ppo(units, settings)
    if settings.mismatch != "none":
        return loss, clipped
    low, high = losses.clip_bounds(settings.clip, settings.clip_form)
    loss = losses.decoupled(
        units.lp,
        units.prox,
        units.mu,
        units.advantage,
        low=low,
        high=high,
        dual_clip=settings.dual_clip or None,
    )
    return loss, clipped


def _gspo(units: _Units, settings: LossSettings) -> tuple[Tensor, Tensor]:
    low, high = losses.clip_bounds(settings.clip, settings.clip_form)
    lp, prox, advantage = units.lp, units.prox, units.advantage
    loss = losses.gspo(lp, prox, advantage, low=low, high=high)
    return loss, losses.ppo_clipped(lp.detach(), prox, advantage, low=low, high=high)


def _cispo(units: _Units, settings: LossSettings) -> tuple[Tensor, Tensor]:
    low, high = losses.clip_bounds(settings.clip, settings.clip_form)
    ratio = torch.exp(units.lp.detach() - units.prox)
    loss = losses.cispo(units.lp, units.prox, units.advantage, low=low, high=high)
    return loss, (ratio < low) | (ratio > high)


def _aipo(units: _Units, settings: LossSettings) -> tuple[Tensor, Tensor]:
    loss = losses.aipo(
        units.lp, units.mu, units.advantage, cap=settings.aipo_rho, grad=settings.aipo_grad
    )
    return loss, torch.exp(units.lp.detach() - units.mu) > settings.aipo_rho


def _reinforce(units: _Units, _settings: LossSettings) -> tuple[Tensor, Tensor]:
    loss = losses.reinforce(units.lp, units.advantage)
    return loss, torch.zeros_like(loss, dtype=torch.bool)


LOSSES: Mapping[str, _Loss] = {
    "ppo": _Loss(_ppo),
    "decoupled": _Loss(_decoupled),
    "gspo": _Loss(_gspo, unit_logprob=losses.mean_by_unit),
    "cispo": _Loss(_cispo),
    "aipo": _Loss(_aipo, weighs=True),
    "reinforce": _Loss(_reinforce),
}
MISMATCHES: Mapping[str, _Mismatch] = {
    "none": _Mismatch("none"),
    "truncated_is": _Mismatch("unit"),
    "masked_is": _Mismatch("unit", masked=True),
    "sequence_is": _Mismatch("rollout"),
    "sequence_mask": _Mismatch("rollout", masked=True),
    "geometric_is": _Mismatch("rollout", geometric=True),
    "geometric_mask": _Mismatch("rollout", masked=True, geometric=True),
}
KLS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": losses.k1,
    "k2": losses.k2,
    "k3": losses.k3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MinibatchUnits:
    """The action tokens of one minibatch and the units they form. `unit_of_place` is [N], −1 off
    the minibatch.
    """

    unit_of_place: np.ndarray  # [N] int64
    weights: np.ndarray  # [U] float32
    advantages: np.ndarray  # [U] float32
    rollout_ids: np.ndarray  # [U] int64, whose unit it is
    rollouts: int  # that take part


def unit_keys(
    settings: LossSettings,
    *,
    places: np.ndarray,
    turn_ids: np.ndarray,
    owners: np.ndarray,
    rollout_ids: np.ndarray,
) -> np.ndarray:
    """A number for the unit of each token at `places` [M]: equal within a unit, ascending in the
    order of play. `owners` [M] is the sequence of each of them, `rollout_ids` [S]. Returns [M].
    """
    if settings.loss == "gspo" or settings.level == "trajectory":
        return rollout_ids[owners].astype(np.int64)
    if settings.level == "turn":
        return owners.astype(np.int64) * (1 << 16) + turn_ids[places]
    return np.arange(len(places), dtype=np.int64)


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

    `sequence_of_place` [N] is the sequence of each token; `rollout_ids` is [S]; `advantages` [N]
    are those of tokens, of which a unit has the mean; `minibatch_size` is the constant number of
    rollouts, dropped ones included, that the loss is divided by.
    """
    taking_part = np.zeros(len(rollout_ids), dtype=bool)
    taking_part[chosen] = True
    places = np.flatnonzero(action_mask & taking_part[sequence_of_place])
    owners = sequence_of_place[places]
    keys = unit_keys(
        settings, places=places, turn_ids=turn_ids, owners=owners, rollout_ids=rollout_ids
    )
    _, first, units, counts = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    unit_rollouts = rollout_ids[owners[first]].astype(np.int64)
    unit_of_place = np.full(len(action_mask), -1, dtype=np.int64)
    unit_of_place[places] = units
    weights = unit_weights(
        settings.aggregation,
        unit_rollouts,
        minibatch_size=minibatch_size,
        fixed_length_tokens=settings.fixed_length_tokens,
    )
    # the sum of equal float32 numbers is exact in float64: a unit of them has their very value
    sums = np.bincount(units, weights=advantages[places], minlength=len(counts))
    return MinibatchUnits(
        unit_of_place=unit_of_place,
        weights=weights.astype(np.float32),
        advantages=(sums / counts).astype(np.float32),
        rollout_ids=unit_rollouts,
        rollouts=len(np.unique(unit_rollouts)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Logprobs of M tokens under every policy that the loss compares: [M] each."""

    current: Tensor  # differentiable
    proximal: Tensor
    behavior: Tensor
    reference: Tensor | None = None  # where there is a KL penalty in the loss


def weighted_loss(
    settings: LossSettings,
    units: MinibatchUnits,
    places: np.ndarray,
    logprobs: TokenLogprobs,
    tally: Tally,
) -> tuple[Tensor, float]:
    """Part of the minibatch's loss that the tokens at `places` [M] make, and the sum of their
    log-ratios.

    Tokens of one unit must come together; those of one rollout too where
    `LossSettings.needs_whole_rollouts` says so.
    """
    present, local = np.unique(units.unit_of_place[places], return_inverse=True)
    lp, count = logprobs.current, len(present)
    unit_ids = torch.from_numpy(local).to(lp.device)
    entry = LOSSES[settings.loss]
    of_units = _Units(
        lp=entry.unit_logprob(lp, unit_ids, count),
        prox=entry.unit_logprob(logprobs.proximal, unit_ids, count),
        mu=entry.unit_logprob(logprobs.behavior, unit_ids, count),
        advantage=torch.from_numpy(units.advantages[present]).to(lp.device),
    )
    unit_loss, clipped = entry.function(of_units, settings)
    if not entry.weighs:
        log_ratio = _mismatch_log_ratio(settings, of_units, logprobs, units, present, local)
        weight = _bounded(settings, log_ratio)
        unit_loss = unit_loss * weight
        tally.capped_units += float((weight != torch.exp(log_ratio)).sum())
    if logprobs.reference is not None and settings.kl_in == "loss":
        divergence = KLS[settings.kl](lp, logprobs.reference)
        unit_loss = unit_loss + settings.kl_coef * losses.mean_by_unit(divergence, unit_ids, count)
        tally.reference_kl += float(divergence.detach().sum())
    loss = (unit_loss * torch.from_numpy(units.weights[present]).to(lp.device)).sum()
    log_ratio_sum = float((lp.detach() - logprobs.proximal).sum())
    tally.tokens += len(lp)
    tally.units += count
    tally.loss += float(loss.detach())
    tally.clipped_units += float(clipped.sum())
    tally.negative_logprob -= float(lp.detach().sum())
    tally.kl_k1 -= log_ratio_sum
    return loss, log_ratio_sum


def _mismatch_log_ratio(
    settings: LossSettings,
    of_units: _Units,
    logprobs: TokenLogprobs,
    units: MinibatchUnits,
    present: np.ndarray,
    local: np.ndarray,
) -> Tensor:
    """Log of the mismatch weight of each unit, before it is bounded: [U]."""
    mismatch = MISMATCHES[settings.mismatch]
    if mismatch.scope == "none":
        return torch.zeros_like(of_units.prox)
    if mismatch.scope == "unit":
        return of_units.prox - of_units.mu
    found, owner = np.unique(units.rollout_ids[present], return_inverse=True)
    owners = torch.from_numpy(owner).to(of_units.lp.device)
    by_rollout = losses.sequence_log_ratio(
        logprobs.proximal,
        logprobs.behavior,
        torch.from_numpy(owner[local]).to(of_units.lp.device),
        len(found),
        geometric=mismatch.geometric,
    )
    return by_rollout[owners]


def _bounded(settings: LossSettings, log_ratio: Tensor) -> Tensor:
    """The mismatch weights exp(`log_ratio`) [U], capped or masked."""
    if settings.mismatch == "none":
        return torch.ones_like(log_ratio)
    behavior = torch.zeros_like(log_ratio)
    if MISMATCHES[settings.mismatch].masked:
        return losses.masked_is(
            log_ratio, behavior, low=settings.mismatch_low, high=settings.mismatch_cap
        )
    return losses.truncated_is(log_ratio, behavior, cap=settings.mismatch_cap)
