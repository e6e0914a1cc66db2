"""Kills a process at an exact point of a publish or of a checkpoint, from within, without a change
to it.

Python imports a module of this name at the start of every process whose path has its folder. It
listens to Python's audit events (PEP 578), which tell of opened files, renames and file locks just
before they happen. Where the file `armed` lies in the folder that LOOPWRIGHT_CHAOS names, the first
process that comes to the point which it names ends at once, by SIGKILL, and leaves `fired`.

    publish    the trainer locks a slot of the shared memory, writes and checksums it, unlocks it;
               an engine locks it to read, compares, and acknowledges
    checkpoint the trainer writes the optimizer's tensors, numbers.json, then the weights;
               the controller renames the folder, opens its parent to flush it, then writes the
               ledger's line
"""

import fcntl
import os
import signal
import struct
import sys
import time
from typing import Any

_FOLDER = os.environ.get("LOOPWRIGHT_CHAOS", "")
_LOCK = 37  # fcntl(2), F_OFD_SETLK


def point_of(event: str, arguments: tuple[Any, ...]) -> str:
    """The point that an audit event is at; empty for nearly all of them."""
    if event == "fcntl.fcntl" and arguments[1] == _LOCK:
        (kind,) = struct.unpack_from("h", arguments[2])
        return {
            fcntl.F_WRLCK: "publish: before the first byte",
            fcntl.F_UNLCK: "publish: bytes written, not committed",
            fcntl.F_RDLCK: "publish: committed, not acknowledged",
        }[kind]
    if event == "os.rename" and _is_checkpoint(arguments[1]):
        return "checkpoint: before the rename"
    if event == "open" and isinstance(arguments[0], str):
        path = arguments[0]
        if path.endswith(".partial/trainer_state/numbers.json"):
            return "checkpoint: during the tensors"
        if path.endswith("/checkpoints"):
            return "checkpoint: renamed, not in the ledger"
    return ""


def _is_checkpoint(path: Any) -> bool:
    folder, _, name = os.fspath(path).rpartition("/")
    return folder.endswith("/checkpoints") and name.startswith("step-")


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in ("fcntl.fcntl", "os.rename", "open"):
        return
    point = point_of(event, arguments)
    armed = f"{_FOLDER}/armed"
    if not point or not os.path.exists(armed):
        return
    with open(armed) as file:
        if file.read() != point:
            return
    try:
        os.rename(armed, f"{_FOLDER}/claimed")  # one process alone succeeds
    except OSError:
        return
    with open(f"{_FOLDER}/claimed", "w") as file:
        file.write(f"{time.time()} {os.getpid()}")
    os.rename(f"{_FOLDER}/claimed", f"{_FOLDER}/fired")
    os.kill(os.getpid(), signal.SIGKILL)


if _FOLDER:
    sys.addaudithook(_on_event)
