"""Moving moments from one basis to the next (LDAdam, Robert et al. 2025, section 3.2).

With Q = oldᵀ·new: M' = M·Q, and the second moment keeps its variance under the change:
V' = c2·|(V/c2 − (M/c1)²)·Q² + (M·Q/c1)²|, Q² entry by entry, c the bias corrections of the
updates made so far. Signs and rotations of a basis then change nothing that matters.
"""

import torch
from torch import Tensor

from loopwright.algorithms.optimizers.inner import ALL_ROWS, Adam, Inner
from loopwright.algorithms.optimizers.state_codecs import Codec, Noise, State


def _turned(moment: Tensor, change: Tensor, right: bool) -> Tensor:
    return moment @ change if right else change.mT @ moment


def transport(
    state: State, inner: Inner, codec: Codec, change: Tensor, *, right: bool, t: int, noise: Noise
) -> None:
    """Express the moments of `inner` in the new basis; `change` = oldᵀ·new [..., r, r], `t` updates
    made so far, moments [m, r] (`right`) or [r, n]."""
    if "exp_avg" not in inner.moments or t == 0:
        return
    first = codec.read(state, "exp_avg", ALL_ROWS).clone()
    moved = _turned(first, change, right)
    if isinstance(inner, Adam):
        c1, c2 = 1 - inner.betas[0] ** t, 1 - inner.betas[1] ** t
        variance = codec.read(state, "exp_avg_sq", ALL_ROWS) / c2 - (first / c1).square()
        second = _turned(variance, change.square(), right).add_((moved / c1).square())
        codec.write(state, "exp_avg_sq", second.abs_().mul_(c2), ALL_ROWS, noise)
    codec.write(state, "exp_avg", moved.contiguous(), ALL_ROWS, noise)


def similarity(change: Tensor) -> float:
    """Overlap of two bases from their oldᵀ·new: 1 for the same subspace."""
    return float(torch.mean(change.square().sum(dim=(-2, -1))) / change.shape[-1])
