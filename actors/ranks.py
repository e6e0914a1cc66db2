"""The processes that train one model together, seen from one of them: how they meet, and sums.

    rank 0                                      every rank, rank 0 too
    meeting = Meeting(timeout_s)   address -->  ranks = join(address, rank=…, size=…)

All ranks of a trainer run on one host, as the engines do that read its shared memory: they meet on
127.0.0.1, and no port is open to others.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch

LOOPBACK = "127.0.0.1"
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # offloaded tensors are summed on the CPU


class RanksError(Exception):
    """Ranks that did not find each other, or do not agree; the text says who and what."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank `rank` of `size`; all methods are collective and give every rank the same answer."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Elementwise sum over the ranks, of the same shape and dtype."""
        return self._reduced(values, "SUM")

    def max(self, values: np.ndarray) -> np.ndarray:
        """Elementwise maximum over the ranks, of the same shape and dtype."""
        return self._reduced(values, "MAX")

    def _reduced(self, values: np.ndarray, how: str) -> np.ndarray:
        if self.size == 1:
            return values
        import torch.distributed as dist

        tensor = torch.from_numpy(np.array(values))
        operation: Any = getattr(dist.ReduceOp, how)
        dist.all_reduce(tensor, op=operation)
        return tensor.numpy()


class Meeting:
    """Where the ranks meet: a store in the process of rank 0, for as long as the object lives."""

    def __init__(self, timeout_s: float) -> None:
        from torch._C._distributed_c10d import TCPStore

        listening = socket.socket()
        listening.bind((LOOPBACK, 0))
        listening.listen(256)
        port = int(listening.getsockname()[1])
        self.address = f"{LOOPBACK}:{port}"
        self._store = TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
            timeout=timedelta(seconds=timeout_s),
        )


def join(address: str, *, rank: int, size: int, device: str, timeout_s: float) -> Ranks:
    """Become rank `rank` of `size`: returns once all ranks are there. Each later exchange between
    ranks fails after `timeout_s` too. Raises `RanksError` if somebody is missing by then.
    """
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    host, _, port = address.rpartition(":")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=timeout_s)
    if dist.is_initialized():
        dist.destroy_process_group()
    try:
        store = TCPStore(host, int(port), is_master=False, timeout=timeout)
        dist.init_process_group(
            BACKENDS[device],
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        dist.barrier()
    except (RuntimeError, ValueError) as error:  # torch's own errors derive from RuntimeError
        raise RanksError(
            f"trainer rank {rank} of {size}: the others were not there within {timeout_s:g} s "
            f"(meeting at {address}): {error}"
        ) from error
    return Ranks(rank=rank, size=size, device=device)


def alone(device: str) -> Ranks:
    """A process group of this process, for backends that need one even on one rank."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    if not dist.is_initialized():
        dist.init_process_group(BACKENDS[device], store=HashStore(), rank=0, world_size=1)
    return Ranks(device=device)
