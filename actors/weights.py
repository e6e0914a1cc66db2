"""Same-host weight channel: written once by the trainer, read in place by every engine.

One POSIX shared memory segment holds two slots. The trainer writes the slot that no engine reads, checksums each
tensor, and only then hands out the manifest: the manifest is the commit. Publishing is serial and acknowledged by
every engine, so a slot is never overwritten while an engine maps it.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """What is published under one policy version, and where it lies."""

    version: int
    kind: Literal["full", "adapter"]
    segment: str  # name of the shared memory segment
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]  # "float32", "bfloat16", …
    offsets: tuple[int, ...]  # bytes from the start of the segment
    checksums: tuple[int, ...]  # crc32 of each tensor's bytes
    size_bytes: int
