"""The ledger: what was drawn, played, trained and published, so that nothing paid for is lost.

Append-only msgpack frames, each `length u32 | crc32 of payload | crc32 of both | payload`, in
`ledger/*.frames`. One writer, the controller. A rollout is written when it arrives; the file is
fsynced before its group counts as finished. Opening cuts a torn tail (the process died while
writing) and says so; damage before the end is refused with its offset.

A step names the tickets it took and the rollouts it trained, and a group that is finished stays as
it is: the record is all that is needed to train any step again, bit for bit where the arithmetic is
deterministic. Episodes that were taken back and groups that were replaced are on it too, as such.
"""

import contextlib
import mmap
import os
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from loopwright.algorithms.records import Outcome, Rollout, decode
from loopwright.algorithms.unused import Cancelled
from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.tasks import Played

_HEADER = struct.Struct("<III")
_HEADER_BODY = struct.Struct("<II")
HEADER_BYTES = _HEADER.size
FILE = "ledger.frames"  # in the folder `ledger/` of a run


class LedgerError(RunError):
    """The ledger cannot be read or written."""


@dataclass(slots=True)
class LedgerState:
    """What a ledger says, read from the start."""

    rollouts: dict[int, dict[int, bytes]] = field(default_factory=lambda: defaultdict(dict))
    # step -> (ticket, attempt) in it
    trained: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    checksums: dict[int, int] = field(default_factory=dict)  # version -> checksum of all weights
    tickets: dict[int, tuple[int, ...]] = field(default_factory=dict)  # step -> all that it took
    groups: set[int] = field(default_factory=set)  # tickets whose group is finished
    voids: dict[int, str] = field(default_factory=dict)  # ticket -> why no group came of it
    # ticket -> how its group went, after those that it replaced
    played: dict[int, tuple[Played, ...]] = field(default_factory=dict)
    # ticket -> attempts taken back while they were played, never scored
    cancelled: dict[int, dict[int, Cancelled]] = field(default_factory=lambda: defaultdict(dict))
    # ticket -> attempts of groups that were replaced: finished, and not for any step
    discarded: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    checkpoints: list[int] = field(default_factory=list)
    cut_bytes: int = 0  # torn tail that was removed

    def consumed(self, step: int) -> list[int]:
        """The tickets that steps 1 … `step` took."""
        return [ticket for s in range(1, step + 1) for ticket in self.tickets.get(s, ())]

    def planned(self, step: int) -> dict[int, tuple[int, ...]]:
        """The tickets of each step after `step` that is on record."""
        return {s: tickets for s, tickets in self.tickets.items() if s > step}


