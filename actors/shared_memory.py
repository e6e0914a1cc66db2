"""Shared memory of one host: written once by the trainer, read in place by every engine.

One POSIX shared memory segment (a file in `/dev/shm`) holds two slots. The trainer writes the slot
that no engine reads, checksums each tensor, and only then hands out the manifest: the manifest is
the commit. A reader holds a lock on the slot it maps for as long as a view lives (an open file
description lock, which the kernel drops with its process), and `write` takes a slot that nobody
maps: what an engine serves from is never overwritten.

    trainer                                         every engine
    shared = SharedWeights.create(run, tensors)
    manifest = shared.write(version, tensors)  -->  tensors = attach(manifest)
                                                    verify(tensors, manifest_checksums(manifest))

Segments are plain memory-mapped files rather than `multiprocessing.shared_memory`: its resource
tracker unlinks a segment when any process that attached it ends. A writer holds a file lock on its
segment; the kernel drops the lock when the writer dies, however it dies, which is how
`unlink_stale` tells what is left over. Engines that map an unlinked segment keep what they map.
"""

import ctypes
import fcntl
import mmap
import os
import re
import secrets
import shutil
import struct
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loopwright.actors.weights import (
    Kind,
    WeightError,
    WeightManifest,
    aligned,
    checksum,
    copy_and_checksum,
    dtype_name,
    owners,
    refuse_missing,
    refuse_unknown,
    stored_dtype,
    view_at,
)

if TYPE_CHECKING:
    import torch

SEGMENT_FOLDER = Path("/dev/shm")
SEGMENT_PREFIX = "loopwright-"
ADAPTER_PREFIX = f"{SEGMENT_PREFIX}adapter-"  # then the process id, a dot, and letters
_RESERVE_BYTES = 1 << 20  # left free on /dev/shm
_OFD_SETLK = 37  # fcntl(2): lock a byte range for an open file description, never waiting


def attach(
    manifest: WeightManifest, mappings: "Mappings | None" = None
) -> dict[str, "torch.Tensor"]:
    """Views on the published tensors, without a copy. They stay mapped for as long as a view lives.

    The mapping is private: writing to a view changes this process alone, so treat the views as
    read-only. With `mappings` it is used again for the next publish. Raises `WeightError` if the
    segment is gone, too small or being rewritten.
    """
    path = SEGMENT_FOLDER / manifest.segment
    slot = min(manifest.offsets, default=0) // manifest.size_bytes
    try:
        with path.open("rb") as file:
            # A duplicate of the descriptor keeps the lock after this block.
            held = os.dup(file.fileno())
            locked = _lock(held, fcntl.F_RDLCK, slot * manifest.size_bytes, manifest.size_bytes)
            mapped = (mappings or Mappings()).of(manifest.segment, held)
    except (FileNotFoundError, ValueError) as error:
        raise WeightError(
            f"weights of version {manifest.version}: no shared memory segment {path} ({error}). "
            f"The trainer that wrote it has ended, or runs on another host; publish again"
        ) from error
    lease = _lease(mapped, held)
    if not locked:
        raise WeightError(
            f"weights of version {manifest.version} are being overwritten by a later version in "
            f"{path}; take the later manifest"
        )
    buffer = np.frombuffer(lease, dtype=np.uint8)
    views: dict[str, torch.Tensor] = {}
    for name, shape, dtype, offset in zip(
        manifest.names, manifest.shapes, manifest.dtypes, manifest.offsets, strict=True
    ):
        views[name] = view_at(buffer, shape, dtype, offset, name)
    return views


class Mappings:
    """The segment that a process mapped last, kept mapped: the page tables of 100 MB cost more to
    build than the bytes to read."""

    def __init__(self) -> None:
        """Nothing is mapped yet."""
        self._segment = ""
        self._mapped: mmap.mmap | None = None

    def of(self, segment: str, file: int) -> mmap.mmap:
        """The whole of `segment`, which `file` has open."""
        if segment != self._segment or self._mapped is None:
            # Through a description of its own, so that no lock of `file` lives as long as it.
            own = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
            try:
                self._mapped = mmap.mmap(own, 0, access=mmap.ACCESS_COPY)
            finally:
                os.close(own)
            self._segment = segment
        return self._mapped

    def close(self) -> None:
        """Forget it; it is unmapped with the last view."""
        self._segment, self._mapped = "", None


def _lease(mapped: mmap.mmap, held: int) -> Any:
    """The bytes of `mapped`; `held`, and with it a lock, is closed once nobody views them."""
    kind: Any = type("_Lease", (ctypes.Array,), {"_type_": ctypes.c_ubyte, "_length_": len(mapped)})
    lease = kind.from_buffer(mapped)
    weakref.finalize(lease, os.close, held)
    return lease


