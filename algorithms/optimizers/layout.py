"""How a parameter lies in memory: whole, or cut by rows over the ranks of a process group (FSDP2).

Everything else in this package works on the local rows; what crosses ranks is here.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from loopwright.algorithms.optimizers.options import OptimizerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Shape of a parameter, the part of it that is here, and whom to sum with."""

    shape: torch.Size  # of the whole parameter
    rows: int  # of dimension 0 that are here
    row_start: int  # the first of them
    group: dist.ProcessGroup | None  # ranks that hold the other rows; None: all rows are here
    like: Tensor  # the parameter: its device, and mesh and placements if it is a DTensor

    @classmethod
    def of(cls, name: str, parameter: Tensor) -> "Layout":
        """The layout of `parameter`. Raises `OptimizerError` if it is not whole or cut by rows."""
        if not isinstance(parameter, DTensor):
            rows = parameter.shape[0] if parameter.ndim else 1
            return cls(shape=parameter.shape, rows=rows, row_start=0, group=None, like=parameter)
        cut = [d for d, p in enumerate(parameter.placements) if isinstance(p, Shard)]
        rest = [p for p in parameter.placements if not isinstance(p, (Shard, Replicate))]
        by_rows = [d for d in cut if parameter.placements[d] == Shard(0)]
        if rest or len(cut) > 1 or cut != by_rows:
            raise OptimizerError(
                f"{name}: placed as {parameter.placements}, expected whole or cut once, by rows "
                "(Shard(0), what fully_shard does by default)"
            )
        if not cut:
            return cls(
                shape=parameter.shape,
                rows=parameter.shape[0],
                row_start=0,
                group=None,
                like=parameter,
            )
        mesh = parameter.device_mesh
        size, rank = mesh.size(cut[0]), mesh.get_local_rank(cut[0])
        chunk = -(-parameter.shape[0] // size)
        start = min(rank * chunk, parameter.shape[0])
        return cls(
            shape=parameter.shape,
            rows=min(chunk, parameter.shape[0] - start),
            row_start=start,
            group=mesh.get_group(cut[0]),
            like=parameter,
        )

    @property
    def device(self) -> torch.device:
        """Where states live."""
        return self.like.device

    @property
    def matrix(self) -> tuple[int, int]:
        """(m, n): the last two dimensions of the whole parameter."""
        return self.shape[-2], self.shape[-1]

    @property
    def batched(self) -> bool:
        """Is it a stack of matrices (expert weights), cut between matrices and never through
        one?"""
        return len(self.shape) > 2

    @property
    def matrix_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold other rows of the same matrix."""
        return None if self.batched else self.group

    def local_shape(self, *trailing: int) -> tuple[int, ...]:
        """Shape of a tensor with this parameter's local rows; `trailing` replaces the last
        dimensions, the batch of a stack is kept."""
        return (self.rows, *trailing)

    def local(self, tensor: Tensor) -> Tensor:
        """The rows of `tensor` that are here, without copying."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def sharded(self, local: Tensor) -> Tensor:
        """A state tensor that is cut as the parameter is: a DTensor if that is one."""
        if not isinstance(self.like, DTensor):
            return local
        shape = torch.Size((self.shape[0], *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local,
            self.like.device_mesh,
            self.like.placements,
            run_check=False,
            shape=shape,
            stride=stride,
        )

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum in place over the ranks that hold rows of the same matrix."""
        return sum_over(tensor, self.matrix_group)

    def own_rows(self, tensor: Tensor) -> Tensor:
        """The local rows of a replicated [m, …] tensor."""
        if self.matrix_group is None:
            return tensor
        return tensor[self.row_start : self.row_start + self.rows]

    def gather(self, local: Tensor) -> Tensor:
        """The whole [m, …] tensor of which every rank holds its rows."""
        if self.matrix_group is None:
            return local
        whole = local.new_zeros((self.shape[0], *local.shape[1:]))
        self.own_rows(whole).copy_(local)
        return self.sum(whole)


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum in place over the ranks of `group`; None: nothing to do."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def total_over_ranks(values: Tensor, layouts: list[Layout]) -> Tensor:
    """Sums over ranks of values [k] that belong to parameters of these layouts: in place, one
    collective for all that are cut over the same group."""
    groups = {id(layout.group): layout.group for layout in layouts if layout.group is not None}
    for group in groups.values():
        chosen = torch.tensor([layout.group is group for layout in layouts], device=values.device)
        part = torch.where(chosen, values, torch.zeros_like(values))
        dist.all_reduce(part, group=group)
        values = torch.where(chosen, part, values)
    return values
