"""A model folder on disk: Hugging Face weights and config, the tokenizer beside them, everything
flushed.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

_WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json", ".pth", ".gguf")


class ModelError(Exception):
    """A model that cannot be loaded or trained as asked; the text says why and the remedy."""


def load_model(model_path: str, *, dtype: str, device: str) -> PreTrainedModel:
    """The causal LM at `model_path` in float32 and evaluation mode.

    Evaluation mode is on purpose: dropout would make current logprobs differ from the sampler's.
    Raises `ModelError` for a path that holds no model and for dtypes without float32 master
    weights.
    """
    if dtype != "float32":
        raise ModelError(
            f"trainer dtype {dtype!r}: AdamW updates below about 1/256 of a weight vanish in "
            'bfloat16, and float32 master weights are not built yet; set model.dtype = "float32"'
        )
    looks_local = model_path.startswith((".", "/", "~")) or Path(model_path).exists()
    folder = Path(model_path).expanduser()
    if looks_local and not (folder / "config.json").is_file():
        raise ModelError(
            f"model path {model_path!r}: no config.json there; give a Hugging Face folder or "
            "a hub id"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder) if looks_local else model_path,
            dtype=torch.float32,
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


def save_model(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path, *, source: str
) -> None:
    """Write `tensors` (Hugging Face names, tied ones shared) and the config of `model` to `folder`,
    made if missing.

    Tokenizer, chat template and generation config are copied from `source`, the folder or hub id
    the model came from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(folder, state_dict={name: t.detach() for name, t in tensors.items()})
    except SafetensorError as error:
        raise OSError(f"{folder}: {error}") from error
    origin = Path(source).expanduser()
    if origin.is_dir():
        for file in sorted(origin.iterdir()):
            if file.is_file() and file.name != "config.json" and not file.name.endswith(_WEIGHTS):
                shutil.copyfile(file, folder / file.name)
    else:
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    flush_folder(folder)


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in `folder`, by name."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if not tensors:
        raise FileNotFoundError(
            f"{folder}: no *.safetensors there; it is not a checkpoint of this trainer"
        )
    return tensors


def save_state(state: Mapping[str, object], file: Path) -> None:
    """Write a trainer state that `torch.load(weights_only=True)` reads. Raises `OSError` where the
    disk does not take it."""
    try:
        torch.save(dict(state), file)
    except RuntimeError as error:
        raise OSError(f"{file}: {str(error).splitlines()[0]}") from error
    flush_folder(file.parent)


def flush_folder(folder: Path) -> None:
    """fsync every file of `folder` and the folder itself, so that a power cut after this loses
    nothing.
    """
    for path in (*(p for p in sorted(folder.iterdir()) if p.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