def unlink_stale(name: str = "", *, keep: str = "") -> list[str]:
    """Unlink the segments of writers that have ended, and return their names.

    `name` is the one given to `SharedWeights.create` (empty: any); the segment `keep` stays, for
    engines that start before the next publish. Segments of living writers are never touched.
    """
    removed = []
    run = re.escape(name) if name else ".+"  # "a" is not "a-b", whose segments begin with it
    wanted = re.compile(rf"{SEGMENT_PREFIX}{run}-[0-9]+-[0-9a-f]{{8}}")
    for path in sorted(SEGMENT_FOLDER.glob(f"{SEGMENT_PREFIX}*")):
        if path.name == keep or not wanted.fullmatch(path.name):
            continue
        try:
            with path.open("rb") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except (BlockingIOError, FileNotFoundError, PermissionError):
            continue  # a living writer's, already gone, or another user's
        removed.append(path.name)
    return removed + remove_stale_adapters()


def remove_stale_adapters(folder: Path = SEGMENT_FOLDER) -> list[str]:
    """Remove the adapter folders of engines that were killed while vLLM read them, and return their
    names. Those of living processes are never touched."""
    removed = []
    for path in sorted(folder.glob(f"{ADAPTER_PREFIX}*.*")):
        owner = path.name.removeprefix(ADAPTER_PREFIX).partition(".")[0]
        if not owner.isdigit() or Path("/proc", owner).exists():
            continue
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path.name)
    return removed


class Segment:
    """A segment that is written once."""

    def __init__(self, name: str, size_bytes: int) -> None:
        """Allocate it under a lock that the kernel drops when this process ends."""
        self.name = name
        self._file = _allocate(name, size_bytes)

    @classmethod
    def holding(cls, run_name: str, flat: "torch.Tensor") -> "Segment":
        """A new segment of the run that holds `flat` [bytes] uint8."""
        segment = cls(new_segment_name(run_name), len(flat))
        buffer = np.frombuffer(mmap.mmap(segment._file, len(flat)), dtype=np.uint8)
        buffer[:] = flat.numpy()
        return segment

    def close(self) -> None:
        """Unlink it; engines that map it keep what they map. Idempotent."""
        if self._file >= 0:
            (SEGMENT_FOLDER / self.name).unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1


def read_segment(name: str, size_bytes: int) -> "torch.Tensor":
    """The first `size_bytes` of a segment [size_bytes] uint8, mapped. Raises `WeightError` if it is
    gone or shorter."""
    import torch

    path = SEGMENT_FOLDER / name
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), size_bytes, access=mmap.ACCESS_COPY)
    except (FileNotFoundError, ValueError) as error:
        raise WeightError(
            f"no shared memory segment {path} of {size_bytes:,} bytes ({error}). The trainer that "
            f"wrote it has ended, or runs on another host; publish again"
        ) from error
    return torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8))


