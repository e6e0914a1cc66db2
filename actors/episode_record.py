"""What the policy has said in episodes so far, on disk: it outlives the process that plays them.

A world that answers the same to the same actions (`EnvSpec.deterministic`) can be brought back to
where it was when its worker died: a fresh one is given the recorded turns again, and what it says
is compared. So nothing that an engine has sampled is sampled twice.

    piece      of a turn: one frame, appended as soon as it is there
    frame      length (4 bytes), xxh3 (8 bytes), msgpack; a torn end is left out
    segment    a file of frames of one process; gone when it is full and all its episodes are over
    life       how many workers were lost while they played an episode; each life's record is whole:
               it begins with the pieces that it was given

Nothing waits for the disk: what is written here has to survive a process, not its machine.
"""

import contextlib
import os
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import xxhash

from loopwright.actors.engine import Completion, FinishReason

SEGMENT_BYTES = 8 << 20
_HEAD = struct.Struct("<IQ")
_Index = dict[str, dict[int, list[dict[str, Any]]]]  # key -> life -> pieces


class WorldDiffers(Exception):
    """A world that calls itself deterministic says other things after the same actions."""


@dataclass(slots=True)
class _Segment:
    path: Path
    file: int
    size: int = 0
    episodes: set[str] = field(default_factory=set)  # under way, with pieces here


class EpisodeRecords:
    """The records of all episodes that one process plays. A disk that takes no more ends them, not
    the episodes."""

    def __init__(self, folder: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._name = uuid.uuid4().hex[:12]
        self._segments: list[_Segment] = []
        self._made = 0
        self._failed = False
        self._read: dict[Path, tuple[int, _Index]] = {}  # (size, what it held) of others' segments

    def open(self, key: str, life: int) -> "EpisodeRecord":
        """The record of an episode, with what its last life that left anything has left."""
        pieces = self._former(key, life) if life else []
        record = EpisodeRecord(self, key, life, pieces)
        for piece in pieces:
            self._append(key, piece | {"life": life})
        return record

    def _former(self, key: str, life: int) -> list[dict[str, Any]]:
        lives: dict[int, list[dict[str, Any]]] = {}
        for path in sorted(self._folder.glob("*.pieces")):
            with contextlib.suppress(OSError):
                size = path.stat().st_size
                if self._read.get(path, (-1, {}))[0] != size:
                    self._read[path] = size, _index(path)
                for found, pieces in self._read[path][1].get(key, {}).items():
                    lives.setdefault(found, []).extend(pieces)
        before = [found for found in lives if found < life]
        return lives[max(before)] if before else []

    def _append(self, key: str, piece: dict[str, Any]) -> None:
        if self._failed:
            return
        data: bytes = msgpack.packb(piece)
        try:
            segment = self._segment()
            os.write(segment.file, _HEAD.pack(len(data), xxhash.xxh3_64_intdigest(data)) + data)
        except OSError:
            self._failed = True
            return
        segment.size += _HEAD.size + len(data)
        segment.episodes.add(key)

    def _segment(self) -> _Segment:
        if not self._segments or self._segments[-1].size >= self._segment_bytes:
            self._made += 1
            # names sort as they were made, so that pieces of an episode keep their order
            path = self._folder / f"{self._name}-{self._made:06d}.pieces"
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._segments.append(_Segment(path, file))
            self._drop()
        return self._segments[-1]

    def _over(self, key: str) -> None:
        for segment in self._segments:
            segment.episodes.discard(key)
        self._drop()

    def _drop(self) -> None:
        """Remove full segments that nobody needs any more."""
        for segment in self._segments[:-1]:
            if not segment.episodes:
                self._segments.remove(segment)
                os.close(segment.file)
                with contextlib.suppress(OSError):
                    segment.path.unlink()


class EpisodeRecord:
    """The record of one episode."""

    def __init__(
        self, records: EpisodeRecords, key: str, life: int, former: list[dict[str, Any]]
    ) -> None:
        self._records, self._key, self._life = records, key, life
        self._former: dict[int, list[dict[str, Any]]] = {}  # turn -> pieces not yet given out
        for piece in former:
            self._former.setdefault(int(piece["turn"]), []).append(piece)

    def pieces(self, turn: int, prompt: np.ndarray) -> list[Completion]:
        """What was said of `turn` in a former life, after this `prompt` [T] int32; mostly nothing.

        Raises `WorldDiffers` if the turn was said after another prompt.
        """
        found = self._former.pop(turn, [])
        if any(piece["prompt"] != _digest(prompt) for piece in found):
            raise WorldDiffers(
                f"before turn {turn} it does not say what it said before its worker was lost, after"
                " the same actions: it is not deterministic as its EnvSpec says; begun again"
            )
        return [
            Completion(
                request_id=str(piece["request"]),
                token_ids=np.frombuffer(piece["tokens"], np.int32),
                logprobs=np.frombuffer(piece["logprobs"], np.float32),
                versions=np.frombuffer(piece["versions"], np.int32),
                finish_reason=FinishReason(piece["finish"]),
            )
            for piece in found
        ]

    def add(self, turn: int, prompt: np.ndarray, piece: Completion) -> None:
        """Append a piece of `turn`, which was asked for after `prompt` [T] int32 and the pieces
        before it."""
        self._records._append(
            self._key,
            {
                "key": self._key,
                "life": self._life,
                "turn": turn,
                "prompt": _digest(prompt),
                "request": piece.request_id,
                "tokens": _bytes(piece.token_ids, np.int32),
                "logprobs": _bytes(piece.logprobs, np.float32),
                "versions": _bytes(piece.versions, np.int32),
                "finish": piece.finish_reason.value,
            },
        )

    def close(self) -> None:
        """The episode is over: nobody will go on with it."""
        self._records._over(self._key)


def _digest(prompt: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(_bytes(prompt, np.int32))


def _bytes(values: np.ndarray, dtype: type[np.generic]) -> bytes:
    return values.astype(dtype, copy=False).tobytes()


def _index(path: Path) -> _Index:
    found: _Index = {}
    for piece in _frames(path.read_bytes()):
        found.setdefault(str(piece["key"]), {}).setdefault(int(piece["life"]), []).append(piece)
    return found


def _frames(data: bytes) -> Iterator[dict[str, Any]]:
    """The whole frames, up to the first that is torn."""
    at = 0
    while at + _HEAD.size <= len(data):
        size, checksum = _HEAD.unpack_from(data, at)
        body = data[at + _HEAD.size : at + _HEAD.size + size]
        if len(body) < size or xxhash.xxh3_64_intdigest(body) != checksum:
            return
        yield msgpack.unpackb(body)
        at += _HEAD.size + size
