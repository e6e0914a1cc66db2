"""Project in the hook, step later: gradients are projected as backward makes them, added up, and
freed at once.

A whole gradient then lives only while its layer is in backward, and longer only where the next
update begins with a new basis. Unlike optimizers that step in the hook this is exact with gradient
accumulation and with clipping, and data-parallel ranks exchange projected gradients.
"""

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

from loopwright.algorithms.optimizers.options import OptimizerError
from loopwright.algorithms.optimizers.parts import Slot
from loopwright.algorithms.optimizers.pipeline import Pipeline


class GradientStream:
    """Hooks on the parameters of an optimizer, from construction to `close` (or the end of a `with`
    block).

    Gradients of layers that are not trained at present are freed too. `optimizer.clip_gradients`
    takes the place of `clip_grad_norm_`, which sees whole gradients alone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises `OptimizerError` for an optimizer of another package, and where parameters are cut
        over ranks: their gradients are small already, and reduced after the hook would run."""
        if not isinstance(optimizer, Pipeline):
            raise OptimizerError(
                f"{type(optimizer).__name__} cannot take projected gradients; make it by build()"
            )
        cut = [slot.name for slot in optimizer.slots if slot.layout.group is not None]
        if cut:
            raise OptimizerError(
                f"{cut[0]} is cut over ranks: gradients of FSDP2 are cut already, leave out the "
                "stream"
            )
        self._optimizer = optimizer
        self._hooks = [
            slot.parameter.register_post_accumulate_grad_hook(self._hook(slot))
            for slot in optimizer.slots
        ]

    def pending(self) -> list[Tensor]:
        """What data-parallel ranks must sum before the update: projected gradients where there are
        such (hi·r numbers for m·n), whole ones elsewhere."""
        return [
            value
            for slot in self._optimizer.slots
            for value in (slot.collected, slot.parameter.grad)
            if value is not None
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> "GradientStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _hook(self, slot: Slot) -> Callable[[Tensor], None]:
        recipe, optimizer = slot.recipe, self._optimizer

        @torch.no_grad()
        def project(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            if not optimizer.is_trained(slot):
                parameter.grad = None
                return
            state = optimizer.state[slot.parameter]
            if recipe.keeps_gradient or recipe.basis.due(state, int(state["step"])):
                return
            part = recipe.basis.down(state, gradient, slot.layout, recipe.basis_codec)
            slot.collected = part if slot.collected is None else slot.collected.add_(part)
            parameter.grad = None

        return project
