"""Emitters: from a direction in the coordinates of a basis to a change of the weights."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from loopwright.algorithms.optimizers.bases import Basis
from loopwright.algorithms.optimizers.layout import Layout
from loopwright.algorithms.optimizers.state_codecs import Codec, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What an emitter sees of one update of one parameter."""

    state: State
    layout: Layout
    codec: Codec
    basis: Basis
    weights: Tensor  # local, fp32, changed in place
    gradient: Tensor | None  # local and whole; None where the emitter does not ask for it
    coordinates: Tensor  # R, as the inner optimizer saw it
    direction: Tensor  # N
    factor: float  # −lr · size


class Emit(Protocol):
    """What is done with a direction."""

    needs_gradient: bool  # does it use the gradient beside its coordinates?

    def allocate(self, state: State, layout: Layout, codec: Codec) -> None:
        """Put its own states into `state`."""

    def apply(self, step: Step) -> None:
        """Change the weights."""


@dataclass(frozen=True)
class Back:
    """Project back, times `scale` (GaLore)."""

    scale: float = 1.0
    needs_gradient = False

    def allocate(self, state: State, layout: Layout, codec: Codec) -> None:
        """It has none."""

    def apply(self, step: Step) -> None:
        factor = step.factor * self.scale
        step.basis.add_up(step.state, step.weights, step.direction, factor, step.layout, step.codec)
