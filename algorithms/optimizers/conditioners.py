"""Conditioners: what is done to a projected gradient before the inner optimizer sees it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loopwright.algorithms.optimizers.inner import ALL_ROWS
from loopwright.algorithms.optimizers.layout import Layout, sum_over
from loopwright.algorithms.optimizers.state_codecs import Codec, Noise, State


class Conditioner(Protocol):
    """Changes coordinates R [local] of a gradient."""

    @property
    def elementwise(self) -> bool:
        """Can rows be handled piece by piece?"""

    def allocate(
        self, state: State, shape: tuple[int, ...], layout: Layout, codec: Codec, *, sharded: bool
    ) -> None:
        """Put its own states into `state`."""

    def apply(
        self,
        state: State,
        coordinates: Tensor,
        layout: Layout,
        codec: Codec,
        rows: slice,
        noise: Noise,
        *,
        sharded: bool,
    ) -> Tensor:
        """The coordinates to go on with; those given may be changed in place."""


@dataclass(frozen=True)
class SpikeClip:
    """SPAM (Huang et al. 2025, equation 1): where R² > θ·V, R becomes sign(R)·√(θV); V as it was
    before this update, and only once the moments are `window` updates old."""

    theta: float
    window: int
    elementwise = True

    def allocate(
        self, state: State, shape: tuple[int, ...], layout: Layout, codec: Codec, *, sharded: bool
    ) -> None:
        """It has none."""

    def apply(
        self,
        state: State,
        coordinates: Tensor,
        layout: Layout,
        codec: Codec,
        rows: slice,
        noise: Noise,
        *,
        sharded: bool,
    ) -> Tensor:
        if int(state["age"]) < self.window:
            return coordinates
        limit = codec.read(state, "exp_avg_sq", rows) * self.theta
        spikes = coordinates.square() > limit
        return torch.where(spikes, coordinates.sign() * limit.sqrt(), coordinates)


@dataclass(frozen=True)
class Fisher:
    """Natural gradient from the last s gradients G_s = [g_1 … g_s], this one included (Natural
    GaLore, Das 2024): (λI + G_s·G_sᵀ)⁻¹·g = g/λ − G_s·S⁻¹·(G_sᵀ·g)/λ², S = I + G_sᵀ·G_s/λ.

    The history is in the coordinates of one basis: a new basis flushes it.
    """

    history: int
    damping: float
    elementwise = False

    def allocate(
        self, state: State, shape: tuple[int, ...], layout: Layout, codec: Codec, *, sharded: bool
    ) -> None:
        state["remembered"] = 0
        for k in range(self.history):
            codec.allocate(state, f"history.{k}", shape, layout, sharded=sharded)

    def apply(
        self,
        state: State,
        coordinates: Tensor,
        layout: Layout,
        codec: Codec,
        rows: slice,
        noise: Noise,
        *,
        sharded: bool,
    ) -> Tensor:
        count = int(state["remembered"])
        codec.write(state, f"history.{count % self.history}", coordinates, rows, noise)
        state["remembered"] = count + 1
        used, place = min(count + 1, self.history), count % self.history
        past = torch.stack(
            [
                (coordinates if k == place else codec.read(state, f"history.{k}", ALL_ROWS))
                .flatten()
                .double()
                for k in range(used)
            ]
        )
        products = past @ past.mT
        if sharded:
            products = sum_over(products, layout.group)
        # g is a column of G_s, so (λI + G_sG_sᵀ)⁻¹·g = G_s·(λI + G_sᵀG_s)⁻¹·e_g: the same number
        # without the difference of nearly equal vectors that the formula above is.
        eye = torch.eye(used, dtype=products.dtype, device=products.device)
        weights = torch.linalg.solve(self.damping * eye + products, eye[place])
        natural = (weights @ past).float()
        return natural.view_as(coordinates)
