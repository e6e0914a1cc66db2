"""Which task a ticket gets: the n-th of the environment's own stream, so that a resumed run draws
the same ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loopwright.envs.protocol import Task, TaskSource
from loopwright.orchestrator.faults import RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What became of a ticket's group: its task, and which of its rollouts succeeded. On record,
    it is what samplers decide by."""

    task_id: str
    passed: tuple[bool, ...]  # empty where no group came of the ticket


class TaskStream:
    """Random access, by index, to the stream of one split; a finite source starts over."""

    def __init__(
        self,
        source: TaskSource,
        split: str,
        seed: int,
        *,
        choose: Callable[[int], Task] | None = None,
    ) -> None:
        """`choose(n)` decides task n where a sampler does, not the stream's own order."""
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

    def forget_before(self, index: int) -> None:
        """Drop tasks that nobody will ask for again."""
        for old in [i for i in self._window if i < index]:
            del self._window[old]

    def first(self, count: int) -> list[Task]:
        """The first `count` tasks, fewer if the source has fewer."""
        tasks: list[Task] = []
        seen: set[str] = set()
        for task in self._restart():
            if len(tasks) == count or task.id in seen:
                break
            seen.add(task.id)
            tasks.append(task)
        return tasks

    def _draw(self, number: int) -> Task:
        task = next(self._tasks, None)
        if task is None:
            self._tasks = self._restart()
            task = next(self._tasks, None)
        if task is None:
            raise RunError(f"the environment has no tasks in its {self._split!r} split")
        return task
