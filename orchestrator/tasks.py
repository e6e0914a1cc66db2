"""Which task a ticket gets: a function of its number alone, so that a resumed run draws the
same."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from loopwright.envs.protocol import Task, TaskSource
from loopwright.orchestrator.faults import RunError

DRAWS = 3  # tasks a ticket may have with dynamic sampling: one, and two to replace it
_REPEATS = 20  # draws a wanted task, before a stream counts as having no more of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What became of a ticket's group: its task, and which of its rollouts succeeded. On record,
    it is what samplers decide by."""

    task_id: str
    passed: tuple[bool, ...]  # empty where no group came of the ticket


class TaskStream:
    """Random access, by index, to the stream of one split; a finite source starts over.

    With `draws` above 1 a ticket has so many tasks, one to begin with and the others to replace it:
    ticket t those from t · draws on. Which of them comes first changes from ticket to ticket, so
    that no task of a finite source is only ever a replacement.
    """

    def __init__(
        self,
        source: TaskSource,
        split: str,
        seed: int,
        *,
        choose: Callable[[int], Task] | None = None,
        draws: int = 1,
    ) -> None:
        """`choose(n)` decides task n where a sampler does, not the stream's own order."""
        self.draws = draws
        self._choose = choose
        self._restart: Callable[[], Iterator[Task]] = lambda: iter(source.tasks(split, seed))
        self._split = split
        self._tasks = self._restart()
        self._next = 0
        self._window: dict[int, Task] = {}

    def __getitem__(self, index: int) -> Task:
        """Task number `index`. Earlier ones are kept, until `forget_before`."""
        while self._next <= index:
            self._window[self._next] = (self._choose or self._draw)(self._next)
            self._next += 1
        return self._window[index]

    def of(self, ticket: int, draw: int = 0) -> Task:
        """The ticket's task number `draw`, 0 … draws − 1."""
        turn = zlib.crc32(ticket.to_bytes(8, "little")) if self.draws > 1 else 0
        return self[ticket * self.draws + (draw + turn) % self.draws]

    def forget_before(self, ticket: int) -> None:
        """Drop the tasks of tickets that nobody will ask for again."""
        for old in [i for i in self._window if i < ticket * self.draws]:
            del self._window[old]

    def first(self, count: int) -> list[Task]:
        """The first `count` tasks, each once; fewer if the source has fewer."""
        tasks: dict[str, Task] = {}
        for task in islice(self._restart(), _REPEATS * count):
            tasks.setdefault(task.id, task)
            if len(tasks) == count:
                break
        return list(tasks.values())

    def _draw(self, number: int) -> Task:
        task = next(self._tasks, None)
        if task is None:
            self._tasks = self._restart()
            task = next(self._tasks, None)
        if task is None:
            raise RunError(f"the environment has no tasks in its {self._split!r} split")
        return task
