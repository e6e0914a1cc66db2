"""The record of sampling never ends a run, and goes on after whole frames only."""

import resource
from pathlib import Path

from loopwright.orchestrator.sampling_record import FILE, SamplingRecord, read


def test_a_torn_tail_is_cut_before_more_is_written(tmp_path: Path) -> None:
    first = SamplingRecord(tmp_path)
    first.engine("rollout 0", (b"one", b"two"))
    first.close()
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-3])
    second = SamplingRecord(tmp_path)
    second.engine("rollout 0", (b"three",))
    second.close()
    assert read(path).segments == {"rollout 0": [b"one", b"three"]}


def test_a_full_disk_ends_the_record_and_not_the_run(tmp_path: Path) -> None:
    record = SamplingRecord(tmp_path)
    record.engine("rollout 0", (b"one",))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        for _ in range(20):
            record.engine("rollout 0", (b"x" * 5000,))
        record.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = SamplingRecord(tmp_path)
    again.engine("rollout 0", (b"later",))
    again.close()
    assert read(tmp_path / FILE).segments["rollout 0"][-1] == b"later"
