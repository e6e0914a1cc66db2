"""From settings to an optimizer, for backends that hand it matrices: whole, or their rows."""

from typing import Any

import torch
from torch import nn

from loopwright.actors.out_of_memory import named
from loopwright.actors.trainer_backend import BackendError, TrainerSettings
from loopwright.algorithms import optimizers
from loopwright.algorithms.optimizers.options import resolve

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


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use the learning rate `rate` in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
