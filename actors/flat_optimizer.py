"""An optimizer for parameters that are flat pieces: what DeepSpeed's ZeRO hands out.

ZeRO lays the parameters of a group end to end, cuts the row of numbers into one piece a rank, and
puts that piece in the place of the group's parameters, whenever it likes. Rules that work element
by element do not notice; those that look at matrices cannot work on it.

One difference remains. A parameter whose gradient is zero in every entry (the A of LoRA at the
first update, an expert that no token reached) is left alone by the other backends, decay and count
of updates included; within a piece it cannot be told apart, and is treated as torch's AdamW does.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopwright.algorithms import optimizers


class FlatOptimizer(torch.optim.Optimizer):
    """One element-wise method of `algorithms.optimizers`, on whatever pieces its groups hold."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], method: str, options: Mapping[str, Any]
    ) -> None:
        """`method` with all of its `options`. Raises `OptimizerError` for what does not exist, or
        does not work on pieces."""
        self._method = method
        self._options = dict(options)
        decay = self._options.pop("weight_decay", 0.0)
        row = optimizers.method(method)
        if not row.elementwise:
            raise optimizers.OptimizerError(
                f"trainer.optimizer = {method!r} works on matrices, and DeepSpeed's ZeRO hands out "
                'flat pieces of them: set trainer.backend = "fsdp2", which cuts matrices by rows, '
                f"or take one of {', '.join(optimizers.elementwise_methods())}"
            )
        if self._options.get("state") in ("int8", "int4"):
            raise optimizers.OptimizerError(
                f"trainer.optimizer_options has state = {self._options['state']!r}: its blocks "
                "reach across parameters in ZeRO's pieces, and could not be saved by name; take "
                '"fp32" or "bf16" here, or trainer.backend = "fsdp2"'
            )
        known = list(parameters)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in known if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in known if p.ndim < 2], "weight_decay": 0.0},
        ]
        super().__init__(
            [group for group in groups if group["params"]], {"lr": self._options["lr"]}
        )
        self._inner: dict[int, torch.optim.Optimizer] = {}

    def prepare(self, piece: Tensor) -> None:
        """Make the states of a flat piece now."""
        inner = optimizers.build({"piece": piece}, self._method, weight_decay=0.0, **self._options)
        self._inner[id(piece)] = inner
        self.state[piece] = inner.state[piece]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of the pieces that are in the groups now."""
        for group in self.param_groups:
            for piece in group["params"]:
                if piece.grad is None:
                    continue
                if id(piece) not in self._inner:
                    self.prepare(piece)
                inner = self._inner[id(piece)]
                inner.param_groups[0]["lr"] = group["lr"]
                inner.param_groups[0]["weight_decay"] = group["weight_decay"]
                inner.step()

    def counters(self) -> dict[str, int]:
        """What each parameter group counts; the same for all."""
        return {
            key: value
            for inner in list(self._inner.values())[:1]
            for key, value in inner.param_groups[0].items()
            if type(value) is int
        }

    def restore_counters(self, piece: Tensor, saved: Mapping[str, Any]) -> None:
        """Take back what was counted for a piece: `saved` as `optimizer_state.numbers` has it."""
        inner = self._inner[id(piece)]
        inner.param_groups[0].update(saved["groups"][0])
        for path, value in saved["state"].items():
            self.state[piece][path.rpartition("/")[2]] = value
