"""How updates reach the weights: in place, through fp32 masters, stochastic rounding, or Kahan
summation.

bf16 keeps 8 significant bits, so adding less than about 1/512 of a weight to it changes nothing. At
learning rates of RL (1e-6) that is nearly every update of AdamW: after 100 of them 2 % of the
weights have moved.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loopwright.algorithms.optimizers.layout import Layout
from loopwright.algorithms.optimizers.options import OptimizerError, WriteBackMode
from loopwright.algorithms.optimizers.state_codecs import (
    Noise,
    State,
    part,
    round_stochastically,
    stored,
)

Way = Literal["plain", "master", "stochastic", "kahan"]
SMALLEST_STEP = 2.0**-9  # of a weight: half the distance between two bf16 numbers, at best


def way_for(name: str, parameter: Tensor, mode: WriteBackMode, lr: float) -> Way:
    """How updates of `parameter` are written. Raises `OptimizerError` where they would be lost."""
    if parameter.dtype in (torch.float32, torch.float64):
        return "plain"
    if mode == "auto":
        return "master"
    if mode != "plain":
        return mode
    if parameter.device.type == "meta":
        return "plain"
    typical = float(parameter.detach().float().abs().mean())
    if lr < typical * SMALLEST_STEP:
        raise OptimizerError(
            f"{name}: write_back='plain' with {parameter.dtype} weights of mean size {typical:.2g} "
            f"loses every update smaller than about {typical * SMALLEST_STEP:.2g}, and lr={lr:g}: "
            "training would do next to nothing, silently. Use write_back='master' (fp32 masters, 4 "
            "bytes a weight), 'stochastic' (no memory) or 'kahan' (2 bytes a weight)"
        )
    return "plain"


@dataclass(frozen=True, slots=True)
class WriteBack:
    """Opens weights as fp32, takes them back changed."""

    way: Way

    def allocate(self, state: State, layout: Layout) -> None:
        """Masters or compensations, from the present weights."""
        local = layout.local(layout.like.detach())
        if self.way == "master":
            state["master"] = layout.sharded(local.float().clone())
        elif self.way == "kahan":
            state["compensation"] = layout.sharded(torch.zeros_like(local))

    def open(self, state: State, weights: Tensor, rows: slice) -> Tensor:
        """fp32 numbers of the local `weights`' rows: changed in place and given to `close`."""
        if self.way == "master":
            return part(stored(state, "master"), rows)
        here = part(weights, rows).float()
        if self.way == "kahan":
            return here + part(stored(state, "compensation"), rows).float()
        return here

    def close(
        self, state: State, weights: Tensor, value: Tensor, rows: slice, noise: Noise
    ) -> None:
        """Write `value` to the rows of `weights`."""
        here = part(weights, rows)
        if self.way == "stochastic" and here.dtype == torch.bfloat16 and here.ndim:
            here.copy_(round_stochastically(value, noise.bits(value.shape, 1, value.device)))
        elif self.way == "kahan":
            here.copy_(value)
            part(stored(state, "compensation"), rows).copy_(value - here.float())
        elif here.data_ptr() != value.data_ptr():
            here.copy_(value)
