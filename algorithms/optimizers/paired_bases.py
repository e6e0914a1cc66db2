"""Bases that take more than one look: both sides of a matrix (GradNormLoRP), and one that follows
the momentum at every update (LDAdam)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loopwright.algorithms.optimizers import subspace
from loopwright.algorithms.optimizers.bases import LowRank, Steady
from loopwright.algorithms.optimizers.inner import ALL_ROWS
from loopwright.algorithms.optimizers.layout import Layout
from loopwright.algorithms.optimizers.state_codecs import Codec, Noise, State, generator, stored
from loopwright.algorithms.optimizers.subspace import OneSide

ROUNDING = 1e-5  # of the largest coordinate: smaller ones are noise


@dataclass(frozen=True)
class TwoSided(Steady):
    """R = Uᵀ·G·V [r, r], the leading singular directions of both sides; both are replicated."""

    rank: int
    gap: int
    projection: str = "subspace"
    seed: int = 0

    def rank_of(self, layout: Layout) -> int:
        """The rank, cut to the smaller side."""
        return min(self.rank, *layout.matrix)

    def shape(self, layout: Layout) -> tuple[int, ...]:
        rank = self.rank_of(layout)
        batch = layout.local_shape(*layout.shape[1:-2]) if layout.batched else ()
        return (*batch, rank, rank)

    def sharded(self, layout: Layout) -> bool:
        return layout.batched

    def allocate(self, state: State, layout: Layout, codec: Codec, index: int) -> None:
        state["refreshes"], state["next_refresh"] = 0, 0
        batch = layout.local_shape(*layout.shape[1:-2]) if layout.batched else ()
        for name, size in zip(("basis.left", "basis.right"), layout.matrix, strict=True):
            shape = (*batch, size, self.rank_of(layout))
            codec.allocate(state, name, shape, layout, sharded=layout.batched)

    def due(self, state: State, t: int) -> bool:
        """Every `gap` updates."""
        return t >= int(state["next_refresh"])

    def refresh(
        self, state: State, gradient: Tensor, layout: Layout, codec: Codec, t: int
    ) -> Tensor | None:
        """New bases of both sides; moments are not transported, for both sides turn."""
        size = layout.sum(gradient.square().sum((-2, -1), keepdim=True)).sqrt()
        full, rank = gradient / size.clamp(min=1e-30), self.rank_of(layout)
        count = int(state["refreshes"])
        sides: tuple[OneSide, ...] = ("left", "right")
        for side in sides:
            if self.projection == "svd":
                found = subspace.exact(full, rank, side, layout)
            elif self.projection == "subspace" and count:
                old = codec.read(state, f"basis.{side}", ALL_ROWS)
                found = subspace.warm(full, old, side, layout)
            else:
                noise = generator(self.seed, layout.shape.numel(), count)
                found = subspace.randomized(full, rank, side, layout, noise)
            rows = found.shape[:-1].numel()
            codec.write(state, f"basis.{side}", found, ALL_ROWS, Noise((self.seed, count), rows, 0))
        state["refreshes"], state["next_refresh"] = count + 1, t + self.gap
        return None

    def down(self, state: State, gradient: Tensor, layout: Layout, codec: Codec) -> Tensor:
        left, right = self._both(state, codec)
        found = layout.sum(layout.own_rows(left).mT @ (gradient @ right))
        # In fresh bases R is diagonal but for rounding, which Adam would make as large as the rest.
        least = found.abs().amax((-2, -1), keepdim=True) * ROUNDING
        return torch.where(found.abs() < least, torch.zeros_like(found), found)

    def add_up(
        self,
        state: State,
        weights: Tensor,
        coordinates: Tensor,
        factor: float,
        layout: Layout,
        codec: Codec,
    ) -> None:
        left, right = self._both(state, codec)
        weights.add_(layout.own_rows(left) @ coordinates @ right.mT, alpha=factor)

    def _both(self, state: State, codec: Codec) -> tuple[Tensor, Tensor]:
        return (
            codec.read(state, "basis.left", ALL_ROWS),
            codec.read(state, "basis.right", ALL_ROWS),
        )


@dataclass(frozen=True)
class Tracked(LowRank):
    """LDAdam (Robert et al. 2025, Algorithm 1): at every update one step of power iteration on
    B = ρ·(momentum) + (1−ρ)·(gradient), and what the projections of gradient and momentum leave out
    is added to the next gradient (`error_feedback`: one number a weight, kept in fp32)."""

    rho: float = 0.908
    beta: float = 0.9  # of the first moment
    moments: Codec | None = None  # where it is kept
    error_feedback: bool = True

    def allocate(self, state: State, layout: Layout, codec: Codec, index: int) -> None:
        LowRank.allocate(self, state, layout, codec, index)
        if self.error_feedback:
            shape = layout.local_shape(*layout.shape[1:])
            state["error"] = layout.sharded(torch.zeros(shape, device=layout.device))

    def due(self, state: State, t: int) -> bool:
        """Always."""
        return True

    def refresh(
        self, state: State, gradient: Tensor, layout: Layout, codec: Codec, t: int
    ) -> Tensor | None:
        """The next basis; the last update's error is added to `gradient` in place."""
        assert self.moments is not None
        if self.error_feedback:
            gradient.add_(stored(state, "error"))
        side, count = self.side_of(layout), int(state["refreshes"])
        if count == 0:
            new = self._found(gradient, None, layout, 0)
            old, momentum = None, None
        else:
            old = self.matrix_of(state, layout, codec).clone()
            momentum = torch.zeros_like(gradient)
            first = self.moments.read(state, "exp_avg", ALL_ROWS)
            self.add_up(state, momentum, first, 1.0, layout, codec)
            mixed = momentum * (self.rho / (1 - self.beta**t)) + (1 - self.rho) * gradient
            size = layout.sum(mixed.square().sum((-2, -1), keepdim=True)).sqrt()
            mixed = mixed / size.clamp(min=1e-30)
            new = torch.linalg.qr(subspace.gram(mixed, old, side, layout))[0]
        state["refreshes"] = count + 1
        self.keep(state, new, layout, codec)
        if self.error_feedback:
            self._remember(state, gradient, momentum, layout, codec)
        return None if old is None else old.mT @ new

    def _remember(
        self,
        state: State,
        gradient: Tensor,
        momentum: Tensor | None,
        layout: Layout,
        codec: Codec,
    ) -> None:
        """error = what the new basis loses of gradient + b1/(1−b1)·momentum."""
        whole = gradient.clone()
        if momentum is not None:
            whole.add_(momentum, alpha=self.beta / (1 - self.beta))
        error = stored(state, "error").copy_(whole)
        self.add_up(state, error, self.down(state, whole, layout, codec), -1.0, layout, codec)
