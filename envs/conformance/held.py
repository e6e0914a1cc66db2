"""What this process holds: tasks, threads, processes below it, file descriptors, memory."""

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_SHARED = 2  # of each kind may be new: pools that all episodes share grow a little
_EXECUTOR = "asyncio_"  # threads of the event loop's own pool: they are shared, and stay


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A picture of it. Where there is no /proc, processes and descriptors are not seen."""

    tasks: frozenset["asyncio.Task[object]"]
    threads: frozenset[threading.Thread]
    processes: frozenset[int]
    descriptors: Counter[str]  # by what they lead to, numbers left out

    @staticmethod
    def now() -> "Held":
        """Of this moment. Call it within an event loop."""
        threads = [t for t in threading.enumerate() if not t.name.startswith(_EXECUTOR)]
        return Held(
            tasks=frozenset(t for t in asyncio.all_tasks() if not t.done()),
            threads=frozenset(threads),
            processes=frozenset(descendants()),
            descriptors=Counter(_descriptors()),
        )

    def beyond(self, before: "Held") -> list[str]:
        """What there is that was not there `before`, in words; nothing for `_SHARED` or fewer."""
        found = []
        if len(tasks := self.tasks - before.tasks) > _SHARED:
            names = sorted({t.get_coro().__qualname__ for t in tasks})  # type: ignore[union-attr]
            found.append(f"{len(tasks)} asyncio task(s): {', '.join(names)}")
        if len(threads := self.threads - before.threads) > _SHARED:
            names = sorted({t.name for t in threads})
            found.append(f"{len(threads)} thread(s): {', '.join(names)}")
        if len(processes := self.processes - before.processes) > _SHARED:
            found.append(f"{len(processes)} process(es): {', '.join(map(_command, processes))}")
        descriptors = self.descriptors - before.descriptors
        if descriptors.total() > _SHARED:
            kinds = ", ".join(sorted(descriptors))
            found.append(f"{descriptors.total()} file descriptor(s): {kinds}")
        return found


def descendants() -> Iterator[int]:
    """Process ids of all that this process has started, directly or not; zombies count as gone."""
    children: dict[int, list[int]] = {}
    for folder in _PROC.glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):  # gone meanwhile
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(folder.name))
    waiting = [os.getpid()]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            waiting.append(child)
            yield child


def resident_bytes(pid: int) -> int:
    """Memory of a process; 0 if it is gone, or cannot be told here."""
    try:
        pages = (_PROC / str(pid) / "statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _descriptors() -> Iterator[str]:
    folder = _PROC / "self" / "fd"
    for entry in folder.iterdir() if folder.is_dir() else ():
        try:
            yield os.readlink(entry).partition(":[")[0]
        except OSError:  # that of the listing itself
            continue


def _command(pid: int) -> str:
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return str(pid)
    return b" ".join(words).decode(errors="replace")[:80].strip() or str(pid)
