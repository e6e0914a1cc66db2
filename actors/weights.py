"""Weights as they are published: the manifest that describes them, and the proof that they arrived.

A manifest says what every engine holds once it has taken a policy version; `channels/` moves the
bytes. Every engine answers with the checksum of every tensor, and a difference names the tensor.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgpack
import numpy as np
import xxhash

if TYPE_CHECKING:  # torch is imported at use: environment workers read the manifest's type only
    import torch

MANIFEST_SCHEMA = 2
ALIGNMENT = 64  # bytes; one cache line, and enough for any dtype
_NAMED = 5  # tensors an error names before it counts the rest
_CHUNK_BYTES = 256 << 10  # copied and then hashed while it is still in the cache

Kind = Literal["full", "adapter", "delta", "lowrank"]
Carrier = Literal["shared_memory", "collective", "ipc"]


class WeightError(Exception):
    """Weights that cannot be written, found or trusted; the text names tensors and remedy."""


class ChannelLost(WeightError):
    """A transfer that was cut off: a peer is gone or a deadline passed. Says nothing against the
    weights; the remedy is to send them again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """What engines hold once they have taken one policy version, and how its bytes get to them.

    Names, shapes, dtypes and checksums describe the tensors that result, however little travels.
    Tied tensors share one offset.
    """

    version: int
    kind: Kind
    segment: str  # name of the shared memory segment; collective: "host:port/group"
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]  # "float32", "bfloat16", …
    offsets: tuple[int, ...]  # bytes: of each tensor, or of what encodes its change
    checksums: tuple[int, ...]  # xxh3_64 of each resulting tensor's bytes
    size_bytes: int  # that travel: of one slot, or of everything that encodes the change
    carrier: Carrier = "shared_memory"
    base_version: int = -1  # delta, lowrank: the version they change
    code_sizes: tuple[int, ...] = ()  # delta, lowrank: bytes that encode each tensor's change
    code_checksums: tuple[int, ...] = ()  # and their xxh3_64
    scale: float = 0.0  # adapter: W = base + scale * B A
    base: bytes = b""  # adapter: the encoded manifest of the weights below it
    receivers: int = 1  # collective: how many take part beside the trainer
    bucket_bytes: int = 0  # of one message; 0: engines read the tensors where they lie
    timeout_s: float = 60.0  # collective: for each wait

    @property
    def in_place(self) -> bool:
        """Whether engines serve from the trainer's shared memory itself."""
        return self.carrier == "shared_memory" and self.bucket_bytes == 0

    @property
    def lasting(self) -> bool:
        """Whether an engine that starts later can take this very publish."""
        return self.carrier == "shared_memory" and self.kind in ("full", "adapter")

    def __post_init__(self) -> None:
        lengths = {len(self.shapes), len(self.dtypes), len(self.offsets), len(self.checksums)}
        if lengths != {len(self.names)}:
            raise WeightError(
                f"WeightManifest of version {self.version}: {len(self.names)} names, but "
                f"shapes, dtypes, offsets and checksums number {sorted(lengths)}"
            )


def wrong_dtypes(manifest: WeightManifest, dtype: str) -> list[str]:
    """One text for each dtype of floating-point tensors that an engine of `dtype` does not serve:
    converted there, they would not be what the trainer compares with."""
    wrong = {
        d: name
        for name, d in zip(manifest.names, manifest.dtypes, strict=True)
        if "float" in d and d != dtype
    }
    return [f"{name} is {d}, the engine serves in {dtype}" for d, name in wrong.items()]


def encode(manifest: WeightManifest) -> bytes:
    """The manifest as msgpack bytes under the current schema version."""
    return msgpack.packb({"v": MANIFEST_SCHEMA, "manifest": asdict(manifest)})


