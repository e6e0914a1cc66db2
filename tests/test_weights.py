"""The shared memory weight channel: what is written is what is read, and damage is named."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwright.actors.shared_memory import (
    ADAPTER_PREFIX,
    SEGMENT_FOLDER,
    SharedWeights,
    attach,
    remove_stale_adapters,
    unlink_stale,
)
from loopwright.actors.weights import (
    WeightError,
    WeightManifest,
    checksum,
    decode,
    encode,
    manifest_checksums,
    verify,
)

ROOT = Path(__file__).resolve().parents[1]


def example(seed: int = 0) -> dict[str, torch.Tensor]:
    """A few tensors of several dtypes; `head` is tied to `embed`."""
    generator = torch.Generator().manual_seed(seed)
    embed = torch.randn(17, 8, generator=generator)
    return {
        "embed": embed,
        "half": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
        "scalar": torch.randn((), generator=generator),
        "counts": torch.arange(seed, seed + 7),
        "head": embed,
    }


@pytest.fixture
def writer() -> Iterator[SharedWeights]:
    shared = SharedWeights.create("test-weights", example())
    yield shared
    shared.close()


def test_readers_see_exactly_what_was_written(writer: SharedWeights) -> None:
    manifest = writer.write(3, example(1))
    views = attach(manifest)
    assert manifest.version == 3
    for name, tensor in example(1).items():
        assert views[name].dtype == tensor.dtype
        assert torch.equal(views[name], tensor)
        assert checksum(tensor) == manifest_checksums(manifest)[name]
    assert verify(views, manifest_checksums(manifest)) == manifest_checksums(manifest)


def test_the_next_write_leaves_the_published_slot_alone(writer: SharedWeights) -> None:
    first = attach(writer.write(1, example(1)))
    for version in (2, 3, 4):  # published, refused, written again: always the slot nobody maps
        writer.write(version, example(version))
        assert torch.equal(first["embed"], example(1)["embed"])


def test_a_mapped_slot_is_never_overwritten(writer: SharedWeights) -> None:
    first = attach(writer.write(1, example(1)))
    second = attach(writer.write(2, example(2)))
    with pytest.raises(WeightError, match="both slots"):
        writer.write(3, example(3))
    assert torch.equal(first["embed"], example(1)["embed"])
    assert torch.equal(second["embed"], example(2)["embed"])
    kept = first["half"]
    del first
    with pytest.raises(WeightError, match="both slots"):
        writer.write(3, example(3))
    del kept  # the last view of the slot
    third = attach(writer.write(3, example(3)))
    assert torch.equal(third["embed"], example(3)["embed"])
    assert torch.equal(second["embed"], example(2)["embed"])


class _AttachingMeanwhile(dict[str, torch.Tensor]):
    """Tensors that, while they are read, try to attach an earlier manifest."""

    def __init__(self, tensors: dict[str, torch.Tensor], earlier: WeightManifest) -> None:
        super().__init__(tensors)
        self.earlier = earlier
        self.answers: list[str] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            attach(self.earlier)
            self.answers.append("attached")
        except WeightError as error:
            self.answers.append(str(error))
        return super().__getitem__(name)


def test_a_slot_being_rewritten_cannot_be_attached(writer: SharedWeights) -> None:
    earlier = writer.write(1, example(1))
    writer.write(2, example(2))
    tensors = _AttachingMeanwhile(example(3), earlier)
    writer.write(3, tensors)
    assert "being overwritten by a later version" in tensors.answers[-1]


def test_tied_tensors_are_stored_once(writer: SharedWeights) -> None:
    manifest = writer.write(1, example(1))
    offsets = dict(zip(manifest.names, manifest.offsets, strict=True))
    assert offsets["head"] == offsets["embed"]
    assert len(set(manifest.offsets)) == len(manifest.names) - 1


def test_stored_dtype_can_be_smaller() -> None:
    shared = SharedWeights.create("test-weights", example(), dtype=torch.bfloat16)
    try:
        views = attach(shared.write(1, example(1)))
        assert torch.equal(views["embed"], example(1)["embed"].to(torch.bfloat16))
        assert views["counts"].dtype == torch.int64
    finally:
        shared.close()


def test_one_wrong_byte_is_refused_by_name(writer: SharedWeights) -> None:
    manifest = writer.write(1, example(1))
    offset = manifest.offsets[manifest.names.index("half")]
    with (SEGMENT_FOLDER / manifest.segment).open("r+b") as file:
        file.seek(offset + 4)
        byte = file.read(1)[0]
        file.seek(offset + 4)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(WeightError, match=r"1 of 5 tensors .*half has"):
        verify(attach(manifest), manifest_checksums(manifest))


def test_missing_tensors_are_refused_by_name(writer: SharedWeights) -> None:
    manifest = writer.write(1, example(1))
    views = attach(manifest)
    del views["scalar"]
    with pytest.raises(WeightError, match="scalar has nothing"):
        verify(views, manifest_checksums(manifest))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("half"), "missing half"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda t: t.update(scalar=torch.zeros(2)), r"other shape scalar \[2\]"),
    ],
)
def test_another_models_tensors_are_refused(
    writer: SharedWeights, change: Callable[[dict[str, torch.Tensor]], Any], named: str
) -> None:
    tensors = example(1)
    change(tensors)
    with pytest.raises(WeightError, match=named):
        writer.write(1, tensors)


def test_manifest_travels_as_bytes(writer: SharedWeights) -> None:
    manifest = writer.write(1, example(1))
    assert decode(encode(manifest)) == manifest
    with pytest.raises(WeightError, match="no weight manifest"):
        decode(b"\xc1")
    with pytest.raises(WeightError, match="schema int"):
        decode(b"\x01")


def test_a_manifest_outside_its_segment_is_refused(writer: SharedWeights) -> None:
    manifest = writer.write(1, example(1))
    beyond = replace(manifest, offsets=tuple(10 * manifest.size_bytes for _ in manifest.offsets))
    with pytest.raises(WeightError, match="outside a segment"):
        attach(beyond)
    with pytest.raises(WeightError, match="5 names"):
        replace(manifest, checksums=manifest.checksums[:-1])


def test_views_outlive_the_writer_but_new_readers_are_told() -> None:
    shared = SharedWeights.create("test-weights", example())
    manifest = shared.write(1, example(1))
    views = attach(manifest)
    shared.close()
    shared.close()
    assert torch.equal(views["embed"], example(1)["embed"])
    with pytest.raises(WeightError, match="publish again"):
        attach(manifest)
    with pytest.raises(WeightError, match="closed"):
        shared.write(2, example(2))


def test_writing_to_a_view_does_not_reach_other_readers(writer: SharedWeights) -> None:
    manifest = writer.write(1, example(1))
    attach(manifest)["embed"].zero_()
    assert torch.equal(attach(manifest)["embed"], example(1)["embed"])


def test_too_little_shared_memory_is_told_before_writing() -> None:
    room = os.statvfs(SEGMENT_FOLDER)
    elements = room.f_bavail * room.f_frsize // 4
    before = set(os.listdir(SEGMENT_FOLDER))
    with pytest.raises(WeightError, match="Enlarge it"):
        SharedWeights.create("test-weights", {"huge": torch.empty(elements, device="meta")})
    assert set(os.listdir(SEGMENT_FOLDER)) <= before


def _killed_writer(name: str) -> WeightManifest:
    """The manifest of a writer process that was killed after publishing."""
    code = (
        "import os, sys, torch\n"
        "from loopwright.actors.shared_memory import SharedWeights\n"
        "from loopwright.actors.weights import encode\n"
        f"shared = SharedWeights.create({name!r}, {{'w': torch.ones(4)}})\n"
        "sys.stdout.buffer.write(encode(shared.write(1, {'w': torch.ones(4)})))\n"
        "sys.stdout.flush()\n"
        "os.close(1)\n"
        "sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    data = process.stdout.read()
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.communicate()
    return decode(data)


def test_a_killed_writers_segment_serves_readers_until_unlinked() -> None:
    name = f"test-killed-{os.getpid()}"
    manifest = _killed_writer(name)
    views = attach(manifest)
    living = SharedWeights.create(name, {"w": torch.zeros(4)})
    try:
        assert unlink_stale(name, keep=manifest.segment) == []
        assert unlink_stale(name) == [manifest.segment]
        assert torch.equal(views["w"], torch.ones(4))
        assert torch.equal(attach(living.write(2, {"w": torch.zeros(4)}))["w"], torch.zeros(4))
    finally:
        living.close()


def test_adapter_folders_of_ended_processes_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for owner in (ended.pid, os.getpid()):
        folder = tmp_path / f"{ADAPTER_PREFIX}{owner}.abcdefgh"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    (tmp_path / f"{ADAPTER_PREFIX}run-1-0123abcd").touch()  # a run of this name
    assert remove_stale_adapters(tmp_path) == [f"{ADAPTER_PREFIX}{ended.pid}.abcdefgh"]
    assert len(list(tmp_path.iterdir())) == 2
