"""Inner optimizers that look at a whole matrix: Muon and Adafactor."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loopwright.algorithms.optimizers.emits import Step
from loopwright.algorithms.optimizers.layout import Layout, sum_over
from loopwright.algorithms.optimizers.state_codecs import Codec, Noise, State, stored


@dataclass(frozen=True)
class Muon:
    """Muon with Nesterov momentum, orthogonalised by torch's `torch.optim.Muon` (Jordan 2024), its
    rate times √max(1, m/n). Ranks that share rows exchange the momentum."""

    momentum: float
    elementwise = False
    moments = ("exp_avg",)

    def allocate(
        self, state: State, shape: tuple[int, ...], layout: Layout, codec: Codec, *, sharded: bool
    ) -> None:
        """M, of the gradient's shape."""
        codec.allocate(state, "exp_avg", shape, layout, sharded=sharded)

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
        """(orthogonalised momentum, 1)."""
        first = codec.read(state, "exp_avg", rows)
        first.lerp_(gradient, 1 - self.momentum)
        ahead = gradient.lerp(first, self.momentum)
        codec.write(state, "exp_avg", first, rows, noise)
        whole = layout.gather(ahead)
        if whole.ndim == 2:
            return layout.own_rows(_orthogonal(whole)), 1.0
        return torch.stack([_orthogonal(m) for m in whole.flatten(0, -3)]).view_as(whole), 1.0


def _orthogonal(matrix: Tensor) -> Tensor:
    """What `torch.optim.Muon` makes of a gradient without momentum, decay and rate."""
    start = nn.Parameter(torch.zeros_like(matrix))
    start.grad = matrix
    peer = torch.optim.Muon([start], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
    peer.step()
    return -start.detach()


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer & Stern 2018) as in `torch.optim.Adafactor`: the second moment as the
    outer product of row and column means, decay 1 − k^−0.8, update clipped to a mean square of 1.
    Always in fp32: m + n numbers a matrix."""

    tiny: float = torch.finfo(torch.float32).eps
    decay: float = -0.8
    elementwise = False
    moments: tuple[str, ...] = ()

    def allocate(
        self, state: State, shape: tuple[int, ...], layout: Layout, codec: Codec, *, sharded: bool
    ) -> None:
        """Row and column means; of a vector, its squares."""
        if len(shape) < 2:
            state["squares"] = layout.sharded(torch.zeros(shape, device=layout.device))
            return
        rows = torch.zeros((*shape[:-1], 1), device=layout.device)
        columns = torch.zeros((*shape[:-2], 1, shape[-1]), device=layout.device)
        state["row_squares"] = layout.sharded(rows)
        state["column_squares"] = layout.sharded(columns) if layout.batched else columns

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
        """(clipped update, 1)."""
        fresh = float(t + 1) ** self.decay
        if gradient.ndim < 2:
            estimate = stored(state, "squares").lerp_(gradient.square(), fresh).clone()
        else:
            m, n = layout.matrix
            row, column = stored(state, "row_squares"), stored(state, "column_squares")
            row.lerp_(gradient.square().sum(-1, keepdim=True) / n, fresh)
            total = layout.sum(gradient.square().sum(-2, keepdim=True))
            column.lerp_(total / m, fresh)
            mean = layout.sum(row.sum(-2, keepdim=True)) / m
            estimate = (row @ column).div_(mean.clamp(min=self.tiny))
        update = estimate.clamp_(min=self.tiny**2).rsqrt_().mul_(gradient)
        size = float(sum_over(update.square().sum(), layout.group))
        return update, 1 / max(1.0, (size / layout.shape.numel()) ** 0.5)


@dataclass(frozen=True)
class Relative:
    """Adafactor's step: relative to the root mean square of the weights, and at most 1/√k."""

    least: float = 1e-3  # of that root mean square
    needs_gradient = False

    def allocate(self, state: State, layout: Layout) -> None:
        """It has none."""

    def enter(self, weights: Tensor, gradient: Tensor) -> Tensor:
        """As it is."""
        return gradient

    def apply(self, step: Step) -> None:
        """weights −= min(lr, 1/√k) · max(least, rms(weights)) · size · N, the weights as they were
        before decay."""
        square = float(sum_over(step.weights.square().sum(), step.layout.group))
        undone = 1 - step.decay
        rms = (square / step.layout.shape.numel()) ** 0.5 / (undone if undone else 1.0)
        k = int(step.state["step"]) + 1
        rate = min(step.lr, k**-0.5) * max(self.least, rms)
        step.weights.add_(step.direction, alpha=rate * step.factor / step.lr if step.lr else 0.0)
