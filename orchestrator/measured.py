"""What a run's folder says about memory and time, to stand beside what was planned."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopwright.algorithms.memory_model import CLASSES, MemoryTable
from loopwright.orchestrator.faults import Refused

_SKIPPED_STEPS = 1  # the first one pays for what is made once


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Figures of one run; None where it has none."""

    folder: str
    memory: MemoryTable | None  # of the last dry run
    peak_bytes: int
    rows: int
    columns: int
    train_s: float  # mean seconds of training a step; 0: not known
    generate_s: float  # mean seconds engines were busy a step, all of them together
    engines: int


def read_measured(folder: Path, *, required: bool) -> Measured | None:
    """Read `events.jsonl` and `metrics.jsonl`. None where there is nothing, `Refused` if that is
    `required`."""
    memory = [e for e in _lines(folder / "events.jsonl") if e.get("kind") == "memory"]
    steps = [m for m in _lines(folder / "metrics.jsonl") if "time/train_s" in m]
    if not memory and not steps:
        if required:
            raise Refused(
                f"{folder}: neither a memory event nor a step is on record there; expected the "
                "folder of a run that began to train"
            )
        return None
    last: dict[str, Any] = memory[-1] if memory else {}
    train_s, generate_s, engines = _times(steps)
    return Measured(
        folder=str(folder),
        memory=MemoryTable(**{k: int(last[f"{k}_bytes"]) for k in CLASSES}) if last else None,
        peak_bytes=int(last.get("peak_bytes", 0)),
        rows=int(last.get("rows", 0)),
        columns=int(last.get("columns", 0)),
        train_s=train_s,
        generate_s=generate_s,
        engines=engines,
    )


def _times(steps: list[dict[str, Any]]) -> tuple[float, float, int]:
    """Seconds of training, busy seconds of all engines, and how many those are."""
    used = steps[_SKIPPED_STEPS:]
    if not used:
        return 0.0, 0.0, 0
    names = sorted({k for m in used for k in m if k.startswith("engine/") and "busy_frac" in k})
    busy = seconds = 0.0
    for before, after in itertools.pairwise(steps):
        passed = after["time/elapsed_s"] - before["time/elapsed_s"]
        seconds += passed
        busy += passed * sum(float(after.get(name) or 0.0) for name in names)
    train_s = sum(float(m["time/train_s"]) for m in used) / len(used)
    return train_s, busy / len(used) if seconds > 0 else 0.0, len(names)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file; none where it is not there, or for a last line cut off."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
