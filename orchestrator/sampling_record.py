"""What the sampling of a run depended on, on record: which episodes were started with which seeds,
and what each engine did in which order. With the ledger it is all that sampling depended on.

Append-only frames in `ledger/sampling.frames`, of the ledger's own form. Nothing waits for the
disk: a record that lost its end replays up to there.
"""

import contextlib
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from loopwright.actors.episode import EpisodeLimits
from loopwright.envs.protocol import Task, decode_task, encode_task
from loopwright.orchestrator.ledger import LedgerError, frame, read_frames

_logger = logging.getLogger(__name__)
FILE = "sampling.frames"  # in the folder `ledger/` of a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One episode that was started."""

    task: Task
    ticket: int  # negative: of an evaluation
    attempt: int
    seed: int
    limits: EpisodeLimits

    @property
    def session(self) -> str:
        """How its requests are named, before the number of the turn."""
        return f"{self.task.id}/{self.attempt}/{self.seed:x}"


@dataclass(slots=True)
class Recorded:
    """The record, read."""

    episodes: dict[str, Episode] = field(default_factory=dict)  # by session
    # engine -> segments of its journal, each beginning with the installation of weights
    segments: dict[str, list[bytes]] = field(default_factory=dict)


class SamplingRecord:
    """The writer."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / FILE
        _cut_torn_tail(path)
        self._file = path.open("ab")
        self._failed = False
        self._known: set[str] = set()
        self._limits: list[EpisodeLimits] = []

    def episode(self, episode: Episode) -> None:
        """An episode starts. The same one again (an evaluation's) needs no second record."""
        if episode.session in self._known:
            return
        self._known.add(episode.session)
        if episode.limits not in self._limits:
            self._limits.append(episode.limits)
            self._write({"kind": "limits", "limits": asdict(episode.limits)})
        self._write(
            {
                "kind": "episode",
                "task": encode_task(episode.task),
                "ticket": episode.ticket,
                "attempt": episode.attempt,
                "seed": episode.seed,
                "limits": self._limits.index(episode.limits),
            }
        )

    def engine(self, name: str, segments: tuple[bytes, ...]) -> None:
        """What an engine did since it was last asked."""
        for segment in segments:
            self._write({"kind": "engine", "engine": name, "journal": segment})

    def close(self) -> None:
        """Flush and close."""
        try:
            self._file.close()
        except OSError as error:
            self._give_up(error)

    def _write(self, record: dict[str, Any]) -> None:
        if self._failed:
            return
        try:
            self._file.write(frame(msgpack.packb(record)))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """A run goes on (or ends for a better reason) without this record; what came after a gap
        could not be read."""
        self._failed = True
        _logger.warning("%s: %s; sampling is not recorded from here on", FILE, error.strerror)


def _cut_torn_tail(path: Path) -> None:
    """What follows the last whole frame was being written when a process died."""
    if not path.exists():
        return
    whole = 0
    with contextlib.suppress(LedgerError):
        for offset, record in read_frames(path):
            whole = offset + len(frame(msgpack.packb(record)))
    os.truncate(path, whole)


def read(path: Path) -> Recorded:
    """The record at `path`."""
    found, limits = Recorded(), list[EpisodeLimits]()
    for _, record in read_frames(path):
        if record["kind"] == "limits":
            limits.append(EpisodeLimits(**record["limits"]))
        elif record["kind"] == "episode":
            episode = Episode(
                task=decode_task(record["task"]),
                ticket=record["ticket"],
                attempt=record["attempt"],
                seed=record["seed"],
                limits=limits[record["limits"]],
            )
            found.episodes[episode.session] = episode
        else:
            found.segments.setdefault(record["engine"], []).append(record["journal"])
    return found
