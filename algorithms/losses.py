"""Policy losses, one small function each: tensors in, loss per unit out. Nothing is averaged here.

A *unit* is what carries one importance ratio: a token, a turn or a whole trajectory. `lp`, `prox`
and `mu` are the current, proximal and behavior logprobs of U units (`sum_by_unit` makes turn or
trajectory units from tokens), `advantage` is [U]. Every function returns the loss to **minimise**,
[U]; `algorithms.aggregation` weights the units.
"""

from typing import Literal

import torch
from torch import Tensor

ClipForm = Literal["paper", "code"]


def sum_by_unit(values: Tensor, unit_ids: Tensor, units: int) -> Tensor:
    """Sum of `values` [M] over the tokens of each unit: [units]. `unit_ids` [M] int64 in 0 …
    units−1.
    """
    return values.new_zeros(units).index_add(0, unit_ids, values)


def mean_by_unit(values: Tensor, unit_ids: Tensor, units: int) -> Tensor:
    """Mean of `values` [M] over the tokens of each unit: [units]; 0 for a unit without tokens."""
    counts = sum_by_unit(torch.ones_like(values), unit_ids, units)
    return sum_by_unit(values, unit_ids, units) / counts.clamp(min=1)


def clip_bounds(clip: float, form: ClipForm) -> tuple[float, float]:
    """Lower and upper bound of the ratio.

    `paper`: [1−ε, 1+ε], from g(A) = A + ε·abs(A) (LOOP eq. 4). `code`: [1/(1+ε), 1+ε] (LOOP's
    code), usable for ε > 1.
    """
    if form == "paper":
        return 1.0 - clip, 1.0 + clip
    if form == "code":
        return 1.0 / (1.0 + clip), 1.0 + clip
    raise ValueError(f"unknown clip form {form!r}, expected 'paper' or 'code'")


