"""What a channel is set up with, apart so that the controller need not import torch."""

from dataclasses import dataclass
from typing import Literal

from loopwright.actors.weights import Carrier as Carrier

ChannelName = Literal["shared_memory", "collective", "ipc", "adapter", "delta", "lowrank_delta"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSettings:
    """How weights travel; the same for the trainer and, through the manifest, for every engine."""

    channel: ChannelName = "shared_memory"
    carrier: Carrier = "shared_memory"  # of what the channel sends
    dtype: str = ""  # floating-point weights are published in it; empty: as they are
    device: str = "cpu"  # where trainer and engines compute
    host: str = "127.0.0.1"  # collective: the trainer's address as engines reach it; "": found
    head: str = ""  # an address in the network of all engines, to find `host` by; "": any
    bucket_bytes: int = 16 << 20  # collective: bytes of one message
    timeout_s: float = 60.0  # collective: for each wait
    full_every: int = 20  # delta, lowrank_delta: versions from one full publish to the next
    level: int = 1  # delta, lowrank_delta: of zstd
    receivers_per_engine: int = 1  # workers of one engine that each take the weights
    in_place: bool = False  # shared_memory: engines read the trainer's own parameters, by turns
