"""Stub of the runtimes."""

from dataclasses import dataclass


@dataclass
class ProgramResult:
    """How a program ended."""

    exit_code: int
    stdout: str
    stderr: str


class SubprocessConfig:
    """On this machine."""
