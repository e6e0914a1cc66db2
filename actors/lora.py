"""LoRA through peft: adapters put into a Hugging Face model, and the full weights they amount to.

Published weights are merged, so any engine serves them without knowing of adapters.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class LoraError(ValueError):
    """Adapters that cannot be added as asked."""


def add_adapters(
    model: PreTrainedModel, *, rank: int, alpha: float, targets: str
) -> PreTrainedModel:
    """Freeze `model`, add trainable adapters in place to its linear layers and return it.

    `targets` is "all-linear" (every linear layer but the output layer) or a regular expression of
    module names. The update of a layer is alpha / rank · B·A (LoRA, Hu et al. 2021). Raises
    `LoraError` if nothing matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        model = inject_adapter_in_model(config, model)
    except ValueError as error:
        raise LoraError(f"model.lora_targets={targets!r}: {error}") from error
    if model.config.tie_word_embeddings and "lm_head" in _adapted(model):
        raise LoraError(
            f"model.lora_targets={targets!r} matches lm_head, which this model shares with its "
            "embedding: an adapter "
            "on one of the two cannot be merged; leave lm_head out"
        )
    return model


def merged_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Full weights under their Hugging Face names, adapters merged: base + alpha / rank · B·A."""
    adapted = _adapted(model)
    tensors: dict[str, Tensor] = {}
    parameters = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name, value in parameters.items():
            owner, found, leaf = name.partition(".base_layer.")
            if found and leaf == "weight":
                tensors[f"{owner}.weight"] = value + adapted[owner].get_delta_weight("default")
            elif found:
                tensors[f"{owner}.{leaf}"] = value
            elif not any(name.startswith(f"{layer}.lora_") for layer in adapted):
                tensors[name] = value
    return tensors


def _adapted(model: PreTrainedModel) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
