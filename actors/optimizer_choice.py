"""From settings to an optimizer, for backends that hand it matrices: whole, or their rows."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from loopwright.actors.out_of_memory import named
from loopwright.actors.packed_forward import Sequences, micro_batches
from loopwright.actors.trainer_backend import BackendError, TrainerBackend, TrainerSettings
from loopwright.algorithms import optimizers
from loopwright.algorithms.optimizers.options import resolve
from loopwright.algorithms.optimizers.zeroth_order import ZerothOrder
from loopwright.algorithms.records import TrainBatch

_CALIBRATION_SEQUENCES = 16
# set by keys of their own, because every method has them
_OF_THE_TRAINER = {"lr": "trainer.lr", "weight_decay": "trainer.weight_decay", "seed": "run.seed"}


def optimizer_options(settings: TrainerSettings) -> dict[str, Any]:
    """The options of `settings.optimizer`, those that have keys of their own included.

    Raises `OptimizerError` for a method, option or value that does not exist, and `BackendError`
    for an option that a key of the configuration sets.
    """
    method = optimizers.method(settings.optimizer)
    own = dict(settings.optimizer_options)
    keys = dict(_OF_THE_TRAINER)
    if settings.optimizer == "adamw":
        keys |= {"betas": "trainer.betas", "eps": "trainer.eps"}
    for name, key in keys.items():
        if name in own:
            raise BackendError(
                f"trainer.optimizer_options has {name} = {own[name]!r}: set {key} instead"
            )
    given = {
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "seed": settings.seed,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
    }
    chosen = {name: given[name] for name in keys if name in method.defaults}
    resolve(method.name, method.defaults, {**chosen, **own})
    return {**chosen, **own}


def build_optimizer(settings: TrainerSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer `settings.optimizer` over the trainable parameters of `model`."""
    with named("optimizer", settings, "making the states of the optimizer"):
        return optimizers.build(model, settings.optimizer, **optimizer_options(settings))


def project_early(optimizer: torch.optim.Optimizer) -> None:
    """Let gradients that are only needed projected be projected and freed while backward runs, for
    as long as the optimizer lives. For parameters that are whole in this process."""
    if isinstance(optimizer, optimizers.Pipeline):
        optimizers.GradientStream(optimizer)


def calibrate(optimizer: torch.optim.Optimizer, backend: TrainerBackend, batch: TrainBatch) -> None:
    """Before its first update, give an optimizer that draws layers by their outliers (OwLore) the
    scores of the layers under the first sequences of its first batch.

    One sequence at a time and the same ones on every rank: no padding and no share of a rank goes
    into the scores, so every rank, and a single process, draws the same layers.
    """
    if not isinstance(optimizer, optimizers.Pipeline) or optimizer.updates:
        return
    sampler = optimizer.plan.sampler
    if sampler is None or sampler.kind != "outliers" or not len(batch.lengths):
        return
    settings = backend.settings
    sequences = Sequences.of(batch.token_ids, batch.action_mask, batch.lengths)

    def run() -> None:
        for index in range(min(len(batch.lengths), _CALIBRATION_SEQUENCES)):
            for micro in micro_batches(
                sequences,
                np.array([index]),
                token_budget=int(batch.lengths[index]),
                pack=False,
                device=settings.device,
            ):
                backend.forward(micro, temperature=settings.temperature)

    optimizer.set_layer_scores(optimizers.outlier_scores(backend.model, run))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use the learning rate `rate` in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def update(optimizer: torch.optim.Optimizer, rate: float, limit: float) -> float:
    """As `TrainerBackend.update`. The norm is of what the update uses: of projected gradients where
    there is nothing else."""
    assert isinstance(optimizer, optimizers.Pipeline)
    set_rate(optimizer, rate)
    try:
        norm = optimizer.clip_gradients(limit if math.isfinite(limit) else 0.0)
    except optimizers.OptimizerError:  # a gradient that is not finite; nothing was changed
        return math.nan
    optimizer.step()
    return norm


def is_forward_only(settings: TrainerSettings) -> bool:
    """Does the optimizer train by losses alone?"""
    return optimizers.method(settings.optimizer).forward_only


def descend(optimizer: torch.optim.Optimizer, rate: float, loss: Callable[[], float]) -> float:
    """As `TrainerBackend.descend`."""
    assert isinstance(optimizer, ZerothOrder)
    set_rate(optimizer, rate)
    try:
        optimizer.step(loss)
    except optimizers.OptimizerError:  # a loss that is not finite; the weights are as they were
        return math.nan
    return abs(optimizer.projected_gradient)
