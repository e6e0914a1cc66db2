"""Stub of the chat dialect."""

from typing import Any


def message_to_wire(message: Any) -> dict[str, Any]:
    """As a request has it."""
    return dict(message)