class SharedWeights:
    """The writer: one segment with two slots, allocated once, written in turn.

    With one slot (`in_place`) the segment is where the trainer's own parameters live (`views`):
    nothing is copied, and engines must not generate while they are trained.
    """

    def __init__(
        self,
        segment: str,
        kind: Kind,
        names: Mapping[str, str],
        tensors: Mapping[str, "torch.Tensor"],
        dtype: "torch.dtype | None",
        slots: int,
    ) -> None:
        """Called by `create`. `names` maps each name to the one whose bytes it shares."""
        self.segment = segment
        self._kind: Kind = kind
        self._owner = dict(names)
        self._shapes = {name: tuple(tensors[name].shape) for name in names}
        self._dtypes = {name: stored_dtype(tensors[name], dtype) for name in names}
        self._offsets: dict[str, int] = {}
        end = 0
        for name, owner in names.items():
            if owner == name:
                self._offsets[name] = end
                end += aligned(tensors[name].numel() * self._dtypes[name].itemsize)
        self.size_bytes = aligned(max(end, 1), mmap.PAGESIZE)
        self._slots = slots
        self._next_slot = 0
        self._file = _allocate(segment, slots * self.size_bytes)
        self._buffer = np.frombuffer(mmap.mmap(self._file, slots * self.size_bytes), dtype=np.uint8)
        self._closed = False

    @classmethod
    def create(
        cls,
        name: str,
        tensors: Mapping[str, "torch.Tensor"],
        *,
        kind: Kind = "full",
        dtype: "torch.dtype | None" = None,
        in_place: bool = False,
    ) -> "SharedWeights":
        """Allocate a new segment laid out for `tensors` (their values are not written yet).

        The segment's name is unique to this writer, so readers of a former one are never disturbed.
        `dtype` is what floating-point tensors are stored as (None: as they are). Raises
        `WeightError` if `/dev/shm` has too little room for both slots. `in_place`: one slot alone.
        """
        if not tensors:
            raise WeightError(f"SharedWeights {name!r}: no tensors to lay out")
        slots = 1 if in_place else 2
        return cls(new_segment_name(name), kind, owners(tensors), tensors, dtype, slots)

    def views(self) -> dict[str, "torch.Tensor"]:
        """The tensors of the first slot where they lie, to write to; tied ones share bytes."""
        return {
            name: view_at(
                self._buffer, shape, dtype_name(self._dtypes[name]),
                self._offsets[self._owner[name]], name,
            )
            for name, shape in self._shapes.items()
        }  # fmt: skip

    def published(self, version: int) -> WeightManifest:
        """The manifest of what lies in the first slot now (`in_place`): read once, not copied."""
        views = self.views()
        return self._manifest(version, 0, {name: checksum(views[name]) for name in self._offsets})

    def write(self, version: int, tensors: Mapping[str, "torch.Tensor"]) -> WeightManifest:
        """Copy `tensors` into a slot that nobody maps and return the manifest that publishes them.

        Raises `WeightError` if names or shapes are not those of `create`, or if both slots are
        mapped: some engine has not taken the last manifest yet.
        """
        return self.write_buckets(version, [tensors])

    def write_buckets(
        self, version: int, buckets: "Iterable[Mapping[str, torch.Tensor]]"
    ) -> WeightManifest:
        """As `write`, of tensors that come in parts, of which only one need exist at a time.

        Tied tensors come in the same part, or only the first of them comes.
        """
        if self._closed:
            raise WeightError(f"SharedWeights {self.segment} is closed; create another writer")
        slot = self._lock_slot()
        try:
            return self._write_slot(slot * self.size_bytes, version, buckets)
        finally:
            self._next_slot = self._slots - 1 - slot
            _lock(self._file, fcntl.F_UNLCK, slot * self.size_bytes, self.size_bytes)

    def overwrite(
        self, version: int, buckets: "Iterable[Mapping[str, torch.Tensor]]"
    ) -> WeightManifest:
        """Write over the first slot although engines map it: they are asleep (`in_place`)."""
        return self._write_slot(0, version, buckets)

    def _lock_slot(self) -> int:
        for slot in dict.fromkeys((self._next_slot, self._slots - 1 - self._next_slot)):
            if _lock(self._file, fcntl.F_WRLCK, slot * self.size_bytes, self.size_bytes):
                return slot
        raise WeightError(
            f"SharedWeights {self.segment}: engines serve from both slots, so nothing may be "
            f"overwritten. Publish the last manifest to every engine, then write again"
        )

    def _write_slot(
        self, base: int, version: int, buckets: "Iterable[Mapping[str, torch.Tensor]]"
    ) -> WeightManifest:
        checksums: dict[str, int] = {}
        came: set[str] = set()
        for bucket in buckets:
            refuse_unknown(f"SharedWeights {self.segment}", self._shapes, bucket)
            for name in bucket:
                came.add(name)
                owner = self._owner[name]
                if owner in checksums:
                    continue
                dtype = dtype_name(self._dtypes[owner])
                offset = base + self._offsets[owner]
                view = view_at(self._buffer, self._shapes[owner], dtype, offset, name)
                checksums[owner] = copy_and_checksum(view, bucket[name])
        refuse_missing(f"SharedWeights {self.segment}", self._owner, came)
        return self._manifest(version, base, checksums)

    def _manifest(self, version: int, base: int, checksums: Mapping[str, int]) -> WeightManifest:
        names = tuple(self._owner)
        return WeightManifest(
            version=version,
            kind=self._kind,
            segment=self.segment,
            names=names,
            shapes=tuple(self._shapes[name] for name in names),
            dtypes=tuple(dtype_name(self._dtypes[name]) for name in names),
            offsets=tuple(base + self._offsets[self._owner[name]] for name in names),
            checksums=tuple(checksums[self._owner[name]] for name in names),
            size_bytes=self.size_bytes,
        )

    def close(self) -> None:
        """Unlink the segment; engines that map it keep what they map. Idempotent."""
        if self._closed:
            return
        self._closed = True
        (SEGMENT_FOLDER / self.segment).unlink(missing_ok=True)
        self._buffer = np.empty(0, dtype=np.uint8)
        os.close(self._file)


def new_segment_name(name: str) -> str:
    """A name that no other segment has, of the run `name` and this process."""
    return f"{SEGMENT_PREFIX}{name}-{os.getpid()}-{secrets.token_hex(4)}"


def _allocate(segment: str, size_bytes: int) -> int:
    """A locked file descriptor of a new segment whose memory is committed (no later SIGBUS)."""
    room = os.statvfs(SEGMENT_FOLDER)
    free_bytes = room.f_bavail * room.f_frsize
    if size_bytes + _RESERVE_BYTES > free_bytes:
        raise WeightError(
            f"shared memory for the weights: {size_bytes:,} bytes are needed, "
            f"{SEGMENT_FOLDER} has {free_bytes:,} free. Enlarge it (docker: --shm-size), remove "
            f"stale {SEGMENT_PREFIX}* files there, or publish in a smaller dtype"
        )
    path = SEGMENT_FOLDER / segment
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # First touch costs several times a copy: pay it once, here.
        os.posix_fallocate(file, 0, size_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        os.close(file)
        raise WeightError(
            f"shared memory segment {path} of {size_bytes:,} bytes: {error}"
        ) from error
    return file


def _lock(file: int, kind: int, start: int, size_bytes: int) -> bool:
    """Lock or unlock bytes of a segment for its open file description; False if another holds
    them."""
    request = struct.pack("hhqqixxxx", kind, os.SEEK_SET, start, size_bytes, 0)  # struct flock
    try:
        fcntl.fcntl(file, _OFD_SETLK, request)
    except BlockingIOError:
        return False
    return True
