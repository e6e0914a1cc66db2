"""The trainer's end of a weight channel, and what each kind of channel sends.

    kind of publish      what travels                        engines rebuild it from
    full                 every tensor                        nothing
    delta                the bits that changed               the version before
    lowrank              two thin factors, and the bits      the version before, the projector's
                         that they get wrong                 basis
    adapter              LoRA's A and B                      base weights, sent once

The bytes go through a carrier: shared memory of one host, a chain of processes (`collective.py`),
or CUDA IPC. Whatever travels, the manifest holds the checksum of every tensor that engines must end
up with, and `receiver.py`, the other end, proves each of them.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from loopwright.actors.channels.collective import Host, own_address
from loopwright.actors.channels.delta import encode_change
from loopwright.actors.channels.image import Image
from loopwright.actors.channels.lowrank import Basis, encode_lowrank
from loopwright.actors.channels.settings import ChannelSettings
from loopwright.actors.shared_memory import Segment, SharedWeights, unlink_stale
from loopwright.actors.weights import (
    ChannelLost,
    Kind,
    WeightManifest,
    checksum,
    copy_and_checksum,
)


class WeightSource(Protocol):
    """What can be published; every trainer backend can."""

    def published_shapes(self) -> dict[str, Tensor]:
        """Names with tensors on the meta device; tied ones are the same object."""
        ...

    def published_buckets(self) -> Iterator[dict[str, Tensor]]:
        """All of them with their values, a bounded part at a time."""
        ...


class WeightChannel(Protocol):
    """The trainer's end. `publish` and `resend` may be called from two threads. Ranks other than 0
    return None."""

    def publish(self, version: int, source: Any, members: tuple[str, ...]) -> WeightManifest | None:
        """Make the current weights `version`, for the engines that `members` names; they take it
        through the manifest. Every engine must have answered for the version before.

        `source` is a `WeightSource`; of the adapter channel an `AdaptedSource`, and of one in place
        a trainer backend. `members` only tells whether they are the same engines, with the same
        lives, as last time.
        """
        ...

    def resend(self, version: int, members: tuple[str, ...]) -> WeightManifest | None:
        """The version that was published last, whole, for engines that missed it. Raises
        `ChannelLost` if this process has not published `version`."""
        ...

    def close(self) -> None:
        """Free everything; engines keep what they hold. Idempotent."""
        ...


class SharedMemoryChannel:
    """Full weights, written once into a segment with two slots that engines serve from in place."""

    def __init__(self, run_name: str, dtype: str = "") -> None:
        """Nothing is allocated before the first publish. `dtype`: of what is published."""
        self._run_name = run_name
        self._dtype = torch_dtype(dtype)
        self._shared: SharedWeights | None = None
        self._last: WeightManifest | None = None

    def publish(
        self, version: int, source: WeightSource, members: tuple[str, ...]
    ) -> WeightManifest:
        """As `WeightChannel.publish`; whoever attaches the segment takes it."""
        if self._shared is None:
            self._shared = SharedWeights.create(
                self._run_name, source.published_shapes(), dtype=self._dtype
            )
        else:  # every engine has taken this process's first manifest: a killed trainer's can go
            unlink_stale(self._run_name)
        self._last = self._shared.write_buckets(version, source.published_buckets())
        return self._last

    def resend(self, version: int, members: tuple[str, ...]) -> WeightManifest:
        """The last manifest: its slot is still there."""
        return _published(self._last, version)

    def close(self) -> None:
        """Unlink the segment; engines that map it keep what they map."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        unlink_stale(self._run_name)


