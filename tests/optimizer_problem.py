"""A least-squares problem in closed form, on which trajectories of optimizers are compared."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from loopwright.algorithms import optimizers


def problem(m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Start W0 [m, n], inputs X [2m, m] and targets XT [2m, n], computed in float64, as fp32."""
    i = torch.arange(m, dtype=torch.float64)[:, None]
    j = torch.arange(n, dtype=torch.float64)[None]
    a = torch.arange(2 * m, dtype=torch.float64)[:, None]
    start = 0.1 * torch.sin(1 + 0.3 * i + 0.7 * j)
    inputs = torch.cos(0.5 + 0.7 * a + 1.1 * i.T + 0.13 * a * i.T)
    target = torch.zeros(m, n, dtype=torch.float64)
    for s in range(1, 9):
        wave = torch.cos(math.pi * s * (i + 0.5) / m) * torch.cos(math.pi * s * (j + 0.5) / n)
        target += 2.0 ** (1 - s) * wave
    return start.float(), inputs.float(), (inputs @ target).float()


def loss_of(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """½·Σ(XW − XT)²/(2m·n)."""
    return 0.5 * (inputs @ weights - targets).square().sum() / targets.numel()


class Descent:
    """One matrix of the problem under one optimizer."""

    def __init__(self, name: str, *, m: int = 64, n: int = 32, **options: Any) -> None:
        start, self.inputs, self.targets = problem(m, n)
        self.weights = nn.Parameter(start)
        self.optimizer = optimizers.build([("layers.0.weight", self.weights)], name, **options)

    @property
    def loss(self) -> float:
        """The loss at the present weights."""
        return float(loss_of(self.weights.detach(), self.inputs, self.targets))

    def gradient(self) -> None:
        """Compute it and leave it in `weights.grad`."""
        self.optimizer.zero_grad()
        loss_of(self.weights, self.inputs, self.targets).backward()

    def closure(self) -> float:
        """The loss, for optimizers that need no gradient."""
        return self.loss

    def run(self, updates: int) -> float:
        """So many updates more; the loss after them."""
        for _ in range(updates):
            if optimizers.METHODS[self.optimizer.method].forward_only:
                self.optimizer.step(self.closure)
            else:
                self.gradient()
                self.optimizer.step()
        return self.loss

    def losses(self, *after: int) -> list[float]:
        """The losses after so many updates."""
        found, done = [], 0
        for count in after:
            found.append(self.run(count - done))
            done = count
        return found
