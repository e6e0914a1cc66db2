"""One update of one parameter, once its gradient is known to be good and its basis chosen."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from loopwright.algorithms.optimizers.emits import Step
from loopwright.algorithms.optimizers.inner import ALL_ROWS, Adam
from loopwright.algorithms.optimizers.parts import Slot
from loopwright.algorithms.optimizers.state_codecs import Noise, State, stored

CHUNK = 1 << 18  # entries updated at a time where rows are independent: they stay in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What an update needs beside the parameter's own parts."""

    slot: Slot
    state: State
    lr: float  # warm-up included
    decay: float  # lr · weight decay, without warm-up
    factor: float  # of clipping
    seed: int
    renew: Callable[[Slot, State, Tensor, int], None]  # takes a new basis if one is due

    @property
    def t(self) -> int:
        """Updates made before this one."""
        return int(self.state["step"])


def update(context: Update) -> None:
    """Make the update: the weights and all states but the counters change."""
    slot, coordinates = context.slot, context.slot.coordinates
    assert coordinates is not None
    weights = slot.layout.local(slot.parameter.detach())
    if slot.recipe.whole and context.factor < 1:
        coordinates.mul_(context.factor)  # the gradient itself, as torch's clipping does
    if slot.fused:
        _fused(context, weights, coordinates)
        return
    if slot.recipe.by_rows and weights.ndim >= 2:
        size = max(CHUNK // max(weights[:1].numel(), 1), 1)
        for start in range(0, weights.shape[0], size):
            _update_rows(context, weights, coordinates, slice(start, start + size))
    else:
        _update_rows(context, weights, coordinates, ALL_ROWS)


def _fused(context: Update, weights: Tensor, gradient: Tensor) -> None:
    inner = context.slot.recipe.inner
    assert isinstance(inner, Adam)
    torch_adamw(
        [weights],
        [gradient],
        [stored(context.state, "exp_avg")],
        [stored(context.state, "exp_avg_sq")],
        [],
        [torch.tensor(float(context.t), device=weights.device)],
        fused=True,
        amsgrad=False,
        beta1=inner.betas[0],
        beta2=inner.betas[1],
        lr=context.lr,
        weight_decay=context.decay / context.lr if context.lr else 0.0,
        eps=inner.eps,
        maximize=False,
    )


def _update_rows(context: Update, weights: Tensor, coordinates: Tensor, rows: slice) -> None:
    slot, state, t = context.slot, context.state, context.t
    recipe, layout = slot.recipe, slot.layout
    opened = slot.write_back.open(state, weights, rows)
    gradient: Tensor | None = None
    if recipe.late or recipe.emit.needs_gradient:
        assert slot.parameter.grad is not None
        gradient = layout.local(slot.parameter.grad).float() * context.factor
    if recipe.late:
        assert gradient is not None
        seen = recipe.emit.enter(opened, gradient).clone()
        context.renew(slot, state, seen, t)
        coordinates = recipe.basis.down(state, seen, layout, recipe.basis_codec)
    elif not recipe.whole and context.factor < 1:
        coordinates = coordinates * context.factor
    coordinates = (
        coordinates[rows] if recipe.by_rows and coordinates.ndim else coordinates
    ).float()
    cut, first = recipe.basis.sharded(layout), rows.start or 0
    noise = noise_for(slot, tuple(coordinates.shape), t, first, context.seed, cut=cut)
    if recipe.conditioner is not None:
        coordinates = recipe.conditioner.apply(
            state, coordinates, layout, recipe.codec, rows, noise, sharded=cut
        )
    direction, size = recipe.inner.direction(
        state, coordinates, t, recipe.codec, rows, noise, layout
    )
    if context.decay and not recipe.decay_last:
        recipe.basis.decay(state, opened, 1 - context.decay, layout)
    recipe.emit.apply(
        Step(
            state=state,
            layout=layout,
            codec=recipe.basis_codec,
            basis=recipe.basis,
            weights=opened,
            gradient=gradient,
            coordinates=coordinates,
            direction=direction,
            lr=context.lr,
            decay=0.0 if recipe.decay_last else context.decay,
            factor=-context.lr * size,
        )
    )
    if context.decay and recipe.decay_last:
        recipe.basis.decay(state, opened, 1 - context.decay, layout)
    noise = noise_for(slot, tuple(opened.shape), t, first, context.seed, cut=True)
    slot.write_back.close(state, weights, opened, rows, noise)


def noise_for(
    slot: Slot, shape: tuple[int, ...], t: int, first: int, seed: int, *, cut: bool
) -> Noise:
    """Noise for a local tensor of `shape`, the part from row `first` on of one whose rows are cut
    as the parameter's (`cut`), or of one that is all here."""
    key = (seed, slot.index, t)
    if not cut or not shape:
        return Noise(key, math.prod(shape[:-1]), 0)
    per_row = math.prod(shape[1:-1])
    start = slot.layout.row_start + first
    return Noise(key, slot.layout.shape[0] * per_row, start * per_row)
