"""The time model against the numbers of its sources."""

import pytest

from loopwright.algorithms import time_model
from loopwright.algorithms.time_model import Side

TRAIN = Side(replica_devices=8, micro_batch=2, micro_batch_s=1 + 0.5 * 2)
GENERATE = Side(replica_devices=8, micro_batch=8, micro_batch_s=3 + 0.1 * 8)
SMALLER = Side(replica_devices=4, micro_batch=8, micro_batch_s=3 + 0.1 * 8)


def test_llamarl_synchronous_step() -> None:
    assert time_model.synchronous_s(2048, 256, TRAIN, GENERATE) == pytest.approx(94.4, abs=1e-9)


def test_llamarl_best_share() -> None:
    equal = time_model.best_split(2048, 256, TRAIN, GENERATE)
    assert equal.train_frac == pytest.approx(0.6779661, abs=1e-7)
    assert equal.step_s == pytest.approx(94.4), "with equal replicas a split alone gains nothing"
    smaller = time_model.best_split(2048, 256, TRAIN, SMALLER)
    assert smaller.train_frac == pytest.approx(0.80808081, abs=1e-8)
    assert smaller.step_s == pytest.approx(79.2, abs=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.7, 0.9])
def test_no_share_beats_the_best(share: float) -> None:
    best = time_model.best_split(2048, 256, TRAIN, SMALLER)
    assert time_model.asynchronous_s(2048, 256, TRAIN, SMALLER, share) >= best.step_s


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_leaves_both_sides_something(share: float) -> None:
    with pytest.raises(ValueError, match="train_frac"):
        time_model.asynchronous_s(2048, 256, TRAIN, GENERATE, share)


def test_whole_devices_can_lose_to_turns() -> None:
    assert time_model.by_turns_s(8, 40, 80) == pytest.approx(15.0)
    best = time_model.best_whole_split(8, 40, 80)
    assert best is not None
    assert (best.train_devices, best.generate_devices) == (3, 5)
    assert best.step_s == pytest.approx(16.0)
    faster = time_model.best_whole_split(8, 40, 64)
    assert faster is not None and faster.step_s == pytest.approx(13.3333333)


def test_a_tail_moves_devices_to_generation() -> None:
    best = time_model.best_whole_split(8, 40, 64, tail_s=10)
    assert best is not None
    assert (best.train_devices, best.step_s) == (2, pytest.approx(64 / 6 + 10))


def test_replicas_are_not_divided() -> None:
    splits = list(time_model.whole_splits(8, 40, 80, train_replica=2, generate_replica=4))
    assert [(s.train_devices, s.generate_devices) for s in splits] == [(2, 4), (4, 4)]
    assert time_model.best_whole_split(8, 40, 80, train_replica=8) is None


@pytest.mark.parametrize(
    ("episode_s", "step_s", "buffered", "lag"), [(30, 60, 0, 1), (90, 60, 1, 3), (600, 60, 0, 10)]
)
def test_lag_estimate(episode_s: float, step_s: float, buffered: int, lag: int) -> None:
    assert time_model.lag_estimate(episode_s, step_s, buffered) == lag


def test_overlap_bound_is_largest_for_equal_halves() -> None:
    assert time_model.overlap_bound(1, 1) == 2
    assert time_model.overlap_bound(0.61, 0.38) == pytest.approx(1.6230, abs=1e-4)
