"""The trainer's own copy of what it last published, and an engine's of what it last received."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopwright.actors.weights import (
    WeightManifest,
    aligned,
    copy_and_checksum,
    dtype_name,
    owners,
    refuse_missing,
    refuse_unknown,
    stored_dtype,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor lies in one run of bytes; tied names share a place."""

    owner: dict[str, str]  # name -> the name whose bytes it shares
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    offsets: dict[str, int]  # bytes, of every name
    size_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> "Layout":
        """For tensors as they come, of which only shape, dtype and identity matter; floating-point
        ones lie in `dtype`, if that is given."""
        dtypes = {name: stored_dtype(tensor, dtype) for name, tensor in tensors.items()}
        owner = owners(tensors)
        offsets: dict[str, int] = {}
        end = 0
        for name, first in owner.items():
            if name == first:
                offsets[name] = end
                end += aligned(max(1, tensors[name].numel() * dtypes[name].itemsize))
        return cls(
            owner,
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            dtypes,
            {name: offsets[first] for name, first in owner.items()},
            max(end, 1),
        )

    @classmethod
    def from_manifest(cls, manifest: WeightManifest) -> "Layout":
        """As the trainer laid out a publish whose tensors travel whole."""
        at: dict[int, str] = {}
        offsets = manifest.offsets
        owner = {n: at.setdefault(o, n) for n, o in zip(manifest.names, offsets, strict=True)}
        shapes = dict(zip(manifest.names, manifest.shapes, strict=True))
        dtypes = {
            n: getattr(torch, d) for n, d in zip(manifest.names, manifest.dtypes, strict=True)
        }
        return cls(
            owner,
            shapes,
            dtypes,
            dict(zip(manifest.names, offsets, strict=True)),
            manifest.size_bytes,
        )

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors that lie in `flat` [size_bytes] uint8, without a copy; tied ones are the same
        object."""
        found: dict[str, Tensor] = {}
        for name, first in self.owner.items():
            if name != first:
                found[name] = found[first]
                continue
            dtype, shape = self.dtypes[name], self.shapes[name]
            end = self.offsets[name] + torch.Size(shape).numel() * dtype.itemsize
            found[name] = flat[self.offsets[name] : end].view(dtype).view(shape)
        return found


class Image:
    """Weights as they were published last, in the trainer's memory; filled bucket by bucket."""

    def __init__(self, shapes: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        """Room for `shapes`, as `Layout.of` has it; nothing is in it yet."""
        self.layout = Layout.of(shapes, dtype)
        self.flat = torch.empty(self.layout.size_bytes, dtype=torch.uint8)
        self.views = self.layout.views(self.flat)
        self.checksums: dict[str, int] = {}
        self.version = -1

    def fits(self, shapes: Mapping[str, Tensor]) -> bool:
        """Whether tensors of these names and shapes belong here."""
        return {name: tuple(tensor.shape) for name, tensor in shapes.items()} == self.layout.shapes

    def fill(self, buckets: Iterable[Mapping[str, Tensor]]) -> None:
        """Copy and checksum all tensors. Raises `WeightError` for others than it has room for."""
        for name, tensor in self.fresh(buckets):
            self.checksums[name] = copy_and_checksum(self.views[name], tensor)

    def fresh(self, buckets: Iterable[Mapping[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """(owning name, tensor) of everything in `buckets`, each once and none missing."""
        came: set[str] = set()
        done: set[str] = set()
        for bucket in buckets:
            refuse_unknown("publish", self.layout.shapes, bucket)
            for name in bucket:
                came.add(name)
                first = self.layout.owner[name]
                if first not in done:
                    done.add(first)
                    yield first, bucket[name]
        refuse_missing("publish", self.layout.owner, came)

    def description(self) -> dict[str, Any]:
        """Names, shapes, dtypes and checksums as a manifest has them."""
        layout = self.layout
        names = tuple(layout.owner)
        return {
            "names": names,
            "shapes": tuple(layout.shapes[n] for n in names),
            "dtypes": tuple(dtype_name(layout.dtypes[n]) for n in names),
            "checksums": tuple(self.checksums[layout.owner[n]] for n in names),
        }