class Segments:
    """Carrier within one host: each delivery is a segment of its own, the last two are kept."""

    def __init__(self, run_name: str) -> None:
        """`run_name` goes into the segments' names."""
        self._run_name = run_name
        self._kept: list[list[Segment]] = []

    def deliver(
        self, flats: Sequence[Tensor], members: tuple[str, ...], *, apart: bool = False
    ) -> list[str]:
        """Write each of `flats` [bytes] uint8; returns the segments' names."""
        if len(self._kept) == 1:  # engines hold this process's first: a killed trainer's can go
            unlink_stale(self._run_name)
        self._kept.append([Segment.holding(self._run_name, flat) for flat in flats])
        while len(self._kept) > 2:
            _close(self._kept.pop(0))
        return [segment.name for segment in self._kept[-1]]

    def wait(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Unlink what is kept."""
        while self._kept:
            _close(self._kept.pop())
        unlink_stale(self._run_name)


def _close(segments: Sequence[Segment]) -> None:
    for segment in segments:
        segment.close()


@dataclass(slots=True)
class _Change:
    """What a delta publish sends, by the name of the tensor."""

    codes: dict[str, bytes] = field(default_factory=dict)
    total: int = 0

    def add(self, name: str, code: bytes) -> None:
        self.codes[name] = code
        self.total += len(code)


class ImageChannel:
    """Keeps an image of what was published last, and sends it whole or sends what changed.

    The image costs the trainer's host one copy of the weights in the published dtype. It is what
    changes are found against, what late engines are given, and what lets training go on while a
    chain of engines still receives.
    """

    def __init__(
        self,
        settings: ChannelSettings,
        carrier: "Segments | Host",
        bases: Callable[[], Mapping[str, Basis]] | None = None,
    ) -> None:
        """`bases`: parameter name -> the projector its optimizer uses now (lowrank_delta)."""
        self._settings = settings
        self._carrier = carrier
        self._bases = bases
        self._image: Image | None = None
        self._members: tuple[str, ...] = ()
        self._since_full = 0
        self._told: dict[str, int] = {}  # basis checksums that the engines have
        self._busy = threading.Lock()

    def publish(
        self, version: int, source: WeightSource, members: tuple[str, ...]
    ) -> WeightManifest:
        """As `WeightChannel.publish`. Whole for new engines, and every `full_every` versions."""
        with self._busy:
            self._carrier.wait()  # the image must not change under a send
            shapes = source.published_shapes()
            image = self._image
            whole = (
                image is None
                or not image.fits(shapes)
                or self._settings.channel not in ("delta", "lowrank_delta")
                or self._since_full >= self._settings.full_every - 1
                or members != self._members
            )
            if image is None or not image.fits(shapes):
                image = self._image = Image(shapes, torch_dtype(self._settings.dtype))
            self._members = members
            if not whole:
                change, kind = self._changes(image, source)
                if change.total < len(image.flat):
                    before, image.version = image.version, version
                    self._since_full += 1
                    return self._send_change(image, change, kind, before, members)
            else:
                image.fill(source.published_buckets())
            image.version = version
            return self._send_whole(image, members, apart=False)

    def resend(self, version: int, members: tuple[str, ...]) -> WeightManifest:
        """The image, to engines that have nothing; the others need not take part."""
        with self._busy:
            if self._image is None or self._image.version != version:
                raise ChannelLost(f"this trainer has not published version {version}")
            manifest = self._send_whole(self._image, members, apart=True)
            self._members = ()  # the next publish is whole: some engines lack former deltas
            return manifest

    def close(self) -> None:
        """End what is being sent by its deadline, and free the rest."""
        self._carrier.wait()
        self._carrier.close()
        self._image = None

    def _send_whole(self, image: Image, members: tuple[str, ...], *, apart: bool) -> WeightManifest:
        self._since_full, self._told = 0, {}
        (where,) = self._carrier.deliver([image.flat], members, apart=apart)
        offsets = tuple(image.layout.offsets[name] for name in image.layout.owner)
        return self._manifest(
            image, where, members, offsets=offsets, size_bytes=len(image.flat), kind="full"
        )

    def _changes(self, image: Image, source: WeightSource) -> tuple[_Change, Kind]:
        """Encode every tensor against the image, and bring the image up to date."""
        level = self._settings.level
        bases = self._bases() if self._bases is not None else {}
        change = _Change()
        for name, tensor in image.fresh(source.published_buckets()):
            old = image.views[name]
            new = tensor.detach().to(device="cpu", dtype=old.dtype).contiguous()
            code = encode_change(old, new, level=level)
            if name in bases and len(code) > bases[name].least_bytes(old):
                known = self._told.get(name) == bases[name].checksum()
                thin = encode_lowrank(old, new, bases[name], with_basis=not known, level=level)
                if len(thin) < len(code):
                    code, self._told[name] = thin, bases[name].checksum()
            change.add(name, code)
            image.checksums[name] = copy_and_checksum(old, new)
        return change, "lowrank" if self._bases is not None else "delta"

    def _send_change(
        self, image: Image, change: _Change, kind: Kind, before: int, members: tuple[str, ...]
    ) -> WeightManifest:
        flat = torch.frombuffer(bytearray(b"".join(change.codes.values())), dtype=torch.uint8)
        ends = list(accumulate(map(len, change.codes.values())))
        places = {
            name: (end - len(code), len(code), checksum(flat[end - len(code) : end]))
            for end, (name, code) in zip(ends, change.codes.items(), strict=True)
        }
        offsets, sizes, checksums = zip(
            *(places[first] for first in image.layout.owner.values()), strict=True
        )
        (where,) = self._carrier.deliver([flat], members)
        return self._manifest(
            image, where, members,
            kind=kind, base_version=before, size_bytes=len(flat),
            offsets=offsets, code_sizes=sizes, code_checksums=checksums,
        )  # fmt: skip

    def _manifest(
        self, image: Image, where: str, members: tuple[str, ...], **rest: Any
    ) -> WeightManifest:
        s = self._settings
        return WeightManifest(
            version=image.version,
            segment=where,
            carrier=s.carrier,
            receivers=max(1, len(members)) * s.receivers_per_engine,
            bucket_bytes=s.bucket_bytes,
            timeout_s=s.timeout_s,
            **image.description(),
            **rest,
        )


def torch_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name; None for the empty one."""
    found: torch.dtype | None = getattr(torch, name) if name else None
    return found


def _published(last: WeightManifest | None, version: int) -> WeightManifest:
    if last is None or last.version != version:
        raise ChannelLost(f"this trainer has not published version {version}")
    return last


def open_channel(
    settings: ChannelSettings,
    run_name: str,
    bases: Callable[[], Mapping[str, Basis]] | None = None,
) -> WeightChannel:
    """The trainer's end of the channel that `settings` names. Raises `WeightError` for one that
    this machine cannot have."""
    if settings.channel == "ipc":
        from loopwright.actors.channels.ipc import IpcChannel

        return IpcChannel(settings)
    if settings.in_place and settings.channel == "shared_memory":
        from loopwright.actors.channels.in_place import InPlaceChannel

        return InPlaceChannel(run_name, torch_dtype(settings.dtype))
    if settings.channel == "shared_memory":
        return SharedMemoryChannel(run_name, settings.dtype)
    carrier: Segments | Host = Segments(run_name)
    if settings.carrier == "collective":
        carrier = Host(
            address=settings.host or own_address(settings.head),
            device=settings.device,
            timeout_s=settings.timeout_s,
            bucket_bytes=settings.bucket_bytes,
            receivers_per_engine=settings.receivers_per_engine,
        )
    if settings.channel == "adapter":
        from loopwright.actors.channels.adapter import AdapterChannel

        return AdapterChannel(settings, carrier, run_name)
    return ImageChannel(settings, carrier, bases if settings.channel == "lowrank_delta" else None)
