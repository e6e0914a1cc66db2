"""Shares of ranks, devices by name, sizes as text."""

import pytest

from loopwright.algorithms.memory_model import (
    DEVICES,
    MemoryModelError,
    MemoryTable,
    device,
    devices,
    per_rank,
    sharding,
    size_text,
)

WHOLE = MemoryTable(weights=8000, gradients=8000, optimizer=16000, activations=500, logits=50)


def test_one_rank_holds_everything() -> None:
    for backend in ("torch", "fsdp2", "deepspeed"):
        how = sharding(backend, 1, block_bytes=100, outside_bytes=300)
        assert per_rank(WHOLE, how) == WHOLE
    assert WHOLE.total == 32550


@pytest.mark.parametrize(
    ("backend", "stage", "expected"),
    [
        ("fsdp2", 3, (2000 + 500, 2000 + 400, 4000)),
        ("deepspeed", 3, (2000 + 500, 2000 + 400, 4000)),
        ("deepspeed", 2, (8000, 2000 + 400, 4000)),
        ("deepspeed", 1, (8000, 8000, 4000)),
    ],
)
def test_what_four_ranks_cut(backend: str, stage: int, expected: tuple[int, int, int]) -> None:
    """FSDP2 and stage 3 gather the outside (300) and two blocks (100 each), and reduce the
    gradients of the outside and one block."""
    found = per_rank(WHOLE, sharding(backend, 4, block_bytes=100, outside_bytes=300, stage=stage))
    assert (found.weights, found.gradients, found.optimizer) == expected
    assert (found.activations, found.logits) == (500, 50)


def test_gathering_never_takes_more_than_the_whole() -> None:
    how = sharding("fsdp2", 2, block_bytes=7000, outside_bytes=7000)
    assert per_rank(WHOLE, how).weights == 8000


def test_several_ranks_need_a_backend_for_them() -> None:
    with pytest.raises(MemoryModelError, match=r"'torch' trains on one rank, not on 2.*fsdp2"):
        sharding("torch", 2, block_bytes=1, outside_bytes=1)
    with pytest.raises(MemoryModelError, match="0 ranks"):
        sharding("fsdp2", 0, block_bytes=1, outside_bytes=1)


@pytest.mark.parametrize("text", ["8xH100", "8×H100", "8*h100", " 8 x H100-80GB ", "8xh-100"])
def test_devices_are_read_in_any_spelling(text: str) -> None:
    count, name, usable = devices(text)
    assert (count, name) == (8, "H100")
    assert 0.9 * 80 * 2**30 < usable < 80 * 2**30


def test_one_device_and_one_of_any_size() -> None:
    assert devices("L4")[:2] == (1, "L4")
    assert device("custom-48GB")[1] == device("L40S")[1]
    assert all(device(name)[0] == name for name in DEVICES)


def test_an_unknown_device_is_told_the_nearest() -> None:
    with pytest.raises(MemoryModelError, match=r"'H1000' is not known; did you mean H100\?"):
        device("H1000")
    with pytest.raises(MemoryModelError, match=r"Known: T4, .*custom-48GB"):
        device("toaster")
    with pytest.raises(MemoryModelError, match="expected N×NAME"):
        devices("0xH100")


def test_sizes_are_decimal() -> None:
    texts = {0: "0 B", 1500: "1.50 kB", 26_950_000_000: "26.95 GB", 412_000_000_000: "412.0 GB"}
    assert {size: size_text(size) for size in texts} == texts
