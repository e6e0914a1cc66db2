"""Stub: tasksets by the name of their package."""

import importlib
from typing import Any

from verifiers.v1 import TasksetConfig


def _class(taskset: str) -> Any:
    try:
        module = importlib.import_module(taskset)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"taskset {taskset!r} not found") from error
    return vars(module)[module.__all__[0]]


def taskset_config_type(taskset: str) -> type[TasksetConfig]:
    """Its configuration."""
    return _class(taskset).__orig_bases__[0].__args__[1]


def load_taskset(config: TasksetConfig) -> Any:
    """The taskset."""
    return _class(config.id)(config)
