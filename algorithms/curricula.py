"""What to train on next: schedules, and weights of tasks by what happened to them. Pure functions
of numbers; who draws with them is the orchestrator's."""

from collections.abc import Sequence

import numpy as np


class CurriculumError(ValueError):
    """A schedule or weights that cannot be drawn from."""


def scheduled(step: int, *, start: float, end: float, steps: int, base: float = 4.0) -> float:
    """ZeroSearch's curriculum (arXiv:2505.04588, eq. 5): the value at `step`, counted from 0.

    p_i = p_s + (b^(i/m) − 1) / (b − 1) · (p_e − p_s) with i = `step`, m = `steps`; p_e from step m
    on. With b > 1 the value changes late, with b < 1 early, b = 1 is the straight line. Raises
    `CurriculumError` for m < 1 or b ≤ 0.
    """
    if steps < 1 or base <= 0:
        raise CurriculumError(f"steps {steps} ≥ 1 and base {base} > 0 expected")
    if step >= steps:
        return end
    part = max(step, 0) / steps
    grown = part if base == 1 else (base**part - 1) / (base - 1)
    return start + grown * (end - start)


def pass_rate_weight(rate: float | None, floor: float) -> float:
    """How much a task whose recent pass rate is `rate` is preferred, in [floor, 1].

    4p(1 − p), the variance of its success, as a share of the largest: rollouts that all succeed or
    all fail teach nothing. The floor keeps retired tasks in the draw, so that a task that was
    forgotten is found again. None, never played: 1.
    """
    if not 0 < floor <= 1:
        raise CurriculumError(f"floor {floor}, expected more than 0 and at most 1")
    if rate is None:
        return 1.0
    return floor + (1 - floor) * 4 * rate * (1 - rate)


def pick(weights: Sequence[float], uniform: float) -> int:
    """The index that `uniform` in [0, 1) falls on, where index i owns a share weights[i] of the
    interval. Raises `CurriculumError` where there is nothing to draw."""
    bounds = np.cumsum(np.asarray(weights, dtype=np.float64))
    if not len(bounds) or not np.isfinite(bounds[-1]) or bounds[-1] <= 0 or min(weights) < 0:
        raise CurriculumError(f"weights {list(weights)[:8]}: nothing to draw from")
    return min(int(np.searchsorted(bounds, uniform * bounds[-1], side="right")), len(bounds) - 1)


def settled_before(ticket: int, *, max_lag: int, groups_per_step: int) -> int:
    """Every ticket below this one is trained on before `ticket` is admitted, whatever the speeds.

    At most (max_lag + 1)·P − (W − 1) tickets are outstanding, and W − 1 higher ones may have
    overtaken the oldest of them: so the oldest is at most (max_lag + 1)·P − 1 below `ticket`. What
    a sampler knows when it draws a ticket's task is therefore a function of the ticket alone.
    """
    return max(0, ticket - (max_lag + 1) * groups_per_step + 1)
