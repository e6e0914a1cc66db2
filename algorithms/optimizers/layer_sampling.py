"""Which layers are trained at a time: drawn uniformly (LISA), by outliers (OwLore), or in turn
(BAdam)."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loopwright.algorithms.optimizers.layout import Layout, sum_over
from loopwright.algorithms.optimizers.options import OptimizerError

_LAYER = re.compile(r"^(?:.*\.)?(?:layers|h|blocks|block)\.\d+(?=\.)")
OUTLIER = 13.0  # times the mean, of |W|·‖X‖ (OwLore, section 3.2)


def layer_of(name: str) -> str | None:
    """`model.layers.3` for `model.layers.3.mlp.up_proj.weight`; None outside of any layer."""
    found = _LAYER.match(name)
    return found.group(0) if found else None


@dataclass(frozen=True, kw_only=True)
class LayerSampler:
    """Chooses `count` layers for every `every` updates; a function of the seed and the round, so
    resuming needs no record of it."""

    kind: Literal["uniform", "outliers", "cycle"]
    count: int
    every: int
    seed: int

    def chosen(self, layers: Sequence[str], scores: Tensor, updates: int) -> frozenset[str]:
        """The layers for the update after `updates` others. `scores` [L] weigh them (outliers).

        `cycle` goes from the last layer to the first, as BAdam's code does by default.
        """
        turn, count = updates // self.every, min(self.count, len(layers))
        if self.kind == "cycle":
            first = len(layers) - 1 - turn * count
            return frozenset(layers[(first - k) % len(layers)] for k in range(count))
        share: np.ndarray | None = None
        if self.kind == "outliers":
            weights = scores.double().cpu().numpy()
            # a layer without outliers must stay possible, or fewer than `count` could be drawn
            weights = np.maximum(weights, weights.max() * 1e-3 if weights.max() > 0 else 1.0)
            share = weights / weights.sum()
        source = np.random.default_rng((self.seed, turn))
        drawn = source.choice(len(layers), count, replace=False, p=share)
        return frozenset(layers[int(k)] for k in drawn)


def outlier_share(weight: Tensor, input_norms: Tensor) -> float:
    """Share of entries of `weight` [m, n] whose |W_ij|·‖X_j‖ exceeds 13 times their mean;
    `input_norms` [n] are the norms of the layer's inputs over a calibration batch."""
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    size = whole.detach().float().abs() * input_norms.to(whole.device)
    return float((size > OUTLIER * size.mean()).float().mean())


def weight_outliers(weight: Tensor, layout: Layout) -> float:
    """The outlier share of a parameter with inputs of equal norm, over all ranks."""
    size = layout.local(weight.detach()).float().abs()
    if size.device.type == "meta":
        return 0.0
    mean = sum_over(size.sum(), layout.group) / layout.shape.numel()
    count = sum_over((size > OUTLIER * mean).float().sum(), layout.group)
    return float(count) / layout.shape.numel()


def outlier_scores(model: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Score of every layer of `model`: the mean outlier share of its linear layers, with input
    norms from whatever forward passes `run` makes (a batch of rollouts, without gradients)."""
    squares: dict[str, Tensor] = {}
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and layer_of(f"{name}.weight") is not None
    }

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found = inputs[0].detach().float().flatten(0, -2).square().sum(0)
            squares[name] = squares[name] + found if name in squares else found

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linear.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in hooks:
            handle.remove()
    shares: dict[str, list[float]] = {}
    for name, total in squares.items():
        layer = layer_of(f"{name}.weight")
        assert layer is not None
        shares.setdefault(layer, []).append(outlier_share(linear[name].weight, total.sqrt()))
    if not shares:
        raise OptimizerError("no linear layer ran: the calibration must call the model")
    return {layer: sum(values) / len(values) for layer, values in shares.items()}


def scores_in_order(layers: Sequence[str], scores: Mapping[str, float]) -> Tensor:
    """Scores [L] of `layers`. Raises `OptimizerError` if one has none."""
    missing = [layer for layer in layers if layer not in scores]
    if missing:
        raise OptimizerError(
            f"no score for {missing[0]!r} ({len(missing)} layers in all); every layer needs one"
        )
    return torch.tensor([float(scores[layer]) for layer in layers])
