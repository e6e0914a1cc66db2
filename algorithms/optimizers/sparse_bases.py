"""Bases that keep some entries of a parameter: a random mask (SPAM), or coupled channels (S2FT)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loopwright.algorithms.optimizers.bases import Steady
from loopwright.algorithms.optimizers.layout import Layout
from loopwright.algorithms.optimizers.state_codecs import Codec, State, generator, stored


@dataclass(frozen=True)
class Mask(Steady):
    """A share `density` of the entries of every row, drawn at random and again at every reset
    (SPAM, Huang et al. 2025, section 4.3): coordinates [m, k]."""

    density: float
    seed: int

    def kept(self, layout: Layout) -> int:
        """Entries kept of each row."""
        return max(int(self.density * layout.shape[-1]), 1)

    def shape(self, layout: Layout) -> tuple[int, ...]:
        return layout.local_shape(*layout.shape[1:-1], self.kept(layout))

    def sharded(self, layout: Layout) -> bool:
        return True

    def allocate(self, state: State, layout: Layout, codec: Codec, index: int) -> None:
        shape = layout.local_shape(*layout.shape[1:])
        mask = torch.zeros(shape, dtype=torch.bool, device=layout.device)
        state["mask"], state["draws"], state["index"] = layout.sharded(mask), 0, index
        self.redraw(state, layout)

    def redraw(self, state: State, layout: Layout) -> None:
        """Draw the next mask: the same one on however many ranks."""
        draws = int(state["draws"])
        state["draws"] = draws + 1
        mask = stored(state, "mask")
        if mask.device.type == "meta":
            return
        noise = generator(self.seed, int(state["index"]), draws)
        whole = torch.rand(layout.shape, generator=noise)
        own = whole[layout.row_start : layout.row_start + layout.rows].to(mask.device)
        chosen = own.topk(self.kept(layout), dim=-1).indices
        mask.zero_().scatter_(-1, chosen, True)

    def down(self, state: State, gradient: Tensor, layout: Layout, codec: Codec) -> Tensor:
        return gradient[stored(state, "mask")].view(self.shape(layout)).float()

    def add_up(
        self,
        state: State,
        weights: Tensor,
        coordinates: Tensor,
        factor: float,
        layout: Layout,
        codec: Codec,
    ) -> None:
        mask = stored(state, "mask")
        weights.masked_scatter_(mask, weights[mask].add_(coordinates.flatten(), alpha=factor))

    def decay(self, state: State, weights: Tensor, factor: float, layout: Layout) -> None:
        """Of the entries that are trained."""
        mask = stored(state, "mask")
        weights.masked_scatter_(mask, weights[mask].mul_(factor))


@dataclass(frozen=True)
class Channels(Steady):
    """Some rows or columns, the same for parameters of one `coupling`: coordinates [k, n] or
    [m, k] (S2FT, Yang et al. 2024, section 3.2)."""

    axis: Literal["rows", "columns"]
    channels: tuple[int, ...]

    def shape(self, layout: Layout) -> tuple[int, ...]:
        m, n = layout.matrix
        count = len(self.channels)
        return (count, n) if self.axis == "rows" else (m, count)

    def sharded(self, layout: Layout) -> bool:
        return False

    def allocate(self, state: State, layout: Layout, codec: Codec, index: int) -> None:
        state["channels"] = torch.tensor(self.channels, device="cpu")

    def down(self, state: State, gradient: Tensor, layout: Layout, codec: Codec) -> Tensor:
        return gradient.index_select(self._axis, self._index(state, gradient)).float()

    def add_up(
        self,
        state: State,
        weights: Tensor,
        coordinates: Tensor,
        factor: float,
        layout: Layout,
        codec: Codec,
    ) -> None:
        weights.index_add_(self._axis, self._index(state, weights), coordinates, alpha=factor)

    def decay(self, state: State, weights: Tensor, factor: float, layout: Layout) -> None:
        """Of the channels that are trained."""
        index = self._index(state, weights)
        part = weights.index_select(self._axis, index).mul_(factor)
        weights.index_copy_(self._axis, index, part)

    @property
    def _axis(self) -> int:
        return 0 if self.axis == "rows" else 1

    def _index(self, state: State, like: Tensor) -> Tensor:
        return stored(state, "channels").to(like.device)
