"""The change of a matrix as two thin factors, while its optimizer stays in one subspace.

GaLore (Zhao et al. 2024, arXiv 2403.03507) updates W by P·U with a projector P that is kept for
many steps, so between two refreshes of P the change of an m × n matrix is ΔW = P·S exactly, if no
decay is applied: S = Pᵀ·ΔW has r·n numbers. In floating point W is rounded at every optimizer step,
so W + P·S misses some last bits. Those travel too, as a lossless change of what the factors give.
The product is computed in float64, so that trainer and engine round alike whatever their kernels;
where they still differ the checksum tells, and the engine asks for the whole weights.

The code of one tensor: a byte that says the form, the rank, the sizes of what follows, then the
basis (if the engines do not have it), S in float32, and the correction.
"""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopwright.actors.channels.delta import apply_change, encode_change
from loopwright.actors.weights import WeightError, checksum
from loopwright.algorithms.optimizers.bases import LowRank
from loopwright.algorithms.optimizers.inner import ALL_ROWS
from loopwright.algorithms.optimizers.pipeline import Pipeline

_MARK = 7  # no form of `delta.py` begins with it
_HEADER = struct.Struct("<BBIQQ")  # mark, left, rank, bytes of the basis, bytes of the factor


@dataclass(frozen=True, slots=True)
class Basis:
    """A projector with orthonormal columns: `left` [m, r], or right [n, r]."""

    vectors: Tensor
    left: bool

    def checksum(self) -> int:
        """Of its bytes: the same subspace, told from the one after a refresh."""
        return checksum(self.vectors)

    def least_bytes(self, weight: Tensor) -> int:
        """Of the factor alone: a change that takes fewer is better sent as it is."""
        return 4 * self.vectors.shape[1] * weight.shape[1 if self.left else 0]


def projector_bases(backend: Any) -> dict[str, Basis]:
    """Parameter name -> the basis that a backend's optimizer projects its gradient on now.

    Empty for optimizers without projectors, for bases that are coordinates or not orthonormal, and
    for parameters spread over ranks: their changes travel as they are.
    """
    optimizer = getattr(backend, "optimizer", None)
    if not isinstance(optimizer, Pipeline) or backend.ranks.size > 1:
        return {}
    found: dict[str, Basis] = {}
    for slot in optimizer.slots:
        kind, state = slot.recipe.basis, optimizer.state[slot.parameter]
        if isinstance(kind, LowRank) and "basis" in state and slot.parameter.ndim == 2:
            vectors = slot.recipe.basis_codec.read(state, "basis", ALL_ROWS)
            found[slot.name] = Basis(vectors, left=kind.side_of(slot.layout) == "left")
    return found


def is_lowrank(code: bytes | memoryview) -> bool:
    """Whether a code is one of this module."""
    return len(code) > 0 and code[0] == _MARK


def encode_lowrank(
    old: Tensor, new: Tensor, basis: Basis, *, with_basis: bool, level: int = 1
) -> bytes:
    """What turns the matrix `old` into `new`, exactly, for an engine that holds `old`."""
    vectors = basis.vectors.detach().cpu().double()
    change = new.double() - old.double()
    factor = (vectors.T @ change if basis.left else change @ vectors).float()
    rebuilt = _rebuilt(old, vectors, factor, basis.left)
    shipped = _bytes_of(basis.vectors.float()) if with_basis else b""
    thin = _bytes_of(factor)
    head = _HEADER.pack(_MARK, basis.left, vectors.shape[1], len(shipped), len(thin))
    return head + shipped + thin + encode_change(rebuilt, new, level=level)


def apply_lowrank(
    target: Tensor, code: bytes | memoryview, bases: dict[str, Tensor], name: str
) -> None:
    """Turn `target` into what was encoded, in place. `bases` keeps projectors by tensor name.

    Raises `WeightError` naming the tensor for a damaged code.
    """
    try:
        _, left, rank, basis_bytes, factor_bytes = _HEADER.unpack_from(code)
        start, end = _HEADER.size, _HEADER.size + basis_bytes
        rows, columns = target.shape
        if basis_bytes:
            bases[name] = _matrix(code[start:end], (rows if left else columns, rank))
        shape = (rank, columns) if left else (rows, rank)
        factor = _matrix(code[end : end + factor_bytes], shape)
        target.copy_(_rebuilt(target, bases[name].double(), factor, bool(left)))
    except (struct.error, ValueError, KeyError, RuntimeError) as error:
        raise WeightError(f"tensor {name}: its low-rank change is damaged ({error})") from error
    apply_change(target, code[end + factor_bytes :], name)


def _rebuilt(old: Tensor, vectors: Tensor, factor: Tensor, left: bool) -> Tensor:
    """`old` + the product of basis and factor, rounded once."""
    product = vectors @ factor.double() if left else factor.double() @ vectors.T
    return (old.double() + product).to(old.dtype)


def _bytes_of(matrix: Tensor) -> bytes:
    return matrix.detach().cpu().contiguous().numpy().tobytes()


def _matrix(raw: bytes | memoryview, shape: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.frombuffer(raw, np.float32).reshape(shape).copy())
