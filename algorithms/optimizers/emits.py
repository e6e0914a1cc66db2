"""Emitters: from a direction in the coordinates of a basis to a change of the weights."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from loopwright.algorithms.optimizers.bases import Basis, LowRank
from loopwright.algorithms.optimizers.layout import Layout, sum_over
from loopwright.algorithms.optimizers.state_codecs import Codec, State

TINY = 1e-8  # added to norms that are divided by (APOLLO's and Fira's code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What an emitter sees of one update of one parameter."""

    state: State
    layout: Layout
    codec: Codec  # of the basis
    basis: Basis
    weights: Tensor  # local, fp32, changed in place
    gradient: Tensor | None  # local and whole, fp32; None where the emitter does not ask for it
    coordinates: Tensor  # R, as the inner optimizer saw it
    direction: Tensor  # N
    lr: float
    decay: float  # lr · weight decay that the weights have had already; 0 if it comes after
    factor: float  # −lr · size

    def back(self, coordinates: Tensor) -> Tensor:
        """Coordinates projected back, as a new local tensor."""
        whole = torch.zeros_like(self.weights)
        self.basis.add_up(self.state, whole, coordinates, 1.0, self.layout, self.codec)
        return whole


class Emit(Protocol):
    """What is done with a direction."""

    needs_gradient: bool  # does it use the gradient beside its coordinates?

    def allocate(self, state: State, layout: Layout) -> None:
        """Put its own states into `state`."""

    def enter(self, weights: Tensor, gradient: Tensor) -> Tensor:
        """The gradient that the basis is to see, from that of the weights."""

    def apply(self, step: Step) -> None:
        """Change the weights."""


class _Plain:
    def allocate(self, state: State, layout: Layout) -> None:
        """It has none."""

    def enter(self, weights: Tensor, gradient: Tensor) -> Tensor:
        """As it is."""
        return gradient


@dataclass(frozen=True)
class Back(_Plain):
    """Project back, times `scale` (GaLore)."""

    scale: float = 1.0
    needs_gradient = False

    def apply(self, step: Step) -> None:
        """weights += factor · scale · back(N)."""
        factor = step.factor * self.scale
        step.basis.add_up(step.state, step.weights, step.direction, factor, step.layout, step.codec)


def _norm(local: Tensor, layout: Layout) -> Tensor:
    """Norm of a row-sharded matrix; of each matrix of a stack."""
    return layout.sum(local.square().sum((-2, -1), keepdim=True)).sqrt()


def _limited(step: Step, change: Tensor, limiter: float) -> Tensor:
    """The norm-growth limiter of Fira (Chen et al. 2024, equation 9): an update's norm grows at
    most `limiter`-fold from one update to the next."""
    norm = _norm(change, step.layout)
    last = step.state["last_norm"]
    assert isinstance(last, Tensor)
    last = step.layout.local(last)
    if int(step.state["emitted"]):
        excess = torch.clamp(norm / (last + TINY), min=limiter) / limiter
        change, norm = change / excess, norm / excess
    last.copy_(norm)
    step.state["emitted"] = 1
    return change


def _allocate_norm(state: State, layout: Layout) -> None:
    shape = (*layout.local_shape(*layout.shape[1:-2]), 1, 1) if layout.batched else (1, 1)
    norm = torch.zeros(shape, device=layout.device)
    state["last_norm"] = layout.sharded(norm) if layout.batched else norm
    state["emitted"] = 0


def _channel_norms(step: Step, coordinates: Tensor) -> Tensor:
    """Norm of each row ([m, r] coordinates) or column ([r, n])."""
    assert isinstance(step.basis, LowRank)
    right = step.basis.side_of(step.layout) == "right"
    return coordinates.norm(dim=-1 if right else -2, keepdim=True)


@dataclass(frozen=True)
class NormScale(_Plain):
    """APOLLO (Zhu et al. 2025, Algorithm 1): the raw gradient, each channel (`channel`) or all of
    it (`tensor`, APOLLO-Mini) scaled as the inner optimizer scaled the coordinates, times √scale,
    with Fira's limiter."""

    scale: float
    kind: Literal["channel", "tensor"]
    limiter: float
    needs_gradient = True

    def allocate(self, state: State, layout: Layout) -> None:
        """The norm of the last update."""
        _allocate_norm(state, layout)

    def apply(self, step: Step) -> None:
        """weights += factor · √scale · limited(G · ‖N‖/‖R‖)."""
        assert step.gradient is not None
        if self.kind == "channel":
            ratio = _channel_norms(step, step.direction)
            ratio = ratio / (_channel_norms(step, step.coordinates) + TINY)
        else:
            cut = step.basis.sharded(step.layout) and not step.layout.batched
            group = step.layout.group if cut else None
            squares = torch.stack(
                [x.square().sum((-2, -1), keepdim=True) for x in (step.direction, step.coordinates)]
            )
            top, bottom = sum_over(squares, group).sqrt()
            ratio = top / (bottom + TINY)
        change = _limited(step, step.gradient * ratio, self.limiter)
        step.weights.add_(change, alpha=step.factor * self.scale**0.5)


