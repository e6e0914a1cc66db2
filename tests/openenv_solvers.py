"""Oracles for the environments of the tests."""

import random
from collections.abc import Mapping
from typing import Any


def act(task: Any, seen: Mapping[str, Any]) -> Mapping[str, Any]:
    """The number that the seed gives."""
    return {"number": random.Random(task.seed).randrange(8)}


def call(task: Any, seen: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same, by the tool."""
    return {"tool_name": "guess", "arguments": act(task, seen)}
