"""Checkpoints of a trainer: a Hugging Face folder with the trainer's state beside it.

    config.json, model*.safetensors, tokenizer …    what anybody can load; adapters merged
    adapter/                                        adapters alone, as peft saves them
    trainer_state/optimizer*.safetensors            the optimizer's tensors, whole
    trainer_state/critic.safetensors                a value head with its optimizer, if there is one
    trainer_state/rng.safetensors                   torch's random state
    trainer_state/numbers.json                      counters, and what it was trained with

Nothing in it depends on the number of ranks. Tensors and whole numbers only: loading runs no code.
"""

import json
from pathlib import Path
from typing import Any

import torch

from loopwright.actors import optimizer_state
from loopwright.actors.critic import Critic
from loopwright.actors.model_files import save_config
from loopwright.actors.tensor_files import TensorFolder, flush_folder, write_buckets, write_json
from loopwright.actors.trainer_backend import BackendError, TrainerBackend

STATE, ADAPTER = "trainer_state", "adapter"
_NUMBERS = "numbers.json"
_SCHEMA = 1


def save_weights(backend: TrainerBackend, folder: Path) -> None:
    """Write a Hugging Face folder, bucket by bucket; called on every rank, written by rank 0.

    Raises `OSError` on rank 0 where the disk does not take it.
    """
    writes = backend.ranks.rank == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    write_buckets(backend.published_buckets(), folder, "model", writes=writes)
    if writes:
        save_config(backend.model, folder, source=backend.settings.model_path)
        flush_folder(folder)


def save(backend: TrainerBackend, folder: Path) -> None:
    """Write a checkpoint, weights and state, as `save_weights` does; all of it is flushed to disk
    when it returns."""
    writes = backend.ranks.rank == 0
    state = folder / STATE
    if writes:
        state.mkdir(parents=True, exist_ok=True)
    settings = backend.settings
    write_buckets(backend.optimizer_buckets(), state, "optimizer", writes=writes)
    write_buckets([{"rng": torch.get_rng_state()}], state, "rng", writes=writes)
    if backend.critic is not None:
        write_buckets([_critic_tensors(backend.critic)], state, "critic", writes=writes)
    if settings.lora_rank:
        _save_adapter(backend, folder / ADAPTER, writes=writes)
    numbers = {
        "schema": _SCHEMA,
        "step": backend.step,
        "non_finite": backend.non_finite,
        **_made_with(backend),
        "began_from": settings.model_path,
        "backend": settings.backend,
        "ranks": settings.ranks,
        "numbers": backend.optimizer_numbers(),
    }
    if writes:
        write_json(numbers, state / _NUMBERS)
    save_weights(backend, folder)


def load(backend: TrainerBackend, folder: Path) -> None:
    """Take weights, optimizer state, RNG and counters from a checkpoint, written by any number of
    ranks. Raises `BackendError`, or the optimizer's own error, with the reason where it does not
    fit; the backend is not to be used then.
    """
    state = folder / STATE
    if not (state / _NUMBERS).is_file():
        raise BackendError(
            f"checkpoint {str(folder)!r}: no {STATE}/{_NUMBERS} there; it holds weights to start "
            "from, not a run"
        )
    saved = json.loads((state / _NUMBERS).read_text())
    if saved["schema"] != _SCHEMA:
        raise BackendError(
            f"checkpoint {str(folder)!r}: schema {saved['schema']}, this build reads {_SCHEMA}"
        )
    for key, mine in _made_with(backend).items():
        if saved[key] != mine:
            raise BackendError(
                f"checkpoint {str(folder)!r}: made with {key} = {saved[key]!r}, this run has "
                f"{mine!r}, and the state of one means nothing to the other. Go on with "
                f"{saved[key]!r}, or begin a new run with model.path = {str(folder)!r}"
            )
    _load_weights(backend, folder)
    tensors = TensorFolder(state, "optimizer", may_be_empty=True)
    backend.restore_optimizer(tensors.read, tensors.names, saved["numbers"])
    if backend.critic is not None:
        _load_critic(backend.critic, TensorFolder(state, "critic"))
    torch.set_rng_state(TensorFolder(state, "rng").read("rng"))
    backend.step, backend.non_finite = int(saved["step"]), int(saved["non_finite"])


def began_from(folder: Path) -> str:
    """The model that the run of a checkpoint began from: the base of its adapters, the reference of
    its KL penalty. Empty where it is not recorded."""
    numbers = folder / STATE / _NUMBERS
    return str(json.loads(numbers.read_text()).get("began_from", "")) if numbers.is_file() else ""


def _critic_tensors(critic: Critic) -> dict[str, torch.Tensor]:
    named = critic.parameters()
    found = optimizer_state.leaves(critic.optimizer, named)
    return {name: p.detach() for name, p in named.items()} | {
        path: value for path, value in found.items() if isinstance(value, torch.Tensor)
    }


def _load_critic(critic: Critic, files: TensorFolder) -> None:
    named = critic.parameters()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(files.read(name))
    tensors = {path: files.read(path) for path in files.names if path not in named}
    optimizer_state.load(critic.optimizer, named, tensors, {"state": {}, "groups": [{}]})


def _made_with(backend: TrainerBackend) -> dict[str, Any]:
    """What a state belongs to: with another of these it cannot be used."""
    settings = backend.settings
    return {
        "trainer.optimizer": settings.optimizer,
        "algorithm.advantage": "gae" if settings.critic else "of groups",
        "model.adapter": settings.adapter if settings.lora_rank else "none",
    }


def _save_adapter(backend: TrainerBackend, folder: Path, *, writes: bool) -> None:
    from loopwright.actors.lora import peft_config, peft_name

    if writes:
        folder.mkdir(exist_ok=True)
        write_json(peft_config(backend.model), folder / "adapter_config.json")
    whole = backend.gather(_trained(backend))
    named = {peft_name(name): tensor for name, tensor in whole.items()}
    write_buckets([named], folder, "adapter_model", writes=writes)


def _load_weights(backend: TrainerBackend, folder: Path) -> None:
    adapted = backend.settings.lora_rank > 0
    if adapted:
        from loopwright.actors.lora import peft_name

        files, names = TensorFolder(folder / ADAPTER, "adapter_model"), _trained(backend)
        stored = {name: peft_name(name) for name in names}
    else:
        files = TensorFolder(folder, "model")
        names = [name for name, _ in backend.model.named_parameters()]
        stored = {name: name for name in names}
    if missing := [name for name in names if stored[name] not in files.names]:
        raise BackendError(
            f"saved weights lack {len(missing)} tensors of this model ({', '.join(missing[:5])}); "
            "load a checkpoint of the same model and the same adapter settings"
        )
    backend.scatter(names, lambda name, rows: files.read(stored[name], rows))


def _trained(backend: TrainerBackend) -> list[str]:
    return [name for name, p in backend.model.named_parameters() if p.requires_grad]
