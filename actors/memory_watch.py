"""How much memory an environment worker holds, with every process that its environments started.

Environments leak, some in the worker, some in processes of their own. A machine without memory
takes everything on it down, so a worker has a limit: its share of the machine's memory (of the
container's, where that has a limit), or what `ulimit -m` says where the worker was started, if that
is less. The worker only looks and tells; whoever gave it its episodes empties and restarts it.
"""

import os
import resource
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a process and its descendants hold, bytes. What they share is counted once."""

    environment: str
    own_bytes: int
    children_bytes: int
    children: int
    limit_bytes: int

    @property
    def resident_bytes(self) -> int:
        """All of it."""
        return self.own_bytes + self.children_bytes

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.own_bytes >> 20} MiB, and {self.children_bytes >> 20} MiB in {self.children} "
            f"processes of environment {self.environment}: more than its limit of "
            f"{self.limit_bytes >> 20} MiB"
        )


class MemoryWatch:
    """The footprint of this process, looked at beside its work: reading it takes some
    milliseconds."""

    def __init__(self, environment: str, share: float) -> None:
        """`share` of the machine's memory is the limit; 0: nothing is watched."""
        self._environment = environment
        self._limit = limit_bytes(share) if share else 0
        self._newest: Footprint | None = None
        self._looking: threading.Thread | None = None

    def newest(self) -> Footprint | None:
        """The last look; the next one begins now. None before the first, or where nothing is
        watched."""
        if self._limit and (self._looking is None or not self._looking.is_alive()):
            self._looking = threading.Thread(target=self._look, name="memory-watch", daemon=True)
            self._looking.start()
        return self._newest

    def _look(self) -> None:
        self._newest = footprint(os.getpid(), self._environment, self._limit)


def footprint(pid: int, environment: str, limit: int) -> Footprint:
    """Of a process on this machine and of its descendants."""
    children = [resident_bytes(child) for child in descendants(pid)]
    return Footprint(
        environment=environment,
        own_bytes=resident_bytes(pid),
        children_bytes=sum(children),
        children=len(children),
        limit_bytes=limit,
    )


def limit_bytes(share: float) -> int:
    """`share` of this machine's memory, or less if `ulimit -m` is."""
    found = int(share * machine_bytes())
    told = resource.getrlimit(resource.RLIMIT_RSS)[0]
    return found if told == resource.RLIM_INFINITY else min(found, told)


def machine_bytes() -> int:
    """Memory of this machine, or of this container."""
    found = [os.sysconf("SC_PHYS_PAGES") * _PAGE]
    for path in map(Path, _CGROUPS):
        text = path.read_text().strip() if path.exists() else ""
        found += [int(text)] if text.isdecimal() else []
    return min(found)


def descendants(pid: int) -> Iterator[int]:
    """Every living process that descends from `pid`, without itself."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            if fields[0] != "Z":
                children[int(fields[1])].append(int(entry.name))
    waiting = children[pid]
    while waiting:
        child = waiting.pop()
        yield child
        waiting += children[child]


def resident_bytes(pid: int) -> int:
    """Proportional set size: pages shared by n processes count 1/n in each. 0 if it has ended."""
    try:
        rollup = (_PROC / str(pid) / "smaps_rollup").read_text()
        (line,) = (line for line in rollup.splitlines() if line.startswith("Pss:"))
        return int(line.split()[1]) << 10
    except (OSError, ValueError):  # not permitted, or no such file: everything it has resident
        try:
            return int((_PROC / str(pid) / "statm").read_text().split()[1]) * _PAGE
        except OSError:
            return 0