def ppo(
    lp: Tensor,
    prox: Tensor,
    advantage: Tensor,
    *,
    low: float,
    high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """−min(r·A, g(A)) with r = exp(lp − prox), g(A) = high·A for A ≥ 0 else low·A (PPO eq. 7; LOOP
    eq. 4).

    Unbounded for A < 0 as r grows; `dual_clip` = c > 1 bounds it by −c·A (dual-clip PPO, Ye et al.
    2020, eq. 6).
    """
    ratio = torch.exp(lp - prox)
    bound = torch.where(advantage >= 0, high * advantage, low * advantage)
    objective = torch.minimum(ratio * advantage, bound)
    if dual_clip is not None:
        objective = torch.where(
            advantage < 0, torch.maximum(objective, dual_clip * advantage), objective
        )
    return -objective


def ppo_clipped(
    lp: Tensor,
    prox: Tensor,
    advantage: Tensor,
    *,
    low: float,
    high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """Which units `ppo` holds at a bound, and hence gives no gradient: [U] bool."""
    ratio = torch.exp(lp - prox)
    negative = advantage < 0
    clipped = torch.where(negative, ratio < low, ratio > high) & (advantage != 0)
    if dual_clip is not None:
        clipped = clipped | (negative & (ratio > dual_clip))
    return clipped


def aipo(
    lp: Tensor,
    mu: Tensor,
    advantage: Tensor,
    *,
    cap: float,
    grad: Literal["stopgrad", "through"] = "stopgrad",
) -> Tensor:
    """Importance weight min(exp(lp − mu), ρ), capped on one side, times A (AIPO, LlamaRL eq. 4).

    `stopgrad`: the weight is a constant in front of A·lp, so the gradient ρ·A·∇lp survives past the
    cap (the paper's form). `through`: the weight itself is the objective, with gradient 0 past the
    cap (public code). The returned value is −weight·A in both.
    """
    if grad == "through":
        return -torch.exp(lp - mu).clamp(max=cap) * advantage
    if grad != "stopgrad":
        raise ValueError(f"unknown aipo gradient {grad!r}, expected 'stopgrad' or 'through'")
    weight = torch.exp(lp.detach() - mu).clamp(max=cap)
    # lp − lp.detach() is 0 in value and ∇lp in gradient: the value stays comparable with `through`.
    return -weight * advantage * (1.0 + lp - lp.detach())


def decoupled(
    lp: Tensor,
    prox: Tensor,
    mu: Tensor,
    advantage: Tensor,
    *,
    low: float,
    high: float,
    cap: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """exp(prox − mu), capped at `cap`, times PPO around the proximal policy (AReaL eq. 5)."""
    weight = truncated_is(prox, mu, cap=cap if cap is not None else float("inf"))
    return weight * ppo(lp, prox, advantage, low=low, high=high, dual_clip=dual_clip)


def reinforce(lp: Tensor, advantage: Tensor) -> Tensor:
    """−A·lp (Williams 1992)."""
    return -advantage * lp


def cispo(lp: Tensor, prox: Tensor, advantage: Tensor, *, low: float, high: float) -> Tensor:
    """REINFORCE with the clipped ratio as a constant weight: every token keeps a gradient (CISPO,
    MiniMax-M1 eq. 4).
    """
    weight = torch.exp(lp.detach() - prox).clamp(min=low, max=high)
    return -weight * advantage * lp


def gspo(lp: Tensor, prox: Tensor, advantage: Tensor, *, low: float, high: float) -> Tensor:
    """PPO loss on the geometric mean of a sequence's token ratios (GSPO eq. 5–7).

    `lp` and `prox` are the means over the sequence's tokens (`mean_by_unit`).
    """
    return ppo(lp, prox, advantage, low=low, high=high)


def loglinear_proximal(lp: Tensor, mu: Tensor, lag: Tensor) -> Tensor:
    """Proximal logprobs without a pass of their own: log μ + α·(log π − log μ), a constant (A-3PO,
    arXiv 2512.06547, §3).

    `lag` [M] is the policy lag of each token: versions from the one that sampled it to the one that
    this step starts from, which is what the proximal policy is. On the line of versions from the
    sampler's (0) to the one being made (lag + 1) it lies at lag, so α = lag / (lag + 1): a token
    without lag has the behavior policy as its proximal one.
    """
    alpha = lag / (lag + 1.0)
    return (mu + alpha * (lp - mu)).detach()


def truncated_is(prox: Tensor, mu: Tensor, *, cap: float) -> Tensor:
    """Mismatch weight min(exp(prox − mu), cap), a constant (truncated importance sampling, Ionides
    2008).
    """
    return torch.exp(prox - mu).clamp(max=cap).detach()


def masked_is(prox: Tensor, mu: Tensor, *, low: float, high: float) -> Tensor:
    """Mismatch weight exp(prox − mu) where it lies in [low, high], 0 elsewhere; a constant (IcePop,
    two-sided).
    """
    weight = torch.exp(prox - mu).detach()
    return torch.where((weight >= low) & (weight <= high), weight, torch.zeros_like(weight))


def sequence_log_ratio(
    prox: Tensor, mu: Tensor, sequence_ids: Tensor, sequences: int, *, geometric: bool
) -> Tensor:
    """Log of one mismatch ratio for each whole sequence: [sequences], of tokens [M].

    The product of the tokens' ratios is unbiased, and its variance grows with the length;
    `geometric` takes their geometric mean, whose scale does not depend on the length (Liu and Li
    2025, "When Speed Kills Stability"). `truncated_is` and `masked_is` bound it.
    """
    combine = mean_by_unit if geometric else sum_by_unit
    return combine(prox - mu, sequence_ids, sequences)


def effective_sample_share(weight_sum: float, weight_square_sum: float, count: int) -> float:
    """(Σw)² / (n·Σw²): the share of n samples that weights w leave effective (Kish 1965); 1 where
    all are equal, 0 without any.
    """
    return weight_sum**2 / (count * weight_square_sum) if weight_square_sum > 0 else 0.0


def value_loss(value: Tensor, before: Tensor, target: Tensor, *, clip: float) -> Tensor:
    """½·max((v − R)², (v_clipped − R)²), v_clipped within `clip` of the value `before` the update:
    [U] (PPO's value clipping, Schulman et al.'s code; Huang et al. 2022, detail 9).
    """
    near = before + (value - before).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - target) ** 2, (near - target) ** 2)


def k1(lp: Tensor, reference: Tensor) -> Tensor:
    """KL(current ‖ reference) at sampled tokens: lp − ref; unbiased, high variance (Schulman,
    "Approximating KL").
    """
    return lp - reference


def k2(lp: Tensor, reference: Tensor) -> Tensor:
    """½(lp − ref)²; biased, low variance, with the right gradient (Schulman)."""
    return 0.5 * (lp - reference) ** 2


def k3(lp: Tensor, reference: Tensor) -> Tensor:
    """e^d − d − 1 with d = ref − lp; unbiased and never negative (Schulman)."""
    difference = reference - lp
    return torch.expm1(difference) - difference