def read_frames(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset, record) of each whole frame. Stops at a torn tail; raises `LedgerError` at damage
    before it."""
    data = path.read_bytes()
    offset = 0
    while offset + HEADER_BYTES <= len(data):
        payload = frame_at(data, offset)
        if payload is None:
            if _is_torn(data, offset):
                return
            raise LedgerError(
                f"{path}: the frame at byte {offset} is damaged; restore the file, or cut it there "
                "to lose what follows (`loopwright ledger` tells what that is)"
            )
        yield offset, msgpack.unpackb(payload, strict_map_key=False)
        offset += HEADER_BYTES + len(payload)


def frame_at(data: bytes | mmap.mmap, offset: int) -> bytes | None:
    """The payload of the frame at `offset`; None unless header and payload carry their
    checksums."""
    if offset + HEADER_BYTES > len(data):
        return None
    length, checksum, header_checksum = _HEADER.unpack_from(data, offset)
    if zlib.crc32(data[offset : offset + _HEADER_BODY.size]) != header_checksum:
        return None
    payload = data[offset + HEADER_BYTES : offset + HEADER_BYTES + length]
    return payload if len(payload) == length and zlib.crc32(payload) == checksum else None


def _is_torn(data: bytes, offset: int) -> bool:
    """Whether what begins at `offset` is what a dying process had not written yet, and nothing
    lies behind it. A file system may leave zeros where a write was cut off."""
    length, _, header_checksum = _HEADER.unpack_from(data, offset)
    if zlib.crc32(data[offset : offset + _HEADER_BODY.size]) != header_checksum:
        return not any(data[offset:])
    return offset + HEADER_BYTES + length >= len(data)


class Ledger:
    """The open ledger of a run."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / FILE
        self.state = read(self.path) if self.path.exists() else LedgerState()
        if self.state.cut_bytes:
            os.truncate(self.path, self.path.stat().st_size - self.state.cut_bytes)
        # no buffer: what the disk did not take must not follow later, behind other frames
        self._file = self.path.open("ab", buffering=0)

    def rollout(self, ticket: int, data: bytes) -> None:
        """A finished rollout, as encoded by the worker."""
        rollout: Rollout = decode(data)
        self._write({"kind": "rollout", "ticket": ticket, "attempt": rollout.attempt, "data": data})
        self.state.rollouts[ticket][rollout.attempt] = data

    def group(
        self, ticket: int, task: bytes, void: str = "", played: Sequence[Played] = ()
    ) -> None:
        """The group of a ticket is finished (or void, and why); on disk when this returns."""
        record = {"kind": "group", "ticket": ticket, "task": task, "void": void}
        self._write({**record, "played": [asdict(p) for p in played]})
        self.state.played[ticket] = tuple(played)
        self.state.groups.add(ticket)
        if void:
            self.state.voids[ticket] = void
        self._sync()

    def cancelled(self, cancelled: Cancelled) -> None:
        """An episode was taken back."""
        self._write({"kind": "cancelled", **asdict(cancelled)})
        self.state.cancelled[cancelled.ticket][cancelled.attempt] = cancelled

    def discarded(self, ticket: int, attempts: Sequence[int], why: str) -> None:
        """These finished rollouts of a ticket are for no step: another task takes their place."""
        self._write({"kind": "discarded", "ticket": ticket, "attempts": list(attempts), "why": why})
        self.state.discarded[ticket].update(attempts)

    def step(
        self, step: int, tickets: Sequence[int], trained: list[tuple[int, int]], checksum: int
    ) -> None:
        """Step `step` took these tickets, trained these (ticket, attempt) and published weights
        with this checksum."""
        self._write(
            {
                "kind": "step",
                "step": step,
                "tickets": list(tickets),
                "trained": trained,
                "checksum": checksum,
            }
        )
        self.state.tickets[step] = tuple(tickets)
        self.state.trained[step] = trained
        self.state.checksums[step] = checksum
        self._sync()

    def checkpoint(self, step: int) -> None:
        """A checkpoint of `step` is whole and in place."""
        self._write({"kind": "checkpoint", "step": step})
        self.state.checkpoints.append(step)
        self._sync()

    def forget_before(self, step: int) -> None:
        """Free the memory of rollouts that no recovery from `step` can need; the file keeps
        them."""
        for s in range(step, 0, -1):
            if s not in self.state.tickets or not self._forget(self.state.tickets[s]):
                return

    def _forget(self, tickets: Sequence[int]) -> bool:
        """Whether there was anything of these tickets left to forget."""
        known = [t for t in tickets if t in self.state.groups]
        for ticket in known:
            self.state.rollouts.pop(ticket, None)
            self.state.cancelled.pop(ticket, None)
            self.state.discarded.pop(ticket, None)
            self.state.groups.discard(ticket)
        return bool(known)

    def close(self) -> None:
        """Flush and close."""
        if not self._file.closed:
            try:
                self._sync()
            finally:
                self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        """A whole frame, or nothing of it."""
        rest = memoryview(frame(msgpack.packb(record)))
        whole = os.fstat(self._file.fileno()).st_size
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # if not even that works, opening cuts the tail
                os.ftruncate(self._file.fileno(), whole)
            raise LedgerError(_no_room(self.path, error)) from error

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise LedgerError(_no_room(self.path, error)) from error


