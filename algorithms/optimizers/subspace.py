"""Orthonormal bases of dominant subspaces of a gradient G [..., m, n], wherever its rows are.

side "right": V [..., n, r], the leading right singular vectors; "left": U [..., m, r]. Stacks of
matrices (expert weights) are handled matrix by matrix.
"""

from typing import Literal

import torch
from torch import Tensor

from loopwright.algorithms.optimizers.layout import Layout

OneSide = Literal["left", "right"]
OVERSAMPLING = 32  # columns beyond the rank in a randomized SVD


def exact(gradient: Tensor, rank: int, side: OneSide, layout: Layout) -> Tensor:
    """By a full SVD in fp32, as GaLore has it. Ranks that share rows exchange the whole G."""
    u, _, vh = torch.linalg.svd(layout.gather(gradient.float()), full_matrices=False)
    return vh[..., :rank, :].mT.contiguous() if side == "right" else u[..., :rank].contiguous()


def gram(gradient: Tensor, block: Tensor, side: OneSide, layout: Layout) -> Tensor:
    """GᵀG·block (right) or GGᵀ·block (left): one all-reduce of n×r (left: and one of m×r)."""
    if side == "right":
        return layout.sum(gradient.mT @ (gradient @ block))
    return layout.gather(gradient @ layout.sum(gradient.mT @ layout.own_rows(block)))


def randomized(
    gradient: Tensor, rank: int, side: OneSide, layout: Layout, noise: torch.Generator
) -> Tensor:
    """By a randomized SVD with oversampling and two power iterations (Halko et al. 2011)."""
    size = gradient.shape[-1] if side == "right" else layout.matrix[0]
    width = min(rank + OVERSAMPLING, size)
    start = torch.randn((size, width), generator=noise).to(gradient.device)
    block = start.expand(*gradient.shape[:-2], size, width)
    for _ in range(2):
        block = torch.linalg.qr(gram(gradient, block, side, layout))[0]
    return _ritz(block, gram(gradient, block, side, layout))[..., :rank].contiguous()


def warm(gradient: Tensor, basis: Tensor, side: OneSide, layout: Layout) -> Tensor:
    """One step of subspace iteration from the last `basis`, with Rayleigh–Ritz, which orders the
    directions: Adam is not rotation invariant. Signs follow the last basis. One product with the
    Gram matrix; everything after it is small and replicated.
    """
    image = gram(gradient, basis, side, layout)
    found = torch.linalg.qr(_ritz(image, image, within=basis))[0]
    signs = (found * basis).sum(-2, keepdim=True).sign()
    return found * torch.where(signs == 0, torch.ones_like(signs), signs)


def _ritz(block: Tensor, image: Tensor, within: Tensor | None = None) -> Tensor:
    """`block`·W with W the eigenvectors of basisᵀ·image, largest eigenvalue first."""
    projected = (block if within is None else within).mT @ image
    _, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    return block @ vectors.flip(-1)


def overlap(one: Tensor, other: Tensor) -> float:
    """‖Aᵀ·B‖²/r of two orthonormal bases: 1 for the same subspace, r/n for random ones."""
    return float((one.mT @ other).square().sum() / (one.shape[-1] * one[..., 0, 0].numel()))
