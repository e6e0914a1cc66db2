"""Stub of the chat harness."""

from types import SimpleNamespace
from typing import Any


class NullHarnessConfig(SimpleNamespace):
    """Its id."""


class NullHarness:
    """Says how a task begins."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def resolve_prompt(self, data: Any) -> tuple[str | None, str]:
        """The system's and the user's."""
        return data.system_prompt, data.prompt
