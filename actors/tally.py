"""What a training step counts over its tokens and units, and the metrics that come of it."""

from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from loopwright.actors.ranks import Ranks
from loopwright.algorithms import losses


@dataclass(slots=True, kw_only=True)
class Tally:
    """Sums over the action tokens of a step; `means` turns them into metrics."""

    tokens: int = 0
    units: int = 0
    loss: float = 0.0
    clipped_units: float = 0.0  # held at a bound of the ratio
    capped_units: float = 0.0  # whose mismatch weight was capped or masked
    negative_logprob: float = 0.0  # its mean over sampled tokens estimates the entropy
    kl_k1: float = 0.0  # of proximal against current
    reference_kl: float = 0.0  # the penalty in the loss, before its coefficient
    mismatch_tokens: int = 0
    mismatch_k3: float = 0.0  # of proximal against behavior
    mismatch_abs: float = 0.0
    mismatch_max: float = 0.0
    weight: float = 0.0  # exp(proximal − behavior), not bounded
    weight_square: float = 0.0
    log_ratio_by_minibatch: list[float] = field(default_factory=list)

    def add_mismatch(self, proximal: Tensor, behavior: Tensor) -> None:
        """Count how far the trainer's proximal logprobs [M] lie from the sampler's [M]."""
        gap = (proximal - behavior).abs()
        weight = torch.exp(proximal.double() - behavior.double())
        self.mismatch_tokens += len(gap)
        self.mismatch_k3 += float(losses.k3(behavior, proximal).sum())
        self.mismatch_abs += float(gap.sum())
        self.mismatch_max = max(self.mismatch_max, float(gap.max()) if len(gap) else 0.0)
        self.weight += float(weight.sum())
        self.weight_square += float((weight**2).sum())

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
            "train/mismatch_capped_frac": self.capped_units / units,
            "train/mismatch_ess_frac": losses.effective_sample_share(
                self.weight, self.weight_square, compared
            ),
            "train/entropy_mean": self.negative_logprob / tokens,
            "train/kl_k1_mean": self.kl_k1 / tokens,
            "train/kl_reference_mean": self.reference_kl / tokens,
            "train/mismatch_kl_k3_mean": self.mismatch_k3 / compared,
            "train/mismatch_abs_mean": self.mismatch_abs / compared,
            "train/mismatch_abs_max": self.mismatch_max,
            "train/log_ratio_sum_max": max(
                (abs(v) for v in self.log_ratio_by_minibatch), default=0.0
            ),
        }
