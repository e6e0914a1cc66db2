"""The ledger: what is written comes back, torn tails are cut, damage is named, nothing is silently
wrong."""

import random
import resource
from pathlib import Path

import numpy as np
import pytest

from loopwright.algorithms.records import (
    Context,
    EndReason,
    Group,
    Outcome,
    RecordError,
    Rollout,
    TrainBatch,
    decode,
    encode,
)
from loopwright.algorithms.unused import Cancelled
from loopwright.orchestrator.ledger import Ledger, LedgerError, audit, read, read_frames


def rollout(ticket: int, attempt: int, outcome: Outcome = Outcome.SCORED) -> Rollout:
    """A small rollout of the ticket's task."""
    size = 3 + attempt
    context = Context(
        token_ids=np.arange(size, dtype=np.int32),
        action_mask=np.arange(size) > 0,
        behavior_logprobs=np.linspace(-1, 0, size, dtype=np.float32),
        policy_versions=np.full(size, ticket, np.int32),
        turn_ids=np.zeros(size, np.int16),
    )
    return Rollout(
        task_id=f"task {ticket}",
        environment="e",
        environment_version="1",
        scenario="s",
        attempt=attempt,
        contexts=(context,),
        reward=0.25 * attempt,
        success=False,
        reward_parts={"test": 1.0},
        end_reason=EndReason.DONE,
        outcome=outcome,
        turns=2,
        tool_errors={"tool_error/unknown_api": 1},
    )


def fill(folder: Path, tickets: int = 4, attempts: int = 2) -> Path:
    """A ledger of `tickets` finished groups, the first half trained as step 1."""
    ledger = Ledger(folder)
    for ticket in range(tickets):
        for attempt in range(attempts):
            ledger.rollout(ticket, encode(rollout(ticket, attempt)))
        ledger.group(ticket, b"task")
    half = tickets // 2
    trained = [(t, a) for t in range(half) for a in range(attempts)]
    ledger.step(1, list(range(half)), trained, 17)
    ledger.close()
    return ledger.path


def test_records_come_back_as_they_were() -> None:
    before = rollout(3, 2)
    after = decode(encode(before))
    assert after.contexts[0].token_ids.dtype == np.int32
    np.testing.assert_array_equal(
        after.contexts[0].behavior_logprobs, before.contexts[0].behavior_logprobs
    )
    assert (after.reward, after.outcome, after.reward_parts, after.tool_errors) == (
        before.reward,
        Outcome.SCORED,
        {"test": 1.0},
        {"tool_error/unknown_api": 1},
    )
    assert (
        decode(encode(Group(ticket=1, task_id="task 3", rollouts=(before,)))).rollouts[0].attempt
        == 2
    )


