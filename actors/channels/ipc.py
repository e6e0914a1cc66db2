"""CUDA IPC: engines on the trainer's own GPU read the published weights where they lie.

The trainer writes into one of two buffers on its device and hands out the handle that CUDA gives
for the memory, as msgpack in the manifest. An engine opens it once a publish; nothing goes through
the host but the checksums, for which both sides read the weights back.

Not run: no GPU was at hand where this was written. What it calls is torch's own sharing of CUDA
storages, as `torch.multiprocessing` uses it.
"""

import base64
from typing import Any

import msgpack
import torch
from torch import Tensor

from loopwright.actors.channels.channel import WeightSource, torch_dtype
from loopwright.actors.channels.image import Layout
from loopwright.actors.channels.settings import ChannelSettings
from loopwright.actors.weights import (
    ChannelLost,
    WeightError,
    WeightManifest,
    checksum,
    dtype_name,
)


def require_cuda(purpose: str) -> None:
    """Raise `WeightError` on a machine without a GPU that torch can use."""
    if not torch.cuda.is_available():
        raise WeightError(
            f"{purpose}: CUDA IPC shares memory of a GPU, and torch {torch.__version__} finds none "
            f'here; set rollout.channel = "shared_memory"'
        )


class IpcChannel:
    """Full weights in two buffers on the trainer's GPU, written in turn."""

    def __init__(self, settings: ChannelSettings) -> None:
        """Raises `WeightError` without CUDA."""
        require_cuda('rollout.channel = "ipc"')
        self._device = torch.device(settings.device)
        self._dtype = torch_dtype(settings.dtype)
        self._layout: Layout | None = None
        self._flats: list[Tensor] = []
        self._last: WeightManifest | None = None

    def publish(
        self, version: int, source: WeightSource, members: tuple[str, ...]
    ) -> WeightManifest:
        """As `WeightChannel.publish`."""
        if self._layout is None:
            layout = self._layout = Layout.of(source.published_shapes(), self._dtype)
            self._flats = [
                torch.empty(layout.size_bytes, dtype=torch.uint8, device=self._device)
                for _ in range(2)
            ]
        layout, flat = self._layout, self._flats[0]
        self._flats.reverse()
        views = layout.views(flat)
        for bucket in source.published_buckets():
            for name, tensor in bucket.items():
                if layout.owner[name] == name:
                    views[name].copy_(tensor.detach())
        torch.cuda.synchronize(self._device)
        names = tuple(layout.owner)
        found = {name: checksum(views[name]) for name in names if layout.owner[name] == name}
        self._last = WeightManifest(
            version=version,
            kind="full",
            segment=_handle(flat),
            names=names,
            shapes=tuple(layout.shapes[n] for n in names),
            dtypes=tuple(dtype_name(layout.dtypes[n]) for n in names),
            offsets=tuple(layout.offsets[n] for n in names),
            checksums=tuple(found[layout.owner[n]] for n in names),
            size_bytes=layout.size_bytes,
            carrier="ipc",
        )
        return self._last

    def resend(self, version: int, members: tuple[str, ...]) -> WeightManifest:
        """The last manifest: its buffer is still there."""
        if self._last is None or self._last.version != version:
            raise ChannelLost(f"this trainer has not published version {version}")
        return self._last

    def close(self) -> None:
        """Free the buffers; engines must have let go of them."""
        self._flats, self._layout = [], None


def _handle(flat: Tensor) -> str:
    """What another process needs to open the memory of `flat` [bytes] uint8."""
    storage: Any = flat.untyped_storage()
    return base64.b64encode(msgpack.packb(list(storage._share_cuda_()))).decode()


def open_flat(handle: str, size_bytes: int) -> Tensor:
    """The memory [size_bytes] uint8 behind a handle, on this process's view of the same GPU."""
    require_cuda("weights published by CUDA IPC")
    arguments = msgpack.unpackb(base64.b64decode(handle))
    factory: Any = torch.UntypedStorage
    try:
        storage = factory._new_shared_cuda(*arguments)
    except RuntimeError as error:
        raise WeightError(
            f"CUDA IPC: the trainer's memory cannot be opened here ({error}); trainer and engines "
            f"must be on one GPU of one host, in different processes"
        ) from error
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage)[:size_bytes]
