"""A model folder on disk: loading it to train, and what lies beside its weights."""

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

_WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json", ".pth", ".gguf")


# transformers changes global state while it loads: threads of one process take turns
LOADING = threading.Lock()


class ModelError(Exception):
    """A model that cannot be loaded or trained as asked; the text says why and the remedy."""


def load_model(model_path: str, *, dtype: str, device: str) -> PreTrainedModel:
    """The causal LM at `model_path` in `dtype` and evaluation mode.

    Evaluation mode is on purpose: dropout would make current logprobs differ from the sampler's.
    Raises `ModelError` for a path that holds no model.
    """
    looks_local = model_path.startswith((".", "/", "~")) or Path(model_path).exists()
    folder = Path(model_path).expanduser()
    if looks_local and not (folder / "config.json").is_file():
        raise ModelError(
            f"model path {model_path!r}: no config.json there; give a Hugging Face folder or "
            "a hub id"
        )
    try:
        with LOADING:
            model = AutoModelForCausalLM.from_pretrained(
                str(folder) if looks_local else model_path,
                dtype=getattr(torch, dtype),
                attn_implementation="sdpa",
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"model path {model_path!r} cannot be loaded: {error}") from error
    return model.to(device).eval()


def refuse_dropout(config: Mapping[str, Any]) -> None:
    """Raise `ModelError` if a Hugging Face config has dropout: training mode switches it on."""
    active = [f"{k}={v}" for k, v in config.items() if ("dropout" in k or "pdrop" in k) and v]
    if active:
        raise ModelError(
            "gradient checkpointing runs the model in training mode, and it has dropout "
            f"({', '.join(active)}): current logprobs would differ from the sampler's; "
            "set it to 0 in config.json or turn gradient_checkpointing off"
        )


def save_config(model: PreTrainedModel, folder: Path, *, source: str) -> None:
    """Write the config of `model` to `folder`, which exists, and copy tokenizer, chat template and
    generation config from `source`, the folder or hub id that the model came from.
    """
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    origin = Path(source).expanduser()
    if origin.is_dir():
        for file in sorted(origin.iterdir()):
            if file.is_file() and file.name != "config.json" and not file.name.endswith(_WEIGHTS):
                shutil.copyfile(file, folder / file.name)
    else:
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
