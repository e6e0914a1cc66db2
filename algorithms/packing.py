"""Which sequences go into one row, one micro-batch, one rank. Lengths in, indices out."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`: longest first, each into the fullest bin
    that takes it.

    Raises `ValueError` for a length beyond the capacity. Ties keep the order given, so the result
    is deterministic.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and int(sizes.max()) > capacity:
        raise ValueError(
            f"a sequence of {int(sizes.max())} tokens does not fit a bin of {capacity}; raise the "
            "capacity"
        )
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), sorted
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        slot = bisect_left(room, (size, -1))
        if slot == len(room):
            bins.append([])
            free, chosen = capacity, len(bins) - 1
        else:
            free, chosen = room.pop(slot)
        bins[chosen].append(index)
        insort(room, (free - size, chosen))
    return bins


def padded_micro_batches(lengths: Sequence[int] | np.ndarray, token_budget: int) -> list[list[int]]:
    """Indices grouped so that rows × longest ≤ `token_budget`, sorted by length so that little is
    padded.

    A sequence longer than the budget stands alone: it cannot be cut.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    batches: list[list[int]] = []
    widest = 0
    for index in np.argsort(-sizes, kind="stable").tolist():
        if not batches or (len(batches[-1]) + 1) * widest > token_budget:
            batches.append([])
            widest = int(sizes[index])
        batches[-1].append(index)
    return batches


def sequence_cost(lengths: np.ndarray, *, quadratic: float, linear: float) -> np.ndarray:
    """Compute of a sequence of s tokens: quadratic·s² + linear·s (attention and matrix products).
    Returns [S].
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    return quadratic * sizes**2 + linear * sizes


def balance_ranks(costs: Sequence[float] | np.ndarray, ranks: int) -> list[list[int]]:
    """Indices of `costs` per rank by longest processing time first (Graham 1969): dearest first, to
    the least loaded.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks}, expected at least 1")
    values = np.asarray(costs, dtype=np.float64)
    loads = [0.0] * ranks
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    for index in np.argsort(-values, kind="stable").tolist():
        rank = loads.index(min(loads))
        loads[rank] += float(values[index])
        assigned[rank].append(index)
    return assigned
