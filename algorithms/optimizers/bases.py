"""Bases: which coordinates of a gradient an optimizer keeps state for.

`down` takes a gradient to its coordinates, `add_up` adds coordinates back to weights. Which side
of a matrix is projected depends on its shape alone, so that a state fits whole and cut parameters.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loopwright.algorithms.optimizers import subspace
from loopwright.algorithms.optimizers.layout import Layout
from loopwright.algorithms.optimizers.options import Projection, Side
from loopwright.algorithms.optimizers.state_codecs import Codec, Noise, State, generator
from loopwright.algorithms.optimizers.subspace import OneSide

ALL_ROWS = slice(None)


class Basis(Protocol):
    """What gradients are projected with."""

    def shape(self, layout: Layout) -> tuple[int, ...]:
        """Local shape of the coordinates."""

    def sharded(self, layout: Layout) -> bool:
        """Are the coordinates cut by rows as the parameter is?"""

    def allocate(self, state: State, layout: Layout, codec: Codec, index: int) -> None:
        """Put what describes the basis of parameter number `index` into `state`."""

    def due(self, state: State, t: int) -> bool:
        """Does the update after `t` others begin with a new basis, which needs the gradient?"""

    def refresh(
        self, state: State, gradient: Tensor, layout: Layout, codec: Codec, t: int
    ) -> Tensor | None:
        """Take a new basis from the local gradient. Returns Q = oldᵀ·new where moments can be
        transported by it, else None."""

    def down(self, state: State, gradient: Tensor, layout: Layout, codec: Codec) -> Tensor:
        """Coordinates of the local gradient, fp32."""

    def add_up(
        self,
        state: State,
        weights: Tensor,
        coordinates: Tensor,
        factor: float,
        layout: Layout,
        codec: Codec,
    ) -> None:
        """weights += factor · (coordinates projected back), in place."""

    def decay(self, state: State, weights: Tensor, factor: float, layout: Layout) -> None:
        """weights *= factor, in place, where this basis trains them."""


class Steady:
    """What bases share that are never renewed by a gradient and train all weights."""

    def due(self, state: State, t: int) -> bool:
        """Never."""
        return False

    def refresh(
        self, state: State, gradient: Tensor, layout: Layout, codec: Codec, t: int
    ) -> Tensor | None:
        """Nothing to do."""
        return None

    def decay(self, state: State, weights: Tensor, factor: float, layout: Layout) -> None:
        """All of them."""
        weights.mul_(factor)


class Identity(Steady):
    """Every entry is a coordinate."""

    def shape(self, layout: Layout) -> tuple[int, ...]:
        return layout.local_shape(*layout.shape[1:]) if layout.shape else ()

    def sharded(self, layout: Layout) -> bool:
        return True

    def allocate(self, state: State, layout: Layout, codec: Codec, index: int) -> None:
        """Nothing describes it."""

    def down(self, state: State, gradient: Tensor, layout: Layout, codec: Codec) -> Tensor:
        return gradient.float()

    def add_up(
        self,
        state: State,
        weights: Tensor,
        coordinates: Tensor,
        factor: float,
        layout: Layout,
        codec: Codec,
    ) -> None:
        weights.add_(coordinates, alpha=factor)


@dataclass(frozen=True)
class LowRank(Steady):
    """The r leading singular directions of one side (GaLore, Zhao et al. 2024), or r random ones.

    right: R = G·V [m, r], rows stay rows, so nothing crosses ranks between refreshes; left:
    R = Uᵀ·G [r, n], summed over the ranks that hold rows. auto: right where m ≥ n, else left.
    """

    rank: int
    gap: int
    side: Side = "auto"
    projection: Projection = "subspace"
    seed: int = 0
    lazy: float = 0.0
    square_left: bool = False  # auto projects the left of square matrices (LDAdam's code)
    stagger: bool = False  # the second refresh comes early, by a share of the gap

    def side_of(self, layout: Layout) -> OneSide:
        """Which side of this parameter is projected."""
        if self.side != "auto":
            return self.side
        m, n = layout.matrix
        return "right" if m > n or (m == n and not self.square_left) else "left"

    def rank_of(self, layout: Layout) -> int:
        """The rank, cut to the smaller side."""
        return min(self.rank, *layout.matrix)

    def shape(self, layout: Layout) -> tuple[int, ...]:
        rank, right = self.rank_of(layout), self.side_of(layout) == "right"
        m, n = layout.matrix
        if layout.batched:
            batch = layout.local_shape(*layout.shape[1:-2])
            return (*batch, m, rank) if right else (*batch, rank, n)
        return layout.local_shape(rank) if right else (rank, n)

    def sharded(self, layout: Layout) -> bool:
        return layout.batched or self.side_of(layout) == "right"

    def allocate(self, state: State, layout: Layout, codec: Codec, index: int) -> None:
        state["refreshes"], state["next_refresh"], state["gap"] = 0, 0, self.gap
        # the golden ratio spreads any number of parameters evenly
        state["early"] = int(self.gap * (index * 0.6180339887 % 1)) if self.stagger else 0
        if self.projection == "random":
            state["basis_seed"] = self.seed + index + 1
            return
        size = layout.matrix[1] if self.side_of(layout) == "right" else layout.matrix[0]
        batch = layout.local_shape(*layout.shape[1:-2]) if layout.batched else ()
        shape = (*batch, size, self.rank_of(layout))
        codec.allocate(state, "basis", shape, layout, sharded=layout.batched)

    def due(self, state: State, t: int) -> bool:
        return t >= int(state["next_refresh"])

    def refresh(
        self, state: State, gradient: Tensor, layout: Layout, codec: Codec, t: int
    ) -> Tensor | None:
        had = int(state["refreshes"]) > 0
        old = self.matrix_of(state, layout, codec).clone() if had else None
        gap, count = int(state["gap"]), int(state["refreshes"])
        state["refreshes"] = count + 1
        if self.projection == "random":
            if count:
                state["basis_seed"] = next_seed(int(state["basis_seed"]))
            new = self.matrix_of(state, layout, codec)
        else:
            new = self._found(gradient, old, layout, count)
            self.keep(state, new, layout, codec)
            new = self.matrix_of(state, layout, codec)
        change = None if old is None else old.mT @ new
        if change is not None and self.lazy:
            similarity = float(change.square().sum() / change.shape[-1])
            if not layout.batched and similarity >= self.lazy:
                state["gap"] = gap = 2 * gap
        state["next_refresh"] = t + gap - (0 if count else int(state["early"]))
        return change

    def down(self, state: State, gradient: Tensor, layout: Layout, codec: Codec) -> Tensor:
        basis = self.matrix_of(state, layout, codec).to(gradient.dtype)
        if self.side_of(layout) == "right":
            return (gradient @ basis).float()
        return layout.sum((layout.own_rows(basis).mT @ gradient).float())

    def add_up(
        self,
        state: State,
        weights: Tensor,
        coordinates: Tensor,
        factor: float,
        layout: Layout,
        codec: Codec,
    ) -> None:
        basis = self.matrix_of(state, layout, codec)
        if self.side_of(layout) == "right":
            one, other = coordinates, basis.mT
        else:
            one, other = layout.own_rows(basis), coordinates
        if layout.batched:
            weights.flatten(0, -3).baddbmm_(one.flatten(0, -3), other.flatten(0, -3), alpha=factor)
        else:
            weights.addmm_(one, other, alpha=factor)

    def _found(self, gradient: Tensor, old: Tensor | None, layout: Layout, count: int) -> Tensor:
        side, rank, full = self.side_of(layout), self.rank_of(layout), gradient.float()
        if self.projection == "svd":
            return subspace.exact(full, rank, side, layout)
        # of unit size: squares of small gradients would leave the range of fp32
        size = layout.sum(full.square().sum((-2, -1), keepdim=True)).sqrt()
        full = full / size.clamp(min=1e-30)
        if self.projection == "subspace" and old is not None:
            return subspace.warm(full, old, side, layout)
        noise = generator(self.seed, layout.shape.numel(), count)
        return subspace.randomized(full, rank, side, layout, noise)

    def keep(self, state: State, basis: Tensor, layout: Layout, codec: Codec) -> None:
        """Store the basis [..., d, r]."""
        rows = basis.shape[:-1].numel()
        start = layout.row_start * basis.shape[-2] if layout.batched else 0
        whole = layout.shape[0] * basis.shape[-2] if layout.batched else rows
        noise = Noise((self.seed, 7, int(state["refreshes"])), whole, start)
        codec.write(state, "basis", basis, ALL_ROWS, noise)

    def matrix_of(self, state: State, layout: Layout, codec: Codec) -> Tensor:
        """The basis [..., d, r], fp32."""
        if self.projection != "random":
            return codec.read(state, "basis", ALL_ROWS)
        return random_basis(
            int(state["basis_seed"]), self.rank_of(layout), self.side_of(layout), layout
        )


def random_basis(seed: int, rank: int, side: OneSide, layout: Layout) -> Tensor:
    """Normal entries of variance 1/r, drawn anew from the seed whenever needed: it costs no memory
    (APOLLO, Zhu et al. 2025, Algorithm 1)."""
    m, n = layout.matrix
    shape = (rank, n) if side == "right" else (m, rank)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / rank**0.5
    drawn = drawn.to(layout.device)
    return drawn.mT if side == "right" else drawn


def next_seed(seed: int) -> int:
    """The seed of the basis after that of `seed`: the fifteenth integer it draws, as in APOLLO's
    published code."""
    source = torch.Generator().manual_seed(seed)
    return int(torch.randint(0, torch.iinfo(torch.int64).max, (15,), generator=source)[-1])