def frame(payload: bytes) -> bytes:
    """The payload between its header and its end, as `read_frames` wants it."""
    body = _HEADER_BODY.pack(len(payload), zlib.crc32(payload))
    return _HEADER.pack(len(payload), zlib.crc32(payload), zlib.crc32(body)) + payload


def _no_room(path: Path, error: OSError) -> str:
    return (
        f"cannot write {path}: {error.strerror}. Everything up to the last finished group is on "
        "record: free space, then run the same command with --resume"
    )


def read(path: Path) -> LedgerState:
    """What the ledger at `path` says; `cut_bytes` is the length of a torn tail."""
    state = LedgerState()
    end = 0
    for offset, record in read_frames(path):
        _apply(state, record, path, offset)
        end = offset + _HEADER.size + len(msgpack.packb(record))
    state.cut_bytes = path.stat().st_size - end
    return state


def _apply(state: LedgerState, record: dict[str, Any], path: Path, offset: int) -> None:
    kind = record.get("kind")
    if kind == "rollout":
        state.rollouts[record["ticket"]][record["attempt"]] = record["data"]
    elif kind == "group":
        state.groups.add(record["ticket"])
        if "played" in record:  # ledgers from before samplers learned lack it
            state.played[record["ticket"]] = tuple(
                Played(task_id=p["task_id"], passed=tuple(p["passed"])) for p in record["played"]
            )
        if record["void"]:
            state.voids[record["ticket"]] = record["void"]
    elif kind == "cancelled":
        cancelled = Cancelled(**{k: v for k, v in record.items() if k != "kind"})
        state.cancelled[cancelled.ticket][cancelled.attempt] = cancelled
    elif kind == "discarded":
        state.discarded[record["ticket"]].update(record["attempts"])
    elif kind == "step":
        trained = {ticket for ticket, _ in record["trained"]}  # all that older ledgers tell
        state.tickets[record["step"]] = tuple(record.get("tickets", sorted(trained)))
        state.trained[record["step"]] = [tuple(pair) for pair in record["trained"]]
        state.checksums[record["step"]] = record["checksum"]
    elif kind == "checkpoint":
        state.checkpoints.append(record["step"])
    else:
        raise LedgerError(f"{path}: record of unknown kind {kind!r} at byte {offset}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Whether every finished rollout was used exactly once."""

    finished: int
    trained: int
    unused: tuple[tuple[int, int], ...]  # finished for a trained step, but not in it
    twice: tuple[tuple[int, int], ...]
    unknown: tuple[tuple[int, int], ...]  # trained, but not on record
    cancelled: int = 0  # taken back while they were played
    discarded: int = 0  # finished, and replaced


def audit(path: Path) -> Audit:
    """Compare what was finished with what the surviving history of steps trained on."""
    state = read(path)
    taken = {ticket for tickets in state.tickets.values() for ticket in tickets}
    discarded = {(t, attempt) for t, attempts in state.discarded.items() for attempt in attempts}
    finished = {
        (ticket, attempt)
        for ticket, attempts in state.rollouts.items()
        for attempt, data in attempts.items()
        if decode(data).outcome is not Outcome.INFRA_FAULT and ticket not in state.voids
    } - discarded
    trained = [pair for step in sorted(state.trained) for pair in state.trained[step]]
    due = {pair for pair in finished if pair[0] in taken}
    return Audit(
        finished=len(finished),
        trained=len(trained),
        unused=tuple(sorted(due - set(trained))),
        twice=tuple(sorted({pair for pair in trained if trained.count(pair) > 1})),
        unknown=tuple(sorted(set(trained) - finished)),
        cancelled=sum(len(attempts) for attempts in state.cancelled.values()),
        discarded=len(discarded),
    )
