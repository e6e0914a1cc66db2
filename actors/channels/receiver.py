"""An engine's end of every channel: a manifest goes in, proven tensors come out.

receiver = Receiver(device)
received = receiver.receive(manifest)     beside generation; raises without touching anything
... the engine serves from received.weights ...
receiver.serving(received)                what was served before may be overwritten from now on
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loopwright.actors.channels.collective import Guest
from loopwright.actors.channels.delta import apply_change
from loopwright.actors.channels.image import Layout
from loopwright.actors.channels.lowrank import apply_lowrank, is_lowrank
from loopwright.actors.shared_memory import Mappings, attach, read_segment
from loopwright.actors.weights import (
    ChannelLost,
    WeightError,
    WeightManifest,
    checksum,
    decode,
    manifest_checksums,
    verify,
)


@dataclass(frozen=True, slots=True)
class Received:
    """One policy version in this engine's memory, every tensor of it compared."""

    version: int
    weights: dict[str, Tensor]  # Hugging Face names; below an adapter, the base weights
    checksums: Mapping[str, int]  # of what was published: the adapter alone where there is one
    adapter: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 0.0  # W = base + scale * B A
    buffer: Tensor | None = None  # where they lie, if it is this receiver's own memory


class Receiver:
    """Keeps what the next publish builds on; not for two threads at once."""

    def __init__(self, device: str = "cpu") -> None:
        """Nothing is joined or mapped before the first publish. `device`: where engines compute."""
        self._guest = Guest(device)
        self._mappings = Mappings()
        self._base: Received | None = None  # below adapters
        self._base_of = b""
        self._last: Received | None = None
        self._layout: Layout | None = None  # of the last full publish that came into own memory
        self._bases: dict[str, Tensor] = {}  # projectors of lowrank_delta
        self._buffers: list[Tensor] = []
        self._served: Tensor | None = None

    def receive(self, manifest: WeightManifest) -> Received:
        """Take a publish and compare every tensor with what the trainer wrote.

        Raises `WeightError` naming what is damaged or missing, or `ChannelLost` where the transfer
        broke off or builds on a version that this engine does not have; either way the former
        version stays whole.
        """
        try:
            if manifest.kind == "adapter":
                received = self._adapter(manifest)
            elif manifest.kind == "full":
                received = self._full(manifest)
            else:
                received = self._changed(manifest)
        except ChannelLost:
            self._last, self._layout = None, None
            raise
        self._last = received if received.buffer is not None else None  # nothing builds on others
        return received

    def serving(self, received: Received) -> None:
        """The engine serves `received` and nothing older."""
        self._served = received.buffer

    def close(self) -> None:
        """Leave the group, unmap and free."""
        self._guest.close()
        self._mappings.close()
        self._base = self._last = self._layout = self._served = None
        self._buffers = []

    def _full(self, manifest: WeightManifest) -> Received:
        expected = manifest_checksums(manifest)
        if manifest.in_place:
            views = attach(manifest, self._mappings)
            return Received(manifest.version, views, verify(views, expected))
        layout = Layout.from_manifest(manifest)
        if manifest.carrier == "ipc":
            from loopwright.actors.channels.ipc import open_flat

            flat = open_flat(manifest.segment, manifest.size_bytes)
            views = layout.views(flat)
            return Received(manifest.version, views, verify(views, expected))
        flat = self._spare(manifest.size_bytes)
        self._fetch(manifest, flat)
        views = layout.views(flat)
        checksums = verify(views, expected)
        self._layout, self._bases = layout, {}
        return Received(manifest.version, views, checksums, buffer=flat)

    def _changed(self, manifest: WeightManifest) -> Received:
        before = self._last
        if before is None or before.version != manifest.base_version or before.buffer is None:
            held = "nothing" if before is None else f"version {before.version}"
            self._fetch(manifest, self._code_buffer(manifest))  # keep in step with the chain
            raise ChannelLost(
                f"version {manifest.version} changes version {manifest.base_version}, and this "
                f"engine holds {held}: it needs the whole weights"
            )
        codes = self._code_buffer(manifest)
        self._fetch(manifest, codes)
        assert self._layout is not None  # it came with the full publish before
        flat = self._spare(len(before.buffer))
        flat.copy_(before.buffer)
        views = self._layout.views(flat)
        rebuilt_here = self._apply(manifest, codes, views)
        try:
            checksums = verify(views, manifest_checksums(manifest))
        except WeightError as error:
            if not rebuilt_here:
                raise
            raise ChannelLost(
                f"this host rebuilds low-rank changes differently ({error}): it needs the whole "
                f"weights; set rollout.channel = 'delta' if it happens often"
            ) from error
        return Received(manifest.version, views, checksums, buffer=flat)

    def _apply(self, manifest: WeightManifest, codes: Tensor, views: dict[str, Tensor]) -> bool:
        """Change `views` in place; whether arithmetic of this host took part."""
        assert self._layout is not None
        data = codes.numpy().data
        arithmetic = False
        for name, offset, size, published in zip(
            manifest.names, manifest.offsets, manifest.code_sizes, manifest.code_checksums,
            strict=True,
        ):  # fmt: skip
            if self._layout.owner[name] != name:
                continue
            found = checksum(codes[offset : offset + size])
            if found != published:
                raise WeightError(
                    f"tensor {name}: its encoded change has {found:016x}, published "
                    f"{published:016x}. Publish again; if it repeats, suspect the network or the "
                    f"memory of this host"
                )
            code = data[offset : offset + size]
            if is_lowrank(code):
                arithmetic = True
                apply_lowrank(views[name], code, self._bases, name)
            else:
                apply_change(views[name], code, name)
        return arithmetic

    def _adapter(self, manifest: WeightManifest) -> Received:
        if manifest.base and (manifest.base != self._base_of or manifest.carrier == "collective"):
            self._base, self._base_of = self._full(decode(manifest.base)), manifest.base
        flat = torch.empty(manifest.size_bytes, dtype=torch.uint8)  # small: not worth keeping
        self._fetch(manifest, flat)
        if self._base is None:
            raise ChannelLost(
                f"adapter of version {manifest.version}: this engine has no base weights yet"
            )
        adapter = Layout.from_manifest(manifest).views(flat)
        checksums = verify(adapter, manifest_checksums(manifest))
        return Received(
            manifest.version,
            self._base.weights,
            checksums,
            adapter=adapter,
            scale=manifest.scale,
            buffer=self._base.buffer,
        )

    def _fetch(self, manifest: WeightManifest, flat: Tensor) -> None:
        """Fill `flat` [size_bytes] uint8 with what travels."""
        if manifest.carrier == "shared_memory":
            flat.copy_(read_segment(manifest.segment, manifest.size_bytes))
            return
        self._guest.receive(
            manifest.segment,
            flat,
            receivers=manifest.receivers,
            bucket_bytes=manifest.bucket_bytes,
            timeout_s=manifest.timeout_s,
        )

    def _code_buffer(self, manifest: WeightManifest) -> Tensor:
        return torch.empty(manifest.size_bytes, dtype=torch.uint8)

    def _spare(self, size_bytes: int) -> Tensor:
        """Memory [size_bytes] uint8 that nothing is served from or built on."""
        used = [self._served]
        used += [r.buffer for r in (self._last, self._base) if r is not None]
        self._buffers = [b for b in self._buffers if len(b) == size_bytes or _among(b, used)]
        for buffer in self._buffers:
            if len(buffer) == size_bytes and not _among(buffer, used):
                return buffer
        self._buffers.append(torch.empty(size_bytes, dtype=torch.uint8))
        return self._buffers[-1]


def _among(buffer: Tensor, others: list[Tensor | None]) -> bool:
    return any(buffer is other for other in others)
