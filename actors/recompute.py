"""Keeping less of a forward pass for its backward pass: recompute it layer by layer, or let what is
kept wait in host memory."""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from loopwright.actors.model_files import refuse_dropout

Checkpointing = Literal["off", "on", "offload"]


def keep_less(model: PreTrainedModel, mode: Checkpointing) -> None:
    """Make every layer of `model` keep only its input ("on"), and that in pinned host memory
    ("offload"): one tensor [tokens, hidden] a layer, copied there and back.

    Raises `ModelError` for a model with dropout: Hugging Face recomputes in training mode only.
    """
    if mode == "off":
        return
    refuse_dropout(model.config.to_dict())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if mode == "offload":
        _Offload().attach(model.base_model)


class _Offload:
    """What the forward pass of a module saves is moved to the host as it is saved."""

    def __init__(self) -> None:
        self._entered: list[AbstractContextManager[Any]] = []

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        hooks = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
        hooks.__enter__()
        self._entered.append(hooks)

    def _leave(self, *_: Any) -> None:
        self._entered.pop().__exit__(None, None, None)
