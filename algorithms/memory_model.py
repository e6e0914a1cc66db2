"""What training and serving need memory for, in bytes by class: tables, shares of ranks, devices.

Pure arithmetic. The numbers that go in come from a measurement (actors/dry_run.py) or from a trace
without memory (actors/memory_trace.py).
"""

import difflib
import re
from dataclasses import asdict, dataclass
from types import MappingProxyType

CLASSES = ("weights", "gradients", "optimizer", "activations", "logits")

# Memory of one device in GiB, as its vendor counts.
DEVICES = MappingProxyType(
    {
        "T4": 16,
        "V100-32GB": 32,
        "RTX3090": 24,
        "RTX4090": 24,
        "RTX5090": 32,
        "A10": 24,
        "A100-40GB": 40,
        "A100-80GB": 80,
        "L4": 24,
        "L40S": 48,
        "H100": 80,
        "H200": 141,
        "B200": 180,
        "MI300X": 192,
    }
)
_USABLE = 0.92  # the rest is the driver's, the context's, and what fragmentation wastes


class MemoryModelError(ValueError):
    """A device or a way of sharding that does not exist; the text names the nearest."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """Which classes are cut over how many ranks, and what is gathered whole for a while."""

    ranks: int = 1
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    gathered_weights: int = 0  # bytes of weights that a rank holds whole at its peak
    gathered_gradients: int = 0  # bytes of gradients that a rank holds whole at its peak


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineNeed:
    """One engine: weights, a pool of keys and values, and what a step of it works on."""

    weights: int
    kv_pool: int  # bytes it may use
    kv_token: int  # bytes of keys and values of one token
    kv_wanted: int  # bytes if every concurrent sequence were as long as the context
    working: int  # hidden states of a step, and logits of every sequence

    @property
    def total(self) -> int:
        """Bytes of the engine with its pool."""
        return self.weights + self.kv_pool + self.working


def sharding(
    backend: str, ranks: int, *, block_bytes: int, outside_bytes: int, stage: int = 3
) -> Sharding:
    """How `backend` cuts a model over `ranks`.

    `block_bytes` are the weights of one transformer block, `outside_bytes` those of embedding, norm
    and output layer. FSDP2 gathers a block before it is used, and the next one meanwhile; what is
    outside of blocks stays gathered for the micro-batch. Of gradients, one block and the outside
    are whole before they are summed. DeepSpeed's `stage`: 1 cuts the optimizer, 2 gradients too, 3
    all.
    """
    if ranks < 1:
        raise MemoryModelError(f"{ranks} ranks, expected at least 1")
    if ranks == 1:
        return Sharding()
    window, pending = outside_bytes + 2 * block_bytes, outside_bytes + block_bytes
    if backend == "fsdp2" or (backend == "deepspeed" and stage == 3):
        return Sharding(
            ranks=ranks,
            weights=True,
            gradients=True,
            optimizer=True,
            gathered_weights=window,
            gathered_gradients=pending,
        )
    if backend == "deepspeed":
        return Sharding(
            ranks=ranks,
            gradients=stage == 2,
            optimizer=stage in (1, 2),
            gathered_gradients=pending if stage == 2 else 0,
        )
    raise MemoryModelError(
        f"trainer.backend = {backend!r} trains on one rank, not on {ranks}; expected 'fsdp2' or "
        "'deepspeed'"
    )


def per_rank(whole: MemoryTable, how: Sharding) -> MemoryTable:
    """What each rank holds of a model that `whole` describes unsharded. Activations and logits are
    of a rank's own micro-batch already."""

    def share(size: int, cut: bool, gathered: int = 0) -> int:
        return min(size, -(-size // how.ranks) + gathered) if cut else size

    return MemoryTable(
        weights=share(whole.weights, how.weights, how.gathered_weights),
        gradients=share(whole.gradients, how.gradients, how.gathered_gradients),
        optimizer=share(whole.optimizer, how.optimizer),
        activations=whole.activations,
        logits=whole.logits,
    )


def device(name: str) -> tuple[str, int]:
    """The name as `DEVICES` has it, and the bytes a process can use of its memory.

    Case, blanks and hyphens do not count, and `H100-80GB` is `H100`; a name with a size that is
    not in the table, such as `custom-48GB`, is taken at its word. Raises `MemoryModelError`.
    """

    def plain(text: str) -> str:
        return re.sub(r"[\s_-]", "", text).lower()

    wanted = plain(name)
    for known, gib in DEVICES.items():
        if wanted in (plain(known), f"{plain(known)}{gib}gb"):
            return known, round(gib * (1 << 30) * _USABLE)
    match = re.fullmatch(r"custom-?(\d+)gb", name.strip().lower())
    if match:
        return f"custom-{match[1]}GB", round(int(match[1]) * (1 << 30) * _USABLE)
    close = difflib.get_close_matches(wanted, {plain(k): k for k in DEVICES}, n=1, cutoff=0.4)
    nearest = next((k for k in DEVICES if close and plain(k) == close[0]), "")
    raise MemoryModelError(
        f"device {name!r} is not known; {f'did you mean {nearest}? ' if nearest else ''}Known: "
        f"{', '.join(DEVICES)}, or custom-48GB for one of 48 GiB"
    )


def devices(text: str) -> tuple[int, str, int]:
    """`8xH100`, `8×H100` or `H100`: how many, the name, and usable bytes of each."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*[x×*]\s*)?(.+?)\s*", text)
    if match is None or match[1] == "0":
        raise MemoryModelError(f"devices {text!r}, expected N×NAME such as 8xH100")
    name, usable = device(match[2])
    return int(match[1] or 1), name, usable


def size_text(size_bytes: float) -> str:
    """`512 B`, `3.1 MB`, `26.95 GB`: decimal, as papers count."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size_bytes) >= factor:
            value = size_bytes / factor
            return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f} {unit}"
    return f"{size_bytes:.0f} B"
