"""An office's episode as bytes and back: what differs from the base, which the task's seed gives
again."""

import json
from typing import Any

from loopwright.envs.metrics import CallLog
from loopwright.envs.officeworld.api import Office
from loopwright.envs.officeworld.state import Overlay, Row
from loopwright.envs.protocol import EnvError, Task


def pack(task: Task, office: Office, *, log: CallLog, finished: bool, answer: Any) -> bytes:
    """The live episode, as JSON."""
    overlay = office.world.snapshot()
    known = answer is None or type(answer) in (int, str)
    state = {
        "task": task.id,
        "rows": [
            [t, i, row and dict(row)] for t, over in overlay.items() for i, row in over.items()
        ],
        "tokens": office.tokens,
        "failed": sorted(log.failed),
        "recovered": sorted(log.recovered),
        "finished": finished,
        "answer": answer if known else [],  # given, and of a type that is never right
    }
    return json.dumps(state).encode()


def unpack(blob: bytes, task: Task, office: Office, log: CallLog) -> tuple[bool, Any]:
    """Put a new episode of the same task into that state; whether it is finished, and its answer.
    Raises `EnvError` for what is no snapshot of it."""
    try:
        state = json.loads(blob)
        if state["task"] != task.id:
            raise EnvError(f"the snapshot is of task {state['task']!r}, not of {task.id!r}")
        overlay: Overlay = {}
        for table, row_id, row in state["rows"]:
            overlay.setdefault(table, {})[row_id] = None if row is None else _row(row)
        office.world.restore(overlay)
        office.tokens.update(state["tokens"])
        log.failed.update(state["failed"])
        log.recovered.update(state["recovered"])
        return bool(state["finished"]), state["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise EnvError(f"not a snapshot of {task.id!r}: {error!r}") from error


def _row(values: dict[str, Any]) -> Row:
    """Lists are tuples in a row."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
