"""Adapters through peft: put into a Hugging Face model, and the full weights they amount to.

Published weights are merged, so any engine serves them without knowing of adapters.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_NAME = "default"  # peft's own name for an adapter that has none


class LoraError(ValueError):
    """Adapters that cannot be added as asked."""


# kind: (peft's configuration, how it calls rank and alpha, what else makes the kind)
_KINDS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "lora": ("LoraConfig", "r", "lora_alpha", {}),  # alpha/r · B·A (Hu et al. 2021)
    "rslora": ("LoraConfig", "r", "lora_alpha", {"use_rslora": True}),  # alpha/√r (Kalajdzievski)
    "dora": ("LoraConfig", "r", "lora_alpha", {"use_dora": True}),  # and a norm a row (Liu 2024)
    "loha": ("LoHaConfig", "r", "alpha", {}),  # product of two LoRAs, entry by entry
    "lokr": ("LoKrConfig", "r", "alpha", {}),  # Kronecker product
    "hra": ("HRAConfig", "r", "", {}),  # W times r Householder reflections
    "miss": ("MissConfig", "r", "", {}),  # one matrix, shared over slices of the input
    "oft": ("OFTConfig", "oft_block_size", "", {"r": 0}),  # W times rotations of blocks of `rank`
}


def add_adapters(
    model: PreTrainedModel, *, kind: str, rank: int, alpha: float, targets: str
) -> PreTrainedModel:
    """Freeze `model`, add trainable adapters of a `kind` in place to its linear layers, return it.

    At first they change nothing. `targets` is "all-linear" (every linear layer but the output
    layer) or a regular expression of module names. Raises `LoraError` if nothing matches.
    """
    import peft

    name, rank_option, alpha_option, more = _KINDS[kind]
    options = {rank_option: rank, "target_modules": targets, "task_type": "CAUSAL_LM", **more}
    if alpha_option:
        options[alpha_option] = alpha
    config = getattr(peft, name)(**options)
    try:
        model = peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise LoraError(
            f"model.adapter={kind!r}, model.lora_rank={rank}, model.lora_targets={targets!r}: "
            f"{error}"
        ) from error
    if model.config.tie_word_embeddings and "lm_head" in adapted_layers(model):
        raise LoraError(
            f"model.lora_targets={targets!r} matches lm_head, which this model shares with its "
            "embedding: an adapter "
            "on one of the two cannot be merged; leave lm_head out"
        )
    return model


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that carry an adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }


def merged_weight(layer: nn.Module, parameters: Sequence[Tensor]) -> Tensor:
    """The weight of an adapted `layer` with its adapter merged, for whole values of all of its
    parameters, in the layer's order. The layer itself, whose own may be sharded, stays as it is.
    """
    own = [parameter for _, parameter in layer.named_parameters()]
    whole = {
        id(mine): nn.Parameter(value.detach(), requires_grad=False)
        for mine, value in zip(own, parameters, strict=True)
    }
    twin: Any = copy.deepcopy(layer, memo=dict(whole))
    base = twin.get_submodule("base_layer")
    base.weight = nn.Parameter(base.get_parameter("weight").clone(), requires_grad=False)
    with torch.no_grad():
        twin.merge(safe_merge=False, adapter_names=[_NAME])
    return base.get_parameter("weight").detach()


def peft_name(parameter: str) -> str:
    """The name under which peft saves a parameter of an adapted model."""
    short = f".{parameter}.".replace(f".{_NAME}.", ".").strip(".")
    if short.endswith(".lora_magnitude_vector.weight"):
        short = short.removesuffix(".weight")
    return f"base_model.model.{short}"


def peft_config(model: PreTrainedModel) -> dict[str, Any]:
    """What `adapter_config.json` says about the adapter of `model`."""
    config: dict[str, Any] = model.peft_config[_NAME].to_dict()
    return {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }
