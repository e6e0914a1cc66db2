"""The policy as every trainer backend loads it: a Hugging Face causal LM, adapters if asked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loopwright.actors import published
from loopwright.actors.allocator import keep_freed_memory
from loopwright.actors.model_files import load_model
from loopwright.actors.out_of_memory import named
from loopwright.actors.packed_forward import MicroBatch, action_logprobs, action_states, check_model
from loopwright.actors.published import Published
from loopwright.actors.recompute import keep_less
from loopwright.actors.trainer_backend import TrainerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A loaded model, before a backend spreads it over ranks."""

    model: PreTrainedModel
    published: list[Published]  # what engines get


def load_policy(settings: TrainerSettings, *, device: str) -> Policy:
    """Load the model on `device`, check that it can be trained, add adapters.

    Sets the process's threads and its random seed. Raises `ModelError`, `ForwardError` or
    `LoraError` with the remedy.
    """
    torch.set_num_threads(settings.threads)
    if settings.device == "cpu":
        keep_freed_memory()
    torch.manual_seed(settings.seed)
    with named("weights", settings, "loading the model"):
        model = load_model(settings.model_path, dtype=settings.dtype, device=device)
    check_model(model)
    keep_less(model, settings.gradient_checkpointing)
    adapters: dict[str, nn.Module] = {}
    if settings.lora_rank:
        from loopwright.actors.lora import adapted_layers, add_adapters

        model = add_adapters(
            model,
            kind=settings.adapter,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            targets=settings.lora_targets,
        )
        adapters = adapted_layers(model)
    return Policy(model=model, published=published.layout(model, adapters))


def load_reference(settings: TrainerSettings, *, device: str) -> PreTrainedModel | None:
    """A frozen second copy of the model that training begins with, where a KL penalty needs one;
    None also with adapters, whose reference is the model without them."""
    if settings.loss.kl == "none" or settings.lora_rank:
        return None
    with named("weights", settings, "loading the frozen copy that algorithm.kl needs"):
        model = load_model(settings.model_path, dtype=settings.dtype, device=device)
    return model.requires_grad_(False)


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Within it, `model` computes as before its adapters were added."""
    from loopwright.actors.lora import adapted_layers

    layers: list[Any] = list(adapted_layers(model).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class ActionLogprobs(nn.Module):
    """The policy as one module whose output is what the loss needs: sharded weights are gathered
    around its forward pass, output layer included.
    """

    def __init__(self, model: PreTrainedModel, *, chunk: int) -> None:
        super().__init__()
        self.model = model
        self._chunk = chunk

    def forward(self, micro: MicroBatch, temperature: float, *, states: bool = False) -> Tensor:
        """As `action_logprobs`: [M] float32; with `states` as `action_states`: [M, H]."""
        if states:
            return action_states(self.model, micro)
        return action_logprobs(self.model, micro, temperature=temperature, chunk=self._chunk)

    __call__: Callable[..., Tensor]


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks of `model`, first to last; the parts that Hugging Face says are never
    to be split."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]
