"""The inner optimizers: from a (projected) gradient to a direction, with states in some codec.

`direction` returns (N, size): the weights go by −lr · size · N. Everything is element by element
except where a class says so.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loopwright.algorithms.optimizers.layout import Layout
from loopwright.algorithms.optimizers.options import EpsMode
from loopwright.algorithms.optimizers.state_codecs import Codec, Noise, State

ALL_ROWS = slice(None)


class Inner(Protocol):
    """What turns gradients into directions."""

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the states that have the shape of the gradient."""

    @property
    def elementwise(self) -> bool:
        """Is every entry treated by itself?"""

    def allocate(
        self, state: State, shape: tuple[int, ...], layout: Layout, codec: Codec, *, sharded: bool
    ) -> None:
        """Put the states for a gradient of local `shape` into `state`."""

    def direction(
        self,
        state: State,
        gradient: Tensor,
        t: int,
        codec: Codec,
        rows: slice,
        noise: Noise,
        layout: Layout,
    ) -> tuple[Tensor, float]:
        """(N, size) for the `rows` of the gradient, `t` updates having been made before."""


class _Moments:
    @property
    def moments(self) -> tuple[str, ...]:
        """None, where a subclass names none."""
        return ()

    @property
    def elementwise(self) -> bool:
        """It is, where a subclass does not say otherwise."""
        return True

    def allocate(
        self, state: State, shape: tuple[int, ...], layout: Layout, codec: Codec, *, sharded: bool
    ) -> None:
        """One tensor of the gradient's shape for each moment."""
        for name in self.moments:
            codec.allocate(state, name, shape, layout, sharded=sharded)


@dataclass(frozen=True)
class Adam(_Moments):
    """Adam (Kingma & Ba 2015); M and V with bias correction.

    `uncorrected`: N = M/(√V + eps), size √(1−b2^k)/(1−b1^k), as GaLore and its relatives have it;
    `corrected`: N = M/(√(V/(1−b2^k)) + eps), size 1/(1−b1^k), as torch has it. k = t + 1.
    """

    betas: tuple[float, float]
    eps: float
    eps_mode: EpsMode

    @property
    def moments(self) -> tuple[str, ...]:
        """M and V."""
        return ("exp_avg", "exp_avg_sq")

    def direction(
        self,
        state: State,
        gradient: Tensor,
        t: int,
        codec: Codec,
        rows: slice,
        noise: Noise,
        layout: Layout,
    ) -> tuple[Tensor, float]:
        """(N, size); both moments are updated."""
        b1, b2 = self.betas
        first = codec.read(state, "exp_avg", rows)
        second = codec.read(state, "exp_avg_sq", rows)
        first.mul_(b1).add_(gradient, alpha=1 - b1)
        second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        correction_1, correction_2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        root = second.sqrt()
        if self.eps_mode == "uncorrected":
            size = math.sqrt(correction_2) / correction_1
        else:
            root.div_(math.sqrt(correction_2))
            size = 1 / correction_1
        direction = torch.div(first, root.add_(self.eps), out=root)
        codec.write(state, "exp_avg", first, rows, noise)
        codec.write(state, "exp_avg_sq", second, rows, noise)
        return direction, size


@dataclass(frozen=True)
class Sgd(_Moments):
    """Stochastic gradient descent; with `momentum` as torch has it: M = momentum·M + R."""

    momentum: float = 0.0

    @property
    def moments(self) -> tuple[str, ...]:
        """None without momentum: SGD then has no state at all."""
        return ("exp_avg",) if self.momentum else ()

    def direction(
        self,
        state: State,
        gradient: Tensor,
        t: int,
        codec: Codec,
        rows: slice,
        noise: Noise,
        layout: Layout,
    ) -> tuple[Tensor, float]:
        """(R or M, 1)."""
        if not self.momentum:
            return gradient, 1.0
        first = codec.read(state, "exp_avg", rows)
        first.mul_(self.momentum).add_(gradient)
        codec.write(state, "exp_avg", first, rows, noise)
        return first, 1.0


@dataclass(frozen=True)
class SignSgd(Sgd):
    """The sign of the gradient; with `momentum` that of its average (Bernstein et al. 2018)."""

    def direction(
        self,
        state: State,
        gradient: Tensor,
        t: int,
        codec: Codec,
        rows: slice,
        noise: Noise,
        layout: Layout,
    ) -> tuple[Tensor, float]:
        """(sign, 1)."""
        if not self.momentum:
            return gradient.sign(), 1.0
        first = codec.read(state, "exp_avg", rows)
        first.mul_(self.momentum).add_(gradient, alpha=1 - self.momentum)
        codec.write(state, "exp_avg", first, rows, noise)
        return first.sign(), 1.0


@dataclass(frozen=True)
class Lion(_Moments):
    """Lion (Chen et al. 2023, Algorithm 2): sign(b1·M + (1−b1)·R), then M = b2·M + (1−b2)·R."""

    betas: tuple[float, float]

    @property
    def moments(self) -> tuple[str, ...]:
        """M."""
        return ("exp_avg",)

    def direction(
        self,
        state: State,
        gradient: Tensor,
        t: int,
        codec: Codec,
        rows: slice,
        noise: Noise,
        layout: Layout,
    ) -> tuple[Tensor, float]:
        """(sign, 1)."""
        b1, b2 = self.betas
        first = codec.read(state, "exp_avg", rows)
        direction = torch.add(first * b1, gradient, alpha=1 - b1).sign_()
        first.mul_(b2).add_(gradient, alpha=1 - b2)
        codec.write(state, "exp_avg", first, rows, noise)
        return direction, 1.0