def decode(data: bytes) -> WeightManifest:
    """The manifest in `data`. Raises `WeightError` for bytes that are not one of this schema."""
    try:
        frame = msgpack.unpackb(data, use_list=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise WeightError(f"{len(data)} bytes that are no weight manifest: {error}") from error
    if not isinstance(frame, dict) or frame.get("v") != MANIFEST_SCHEMA:
        found = frame.get("v") if isinstance(frame, dict) else type(frame).__name__
        raise WeightError(f"weight manifest schema {found}, this build reads {MANIFEST_SCHEMA}")
    return WeightManifest(**frame["manifest"])


def manifest_checksums(manifest: WeightManifest) -> dict[str, int]:
    """Tensor name -> xxh3_64, as published."""
    return dict(zip(manifest.names, manifest.checksums, strict=True))


def checksum(tensor: "torch.Tensor") -> int:
    """xxh3_64 of a tensor's bytes in row-major order, any dtype; off a device it is copied.

    Chosen by measurement: 100 MB take 32 ms of CPU by zlib's crc32, 4 ms by xxh3 (a copy: 10 ms).
    """
    import torch

    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(flat.numpy().data)


def copy_and_checksum(target: "torch.Tensor", source: "torch.Tensor") -> int:
    """Copy `source` into `target` (contiguous, same shape; dtypes may differ), and the checksum of
    what then lies there, taken while it is in the cache."""
    import torch

    flat = target.view(-1)
    values = source.detach().reshape(-1)
    bytes_of = flat.view(torch.uint8).numpy()
    width = flat.element_size()
    step = max(1, _CHUNK_BYTES // width)
    digest = xxhash.xxh3_64()
    for start in range(0, len(flat), step):
        flat[start : start + step].copy_(values[start : start + step])
        digest.update(bytes_of[start * width : (start + step) * width].data)
    return digest.intdigest()


def verify(tensors: Mapping[str, "torch.Tensor"], checksums: Mapping[str, int]) -> dict[str, int]:
    """xxh3_64 of every tensor that `checksums` names, after comparing.

    Raises `WeightError` naming the tensors that are missing or whose bytes differ.
    """
    found: dict[str, int] = {}
    by_place: dict[tuple[int, int], int] = {}  # tied tensors are read once
    for name in checksums:
        if name in tensors:
            tensor = tensors[name]
            place = (tensor.data_ptr(), tensor.nbytes)
            if place not in by_place or not tensor.is_contiguous():
                by_place[place] = checksum(tensor)
            found[name] = by_place[place]
    wrong = [name for name, expected in checksums.items() if found.get(name) != expected]
    if wrong:
        detail = "; ".join(
            f"{name} has {_hex(found.get(name))}, published {_hex(checksums[name])}"
            for name in wrong[:_NAMED]
        )
        raise WeightError(
            f"{len(wrong)} of {len(checksums)} tensors differ from what was published: {detail}"
            f"{_rest(wrong)}. Publish again; if it repeats, suspect the memory of this host"
        )
    return found


def owners(tensors: Mapping[str, "torch.Tensor"]) -> dict[str, str]:
    """Name -> the first name whose bytes it shares. Tensors without bytes (on the meta device)
    are tied if they are the same object."""
    first_at: dict[Any, str] = {}
    owner: dict[str, str] = {}
    for key, tensor in tensors.items():
        where: Any = id(tensor)
        if tensor.device.type != "meta" and tensor.numel():
            layout = (tensor.dtype, tuple(tensor.shape), tensor.stride())
            where = (tensor.device, tensor.data_ptr(), *layout)
        owner[key] = first_at.setdefault(where, key)
    return owner


def refuse_unknown(
    writer: str, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, "torch.Tensor"]
) -> None:
    """Raise `WeightError` for tensors that are not those that `writer` was laid out for."""
    unknown = [name for name in tensors if name not in shapes]
    reshaped = [
        f"{name} {list(tensor.shape)} (laid out {list(shapes[name])})"
        for name, tensor in tensors.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    for label, names in (("unknown", unknown), ("other shape", reshaped)):
        if names:
            raise WeightError(
                f"{writer}: tensors are not those it was created for: {label} "
                f"{', '.join(names[:_NAMED])}{_rest(names)}. Create another writer for another "
                f"model"
            )


def refuse_missing(writer: str, owner: Mapping[str, str], came: set[str]) -> None:
    """Raise `WeightError` unless every name, or one that it is tied to, has come."""
    whole = {owner[name] for name in came}
    missing = [name for name in owner if name not in came and owner[name] not in whole]
    if missing:
        raise WeightError(
            f"{writer}: tensors are not those it was created for: missing "
            f"{', '.join(missing[:_NAMED])}{_rest(missing)}. Create another writer for another "
            f"model"
        )


def view_at(
    buffer: np.ndarray, shape: tuple[int, ...], dtype: str, offset: int, name: str
) -> "torch.Tensor":
    """The tensor of `shape` and `dtype` that lies at `offset` bytes of `buffer` [bytes] uint8."""
    import torch

    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise WeightError(f"tensor {name}: dtype {dtype!r} is not one that torch knows")
    size_bytes = int(np.prod(shape, dtype=np.int64)) * torch_dtype.itemsize
    if offset < 0 or offset + size_bytes > buffer.size:
        raise WeightError(
            f"tensor {name}: bytes {offset} to {offset + size_bytes} lie outside a segment of "
            f"{buffer.size}"
        )
    part = torch.from_numpy(buffer[offset : offset + size_bytes])
    return part.view(torch_dtype).view(shape)


def stored_dtype(tensor: "torch.Tensor", dtype: "torch.dtype | None") -> "torch.dtype":
    """What a tensor is published as: floating-point ones in `dtype`, if that is given."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def dtype_name(dtype: "torch.dtype") -> str:
    """As manifests write it: "float32", "bfloat16", …"""
    return str(dtype).removeprefix("torch.")


def aligned(size_bytes: int, alignment: int = ALIGNMENT) -> int:
    """`size_bytes` rounded up to a multiple of `alignment`."""
    return -(-size_bytes // alignment) * alignment


def _hex(value: int | None) -> str:
    return "nothing" if value is None else f"{value:016x}"


def _rest(names: list[str]) -> str:
    return f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