@dataclass(frozen=True)
class ScaledResidual(_Plain):
    """Fira (Chen et al. 2024, Algorithm 1): the direction projected back, plus what the projection
    left out of the gradient, scaled channel by channel as the inner optimizer scaled the rest, with
    the limiter."""

    scale: float
    limiter: float
    needs_gradient = True

    def allocate(self, state: State, layout: Layout) -> None:
        """The norm of the last residual."""
        _allocate_norm(state, layout)

    def apply(self, step: Step) -> None:
        """weights += factor · (scale·back(N) + limited((G − scale·back(R)) · ‖N‖/‖R‖))."""
        assert step.gradient is not None
        ratio = _channel_norms(step, step.direction)
        ratio = ratio / (_channel_norms(step, step.coordinates) + TINY)
        rest = (step.gradient - self.scale * step.back(step.coordinates)) * ratio
        step.weights.add_(_limited(step, rest, self.limiter), alpha=step.factor)
        factor = step.factor * self.scale
        step.basis.add_up(step.state, step.weights, step.direction, factor, step.layout, step.codec)


@dataclass(frozen=True)
class SignResidual(_Plain):
    """FRUGAL (Zmushko et al. 2025, Algorithm 1): the direction projected back, plus `scale` times
    the sign of what the projection left out: SignSGD where there is no state."""

    scale: float
    needs_gradient = True

    def apply(self, step: Step) -> None:
        """weights += factor · back(N) − lr · scale · sign(G − back(R))."""
        assert step.gradient is not None
        rest = (step.gradient - step.back(step.coordinates)).sign_()
        step.weights.add_(rest, alpha=-self.scale * step.lr)
        step.basis.add_up(
            step.state, step.weights, step.direction, step.factor, step.layout, step.codec
        )


@dataclass(frozen=True)
class WeightNorm:
    """GradNormLoRP (Huang et al. 2025): W = g·v/‖v‖ row by row. The direction v goes by the
    projected update, the gain g by Adam on dg = ⟨dW, v/‖v‖⟩, and W is put together again, so
    nothing but W has to be kept."""

    scale: float
    betas: tuple[float, float]
    eps: float
    needs_gradient = True

    def allocate(self, state: State, layout: Layout) -> None:
        """Moments of the gain of each row."""
        for name in ("gain_avg", "gain_avg_sq"):
            rows = layout.local_shape(*layout.shape[1:-1], 1)
            state[name] = layout.sharded(torch.zeros(rows, device=layout.device))

    def enter(self, weights: Tensor, gradient: Tensor) -> Tensor:
        """dV = (g/‖v‖)(I − v·vᵀ/‖v‖²)·dW with v = W/g, ‖v‖ = 1."""
        gain, unit = _polar(weights)
        return gain * (gradient - (gradient * unit).sum(-1, keepdim=True) * unit)

    def apply(self, step: Step) -> None:
        """v += factor · scale · back(N), g by Adam, weights = g·v/‖v‖."""
        assert step.gradient is not None
        gain, unit = _polar(step.weights)
        slope = (step.gradient * unit).sum(-1, keepdim=True)
        b1, b2 = self.betas
        first, second = (
            step.layout.local(value)
            for value in (step.state["gain_avg"], step.state["gain_avg_sq"])
            if isinstance(value, Tensor)
        )
        first.mul_(b1).add_(slope, alpha=1 - b1)
        second.mul_(b2).addcmul_(slope, slope, value=1 - b2)
        gain = gain + step.factor * first / (second.sqrt() + self.eps)
        factor = step.factor * self.scale
        step.basis.add_up(step.state, unit, step.direction, factor, step.layout, step.codec)
        step.weights.copy_(gain * unit / unit.norm(dim=-1, keepdim=True).clamp(min=1e-30))


def _polar(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gain [m, 1] and unit direction [m, n] of each row; a row of zeros has gain 0."""
    gain = weights.norm(dim=-1, keepdim=True)
    return gain, weights / gain.clamp(min=1e-30)
