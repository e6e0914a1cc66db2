"""What a trainer needs memory for, in bytes by class."""

from dataclasses import asdict, dataclass

CLASSES = ("weights", "gradients", "optimizer", "activations", "logits")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTable:
    """Bytes by class. `optimizer` holds states, float32 masters, and what a step of it needs on
    top; `logits` all that is as wide as the vocabulary; `activations` everything else that a
    forward and a backward pass make.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """The sum of all classes."""
        return sum(asdict(self).values())

    def classes(self) -> dict[str, int]:
        """Bytes by name, in the order of `CLASSES`."""
        return asdict(self)


def size_text(size_bytes: float) -> str:
    """`512 B`, `3.1 MB`, `26.95 GB`: decimal, as papers count."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes:.0f} B"
