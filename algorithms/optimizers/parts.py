"""What an optimizer is put together from: a `Recipe` for a kind of parameter, a `Plan` for all."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loopwright.algorithms.optimizers.bases import Basis, Identity
from loopwright.algorithms.optimizers.conditioners import Conditioner
from loopwright.algorithms.optimizers.emits import Back, Emit
from loopwright.algorithms.optimizers.inner import Adam, Inner
from loopwright.algorithms.optimizers.layer_sampling import LayerSampler
from loopwright.algorithms.optimizers.layout import Layout
from loopwright.algorithms.optimizers.options import OnRefresh
from loopwright.algorithms.optimizers.state_codecs import CODECS, Codec, Fp32
from loopwright.algorithms.optimizers.write_back import WriteBack


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The parts that update one kind of parameter."""

    inner: Inner
    basis: Basis = field(default_factory=Identity)
    conditioner: Conditioner | None = None
    emit: Emit = field(default_factory=Back)
    codec: Codec = field(default_factory=lambda: CODECS["fp32"])  # of moments
    basis_codec: Codec = field(default_factory=lambda: CODECS["fp32"])
    on_refresh: OnRefresh = "keep"
    decay_last: bool = False  # decay after the update (GaLore's family), or before (torch)
    late: bool = False  # the basis looks at weights or moments: project when the update is made

    @property
    def whole(self) -> bool:
        """Is the basis the identity?"""
        return isinstance(self.basis, Identity)

    @property
    def keeps_gradient(self) -> bool:
        """Must the whole gradient stay until the update is made?"""
        return self.whole or self.late or self.emit.needs_gradient

    @property
    def by_rows(self) -> bool:
        """Can rows be updated piece by piece?"""
        alone = self.conditioner is None or self.conditioner.elementwise
        return self.whole and alone and self.inner.elementwise and isinstance(self.emit, Back)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which parameter gets which recipe, and what concerns all of them."""

    recipe_of: Callable[[str, torch.Size], Recipe | None]  # None: frozen
    reset_every: int = 0  # updates between resets of the moments; 0 = never
    warmup: int = 0  # updates of warm-up after a reset
    restarts: bool = False  # resets rebalance pairs of low-rank factors too
    sampler: LayerSampler | None = None  # None: all layers are trained


@dataclass(slots=True, kw_only=True)
class Slot:
    """One parameter in the pipeline."""

    name: str
    parameter: Tensor
    layout: Layout
    recipe: Recipe
    write_back: WriteBack
    index: int  # its place among all parameters: seeds depend on it
    layer: str | None = None
    coordinates: Tensor | None = None  # of the update being prepared
    collected: Tensor | None = None  # projected gradients of micro-batches whose own are freed

    @property
    def fused(self) -> bool:
        """Can torch's fused AdamW make the whole update in one pass?"""
        recipe, parameter = self.recipe, self.parameter
        return (
            isinstance(recipe.inner, Adam)
            and recipe.inner.eps_mode == "corrected"
            and recipe.by_rows
            and recipe.conditioner is None
            and not recipe.decay_last
            and isinstance(recipe.codec, Fp32)
            and self.write_back.way == "plain"
            and parameter.dtype == torch.float32
            and parameter.device.type in ("cpu", "cuda")
        )
