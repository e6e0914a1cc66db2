"""What was done to a decode batch, in order: enough to do it again, bit for bit.

The bits of a token depend on who else was in the batch: a matrix product over 7 rows may round
otherwise than one over 8. They depend on nothing but that, so the order of additions,
cancellations, installations and steps, with the requests themselves, gives the same tokens and
logprobs again.
"""

import secrets
from collections import deque
from dataclasses import dataclass
from typing import Literal

import msgpack

Kind = Literal["add", "cancel", "install", "adapter", "release", "step"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing done: `of` is a request, a version, or how many steps."""

    kind: Kind
    of: str | int
    recompute: bool = False  # of an installation


@dataclass(frozen=True, slots=True)
class Segment:
    """What one engine did under one set of weights."""

    life: str  # of the process: another one begins with nothing in its memory
    entries: tuple[Entry, ...]

    @property
    def version(self) -> int:
        """Of the weights whose installation it begins with; −1 if it begins otherwise."""
        first = self.entries[0]
        return int(first.of) if first.kind == "install" else -1


class Journal:
    """Written by the thread that owns the batch; a segment ends where new weights are installed,
    and whole segments may be taken by any thread."""

    def __init__(self) -> None:
        self._life = secrets.token_hex(4)  # a restarted engine is another one
        self._open: list[Entry] = []
        self._steps = 0
        self._whole: deque[bytes] = deque()

    def note(self, kind: Kind, of: str | int, *, recompute: bool = False) -> None:
        """An addition, a cancellation, a release of all KV, or an installation (of weights, or of
        an adapter beside them), which begins a segment."""
        self._close_run()
        if kind in ("install", "adapter") and self._open:
            self._whole.append(encode(Segment(self._life, tuple(self._open))))
            self._open = []
        self._open.append(Entry(kind, of, recompute))

    def step(self) -> None:
        """One step of all running sequences."""
        self._steps += 1

    def take(self) -> tuple[bytes, ...]:
        """The segments that are whole, once."""
        found = []
        while self._whole:
            found.append(self._whole.popleft())
        return tuple(found)

    def _close_run(self) -> None:
        if self._steps:
            self._open.append(Entry("step", self._steps))
            self._steps = 0


def encode(segment: Segment) -> bytes:
    """A segment as msgpack."""
    entries = [[e.kind, e.of, e.recompute] for e in segment.entries]
    return msgpack.packb({"life": segment.life, "entries": entries})


def decode(data: bytes) -> Segment:
    """What `encode` was given."""
    found = msgpack.unpackb(data)
    return Segment(found["life"], tuple(Entry(*fields) for fields in found["entries"]))
