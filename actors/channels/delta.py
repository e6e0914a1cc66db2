"""Lossless coding of what changed in a tensor: which elements, and their bits exclusive-or'd.

At the learning rates of reinforcement learning most bfloat16 weights do not change from one version
to the next, and those that do change in their last bits: both compress well. The code of one tensor
is a byte that says how, a count, and a zstd frame of byte planes (all lowest bytes first, then the
next), because a plane of high bytes is nearly constant.

    sparse   gaps between the changed places (uint32), then their bits
    dense    the bits of every element, where more than a quarter changed
"""

import struct

import numpy as np
import torch
import zstandard
from torch import Tensor

from loopwright.actors.weights import WeightError

_HEADER = struct.Struct("<BQ")  # how, elements that changed
_SAME, _SPARSE, _DENSE = range(3)
_DENSE_SHARE = 0.25  # of elements changed: above, places cost more than they save
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits_of(tensor: Tensor) -> np.ndarray:
    """The elements of a contiguous tensor on the CPU as unsigned integers [numel], sharing its
    memory."""
    flat = tensor.detach().view(-1).view(torch.uint8).numpy()
    return flat.view(_UNSIGNED[tensor.element_size()])


def encode_change(old: Tensor, new: Tensor, *, level: int = 1) -> bytes:
    """What turns `old` into `new`: contiguous CPU tensors of one shape and dtype."""
    changed = bits_of(old) ^ bits_of(new)
    places = np.flatnonzero(changed)
    if not len(places):
        return _HEADER.pack(_SAME, 0)
    if len(places) > _DENSE_SHARE * len(changed):
        return _HEADER.pack(_DENSE, len(places)) + _compress(_planes(changed), level)
    gaps = np.diff(places, prepend=-1) - 1
    if int(gaps.max()) >= 1 << 32:
        return _HEADER.pack(_DENSE, len(places)) + _compress(_planes(changed), level)
    parts = _planes(gaps.astype(np.uint32)) + _planes(changed[places])
    return _HEADER.pack(_SPARSE, len(places)) + _compress(parts, level)


def apply_change(target: Tensor, code: bytes | memoryview, name: str) -> None:
    """Turn `target`, which equals the `old` of the encoding, into its `new`, in place.

    Raises `WeightError` naming the tensor for a code that is damaged or of another tensor.
    """
    bits = bits_of(target)
    try:
        how, count = _HEADER.unpack_from(code)
        if how == _SAME:
            return
        width = bits.itemsize
        expected = len(bits) * width if how == _DENSE else count * (4 + width)
        raw = zstandard.ZstdDecompressor().decompress(
            code[_HEADER.size :], max_output_size=max(expected, 1)
        )
        if len(raw) != expected or how not in (_SPARSE, _DENSE):
            raise ValueError(f"{len(raw)} bytes after decompression, expected {expected}")
        if how == _DENSE:
            bits ^= _joined(raw, len(bits), bits.dtype)
            return
        places = np.cumsum(_joined(raw[: 4 * count], count, np.dtype(np.uint32)).astype(np.int64))
        places += np.arange(count)
        bits[places] ^= _joined(raw[4 * count :], count, bits.dtype)
    except (struct.error, ValueError, IndexError, zstandard.ZstdError) as error:
        raise WeightError(f"tensor {name}: its encoded change is damaged ({error})") from error


def _planes(values: np.ndarray) -> bytes:
    """All lowest bytes of `values`, then all next ones, …"""
    return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _joined(raw: bytes, count: int, dtype: np.dtype) -> np.ndarray:
    """The inverse of `_planes`: [count] of `dtype`."""
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, count)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(count)


def _compress(raw: bytes, level: int) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(raw)