def test_records_refuse_what_does_not_fit() -> None:
    with pytest.raises(RecordError, match=r"Context.action_mask: bool\[2\], expected bool\[3\]"):
        Context(
            token_ids=np.zeros(3, np.int32),
            action_mask=np.zeros(2, np.bool_),
            behavior_logprobs=np.zeros(3, np.float32),
            policy_versions=np.zeros(3, np.int32),
            turn_ids=np.zeros(3, np.int16),
        )
    with pytest.raises(RecordError, match="infra fault"):
        Group(ticket=0, task_id="task 0", rollouts=(rollout(0, 0, Outcome.INFRA_FAULT),))
    with pytest.raises(RecordError, match="expected"):
        TrainBatch(
            step=1,
            token_ids=np.zeros(3, np.int32),
            action_mask=np.zeros(3, np.bool_),
            behavior_logprobs=np.zeros(3, np.float32),
            policy_versions=np.zeros(3, np.int32),
            turn_ids=np.zeros(3, np.int16),
            lengths=np.array([2], np.int32),
            rollout_ids=np.zeros(1, np.int32),
            rewards=np.zeros(1, np.float32),
            advantages=np.zeros(1, np.float32),
            rollout_count=1,
        )
    with pytest.raises(RecordError, match="schema 99"):
        decode(encode(rollout(0, 0)).replace(b"\xa1v\x01", b"\xa1v\x63"))
    with pytest.raises(RecordError, match="not msgpack"):
        decode(b"\xc1\xc1")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = read(fill(tmp_path))
    assert sorted(state.rollouts) == [0, 1, 2, 3]
    assert state.trained == {1: [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert state.checksums == {1: 17}
    assert decode(state.rollouts[2][1]).reward == 0.25


def test_the_audit_finds_lost_and_repeated_rollouts(tmp_path: Path) -> None:
    path = fill(tmp_path)
    clean = audit(path)
    assert (clean.finished, clean.trained, clean.unused, clean.twice, clean.unknown) == (
        8,
        4,
        (),
        (),
        (),
    )
    ledger = Ledger(tmp_path)
    ledger.step(2, [2, 3], [(2, 0), (2, 1), (3, 0), (0, 0), (9, 9)], 18)
    ledger.close()
    found = audit(path)
    assert (found.unused, found.twice, found.unknown) == (((3, 1),), ((0, 0),), ((9, 9),))


def test_a_step_trained_again_after_a_crash_counts_once(tmp_path: Path) -> None:
    path = fill(tmp_path)
    ledger = Ledger(tmp_path)
    ledger.step(1, [0, 1], [(0, 0), (0, 1), (1, 0), (1, 1)], 17)
    ledger.close()
    assert audit(path).twice == ()


def test_what_was_left_out_is_on_record_and_no_loss(tmp_path: Path) -> None:
    """Taken back while it was played; replaced, because all rewards of its group were equal."""
    path = fill(tmp_path)
    gone = Cancelled(ticket=2, attempt=7, turns=3, tokens=99, seconds=1.5)
    ledger = Ledger(tmp_path)
    ledger.cancelled(gone)
    ledger.discarded(2, [0, 1], "all rewards are equal")
    ledger.rollout(2, encode(rollout(2, 1000)))
    ledger.step(2, [2, 3], [(2, 1000), (3, 0), (3, 1)], 18)
    ledger.close()
    state = read(path)
    assert state.cancelled == {2: {7: gone}} and state.discarded == {2: {0, 1}}
    assert (state.consumed(1), state.planned(1)) == ([0, 1], {2: (2, 3)})
    found = audit(path)
    assert (found.unused, found.twice, found.unknown) == ((), (), ())
    assert (found.finished, found.cancelled, found.discarded) == (7, 1, 2)


def test_a_checkpoint_frees_what_its_steps_took(tmp_path: Path) -> None:
    fill(tmp_path)
    ledger = Ledger(tmp_path)
    ledger.forget_before(0)
    assert sorted(ledger.state.rollouts) == [0, 1, 2, 3]
    ledger.forget_before(1)
    assert sorted(ledger.state.rollouts) == [2, 3] and sorted(ledger.state.groups) == [2, 3]
    ledger.close()
    assert sorted(read(ledger.path).rollouts) == [0, 1, 2, 3], "the file keeps them"


def test_a_torn_tail_is_cut_and_writing_goes_on(tmp_path: Path) -> None:
    path = fill(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    ledger = Ledger(tmp_path)
    assert ledger.state.cut_bytes > 0
    assert ledger.state.trained == {}
    ledger.checkpoint(1)
    ledger.close()
    assert read(path).checkpoints == [1]
    assert read(path).cut_bytes == 0


def test_no_truncation_and_no_flipped_bit_gives_a_wrong_record(tmp_path: Path) -> None:
    whole = fill(tmp_path).read_bytes()
    path = tmp_path / "damaged"
    path.write_bytes(whole)
    truth = [record for _, record in read_frames(path)]
    chance = random.Random(0)
    refused = 0
    for _ in range(1000):
        data = bytearray(whole)
        if chance.random() < 0.5:
            del data[chance.randrange(len(data)) :]
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(data))
        found = []
        try:
            found.extend(record for _, record in read_frames(path))
        except LedgerError as error:
            assert "damaged" in str(error)
            refused += 1
        assert found == truth[: len(found)]
    assert refused > 150


def test_damage_before_the_end_names_its_place(tmp_path: Path) -> None:
    path = fill(tmp_path)
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(LedgerError, match="frame at byte 0"):
        Ledger(tmp_path)


def test_a_full_disk_says_what_is_safe(tmp_path: Path) -> None:
    """A frame that does not fit leaves nothing behind: with room, the ledger goes on after it."""
    fill(tmp_path)
    ledger = Ledger(tmp_path)
    before = ledger.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(LedgerError, match=r"File too large.*--resume"):
            ledger.group(9, b"task" * 100, "void")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ledger.path.read_bytes() == before
    ledger.group(9, b"task" * 100, "no room")
    ledger.close()
    state = read(ledger.path)
    assert state.voids[9] == "no room" and state.cut_bytes == 0
