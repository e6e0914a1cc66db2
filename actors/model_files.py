"""A model folder on disk: Hugging Face weights and config, the tokenizer beside them, everything flushed."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

_WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json", ".pth", ".gguf")


def save_model(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, *, source: str) -> None:
    """Write `tensors` (Hugging Face names, tied ones shared) and the config of `model` to `folder`, made if missing.

    Tokenizer, chat template and generation config are copied from `source`, the folder or hub id the model came from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict={name: t.detach() for name, t in tensors.items()})  # type: ignore[operator]
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
        raise FileNotFoundError(f"{folder}: no *.safetensors there; it is not a checkpoint of this trainer")
    return tensors


def save_state(state: Mapping[str, object], file: Path) -> None:
    """Write a trainer state that `torch.load(weights_only=True)` reads."""
    torch.save(dict(state), file)
    flush_folder(file.parent)


def flush_folder(folder: Path) -> None:
    """fsync every file of `folder` and the folder itself, so that a power cut after this loses nothing."""
    for path in (*(p for p in sorted(folder.iterdir()) if p.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
