"""Packing and balance against known answers, and their guarantees on any lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwright.algorithms.packing import (
    balance_ranks,
    best_fit_decreasing,
    padded_micro_batches,
    sequence_cost,
)

LENGTHS = st.lists(st.integers(1, 50), min_size=0, max_size=60)


def _values(bins: list[list[int]], values: list[int]) -> list[list[int]]:
    return [[values[i] for i in indices] for indices in bins]


def test_best_fit_decreasing_on_the_textbook_lengths() -> None:
    lengths = [7, 6, 5, 4, 3, 2, 2, 1]
    bins = best_fit_decreasing(lengths, 10)
    assert _values(bins, lengths) == [[7, 3], [6, 4], [5, 2, 2, 1]]


def test_a_sequence_beyond_the_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match=r"11 tokens.*10"):
        best_fit_decreasing([3, 11], 10)


@given(LENGTHS)
def test_bins_hold_everything_once_and_never_overflow(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, 50)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 50 for b in bins)
    assert len(bins) <= 2 * max(1, -(-sum(lengths) // 50))  # any fit wastes less than half


@given(LENGTHS, st.integers(1, 200))
def test_padded_micro_batches_stay_in_the_budget(lengths: list[int], budget: int) -> None:
    batches = padded_micro_batches(lengths, budget)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) * max(lengths[i] for i in b) <= budget or len(b) == 1 for b in batches)


def test_ranks_are_balanced_longest_first() -> None:
    costs = [9, 7, 6, 5, 4, 3]
    ranks = balance_ranks(costs, 2)
    assert [sum(costs[i] for i in rank) for rank in ranks] == [17, 17]
    with pytest.raises(ValueError, match="ranks=0"):
        balance_ranks(costs, 0)


def test_cost_is_quadratic_plus_linear() -> None:
    cost = sequence_cost(np.array([2, 10]), quadratic=0.5, linear=3.0)
    assert cost.tolist() == [8.0, 80.0]
