"""Which task comes next: what a sampler decides is a function of the ticket and of recorded facts.

For ticket t a sampler knows the groups of the tickets below `settled_before(t)`, which are trained
on before t is admitted whatever the speeds, and nothing else: so a resumed run draws the same
tasks. Facts come from the ledger; a sampler has no state of its own to save.
"""

import difflib
import hashlib
import inspect
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import Any, Protocol

from loopwright.algorithms.curricula import (
    CurriculumError,
    pass_rate_weight,
    pick,
    scheduled,
    settled_before,
)
from loopwright.envs.mix import Mix
from loopwright.envs.protocol import Env, Task, TaskSource
from loopwright.orchestrator.faults import Refused, RunError
from loopwright.orchestrator.tasks import Played

_LOOK_AHEAD = 2000  # tasks of the stream looked through for a variant of a seed task
_REPEATS = 20  # draws a wanted task, before a stream counts as having no more
Stream = Callable[[], Iterator[Task]]  # a new pass over the training tasks


class Sampler(Protocol):
    """Draws the tasks of one environment."""

    def draw(self, uniform: float) -> Task:
        """The next task; `uniform` in [0, 1) is this draw's randomness."""
        ...

    def learn(self, played: Played) -> None:
        """A group that this sampler drew is settled. Called in order of tickets."""
        ...


class Uniform:
    """The environment's own stream, in its order; a finite one starts over."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._tasks = stream()

    def draw(self, uniform: float) -> Task:
        task = next(self._tasks, None)
        if task is None:
            self._tasks = self._stream()
            task = next(self._tasks, None)
        if task is None:
            raise RunError("the environment has no tasks in its 'train' split")
        return task

    def learn(self, played: Played) -> None:
        """Nothing to learn."""


class PassRate:
    """Prefers what succeeds sometimes: weight 4p(1 − p) with a floor (`pass_rate_weight`).

    `pool`: tasks to draw from, the first of the stream; `by`: whose pass rate counts, a "task"'s, a
    "scenario"'s or a "difficulty"'s; `recent`: groups that it is taken over; `floor`: weight of
    what always or never succeeds.
    """

    def __init__(
        self, stream: Stream, pool: int = 512, by: str = "task", recent: int = 4, floor: float = 0.1
    ) -> None:
        keys: Mapping[str, Callable[[Task], Any]] = {
            "task": lambda task: task.id,
            "scenario": lambda task: task.scenario,
            "difficulty": lambda task: task.difficulty,
        }
        if by not in keys or pool < 1 or recent < 1:
            raise CurriculumError(
                f"by {by!r}, pool {pool}, recent {recent}: by must be one of {', '.join(keys)}, "
                "the numbers at least 1"
            )
        pass_rate_weight(None, floor)
        self._floor = floor
        self._key_of: dict[str, Any] = {}
        self._tasks: dict[Any, list[Task]] = defaultdict(list)
        for task in _distinct(stream(), pool):
            self._key_of[task.id] = keys[by](task)
            self._tasks[keys[by](task)].append(task)
        self._drawn: dict[Any, int] = dict.fromkeys(self._tasks, 0)
        self._recent: dict[Any, deque[tuple[bool, ...]]] = defaultdict(lambda: deque(maxlen=recent))

    def draw(self, uniform: float) -> Task:
        keys = list(self._tasks)
        weights = [
            len(self._tasks[key]) * pass_rate_weight(self._rate(key), self._floor) for key in keys
        ]
        key = keys[pick(weights, uniform)]
        self._drawn[key] += 1
        return self._tasks[key][(self._drawn[key] - 1) % len(self._tasks[key])]

    def learn(self, played: Played) -> None:
        key = self._key_of.get(played.task_id)
        if key is not None and played.passed:
            self._recent[key].append(played.passed)

    def _rate(self, key: Any) -> float | None:
        recent = self._recent.get(key)
        if not recent:
            return None
        return sum(map(sum, recent)) / sum(map(len, recent))


class FailureVariants:
    """Variants of what fails, from seed tasks only (LLM2LLM, arXiv:2403.15042).

    `seeds`: how many tasks, the first of the stream, are seed tasks; `share` of the draws go to
    variants while a seed fails: other tasks of its scenario, never seen before. A seed fails when
    less than `below` of its newest group succeeds. Variants that fail breed none: errors of a
    variant would multiply.
    """

    def __init__(
        self, stream: Stream, seeds: int = 128, share: float = 0.5, below: float = 0.5
    ) -> None:
        if seeds < 1 or not 0 < share < 1 or not 0 < below <= 1:
            raise CurriculumError(
                f"seeds {seeds}, share {share}, below {below}: expected at least 1, a share "
                "between 0 and 1, and a pass rate above 0 and at most 1"
            )
        self._stream, self._share, self._below = stream, share, below
        self._fresh = stream()
        self._seeds = {task.id: task for task in _distinct(self._fresh, seeds)}
        self._order = list(self._seeds.values())
        self._failing: dict[str, None] = {}  # ids of seed tasks, in the order in which they failed
        self._waiting: dict[str, deque[Task]] = defaultdict(deque)  # drawn on the way, by scenario
        self._next = 0

    def draw(self, uniform: float) -> Task:
        if self._failing and uniform < self._share:
            failing = list(self._failing)
            seed = self._seeds[failing[int(uniform / self._share * len(failing))]]
            return self._variant(seed)
        self._next += 1
        return self._order[(self._next - 1) % len(self._order)]

    def learn(self, played: Played) -> None:
        if played.task_id in self._seeds and played.passed:
            if sum(played.passed) / len(played.passed) < self._below:
                self._failing.setdefault(played.task_id)
            else:
                self._failing.pop(played.task_id, None)

    def _variant(self, seed: Task) -> Task:
        """A new task of the seed's scenario; the seed itself where the stream has no other."""
        waiting = self._waiting[seed.scenario]
        for task in islice(self._fresh, 0 if waiting else _LOOK_AHEAD):
            if task.id in self._seeds:
                continue
            if task.scenario == seed.scenario:
                return task
            self._waiting[task.scenario].append(task)
        return waiting.popleft() if waiting else seed


SAMPLERS: Mapping[str, Callable[..., Sampler]] = MappingProxyType(
    {"uniform": Uniform, "pass_rate": PassRate, "failure_variants": FailureVariants}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueSchedule:
    """A payload value of every training task, by the step that it is played for."""

    start: float
    end: float
    steps: int
    base: float = 4.0

    def at(self, step: int) -> float:
        """The value of tasks played for this step, counted from 0."""
        return scheduled(step, start=self.start, end=self.end, steps=self.steps, base=self.base)


class Draws:
    """The training tasks by number, each decided by its member's sampler."""

    def __init__(
        self,
        source: Env,
        *,
        seed: int,
        sampler: str,
        options: Mapping[str, Any],
        steps: int,
        groups_per_step: int,
        max_lag: int,
        played: Mapping[int, Sequence[Played]],
        draws: int = 1,
    ) -> None:
        """`steps` is the length of a schedule that names none; `played` has every ticket whose
        group is on record; a ticket has `draws` numbers. Raises `Refused` for options that the
        sampler does not take."""
        self._schedules = _schedules(options.get("schedule", {}), source, steps)
        rest = {name: value for name, value in options.items() if name != "schedule"}
        self._members = _members(source, seed, sampler, rest)
        self._weights = [weight for weight, _ in self._members.values()]
        self._labels = list(self._members)
        self._seed, self._draws = seed, draws
        self._step_size, self._max_lag = groups_per_step, max_lag
        self._adaptive = sampler != "uniform"
        self._played, self._learned = played, 0

    def __call__(self, number: int) -> Task:
        """Task `number`. Called once for each, in order."""
        ticket = number // self._draws
        if self._adaptive:
            self._learn(
                settled_before(ticket, max_lag=self._max_lag, groups_per_step=self._step_size)
            )
        label = self._labels[pick(self._weights, _uniform(self._seed, number, "member"))]
        task = self._members[label][1].draw(_uniform(self._seed, number, "task"))
        step = ticket // self._step_size
        values = {
            name: schedule.at(step)
            for name, (labels, schedule) in self._schedules.items()
            if label in labels
        }
        return replace(task, payload={**task.payload, **values}) if values else task

    def _learn(self, before: int) -> None:
        for ticket in range(self._learned, before):
            found = self._played.get(ticket)
            if found is None:
                raise RunError(
                    f"the ledger does not say how the group of ticket {ticket} went, which the "
                    "sampler needs: it was written by an earlier version of Loopwright; set "
                    'environment.sampler = "uniform"'
                )
            for played in found:
                for _, sampler in self._members.values():
                    sampler.learn(played)
        self._learned = max(self._learned, before)


def _members(
    source: Env, seed: int, sampler: str, options: Mapping[str, Any]
) -> dict[str, tuple[float, Sampler]]:
    """Label -> (weight, sampler): the members of a mix, or the one environment under ""."""
    if sampler not in SAMPLERS:
        raise Refused(f"environment.sampler = {sampler!r}: there are {', '.join(SAMPLERS)}")
    known = list(inspect.signature(SAMPLERS[sampler]).parameters)[1:]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, "schedule"], n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known) or 'none'}"
            )
            raise Refused(f"environment.sampler_options.{name}: unknown to {sampler!r}; {hint}")
    sources: Mapping[str, tuple[float, TaskSource]]
    if isinstance(source, Mix):
        sources = {m.label: (m.weight, m) for m in source.members}
    elif isinstance(source, TaskSource):
        sources = {"": (1.0, source)}
    else:
        raise RunError(f"{type(source).__name__} has no tasks(split, seed)")
    try:
        return {
            label: (weight, SAMPLERS[sampler](_stream(tasks, seed), **options))
            for label, (weight, tasks) in sources.items()
        }
    except (CurriculumError, TypeError) as error:
        raise Refused(f"environment.sampler_options: {sampler!r} refuses: {error}") from error


def _stream(source: TaskSource, seed: int) -> Stream:
    return lambda: iter(source.tasks("train", seed))


def _schedules(
    tables: Any, source: Env, steps: int
) -> dict[str, tuple[frozenset[str], ValueSchedule]]:
    """Payload value -> (labels of the members that it is for, its schedule)."""
    specs = (
        {m.label: m.spec for m in source.members} if isinstance(source, Mix) else {"": source.spec}
    )
    known = sorted({name for spec in specs.values() for name in spec.scheduled})
    where = "environment.sampler_options.schedule"
    if not isinstance(tables, Mapping):
        raise Refused(f"{where} = {tables!r}: expected a table for each scheduled value")
    found: dict[str, tuple[frozenset[str], ValueSchedule]] = {}
    for name, table in tables.items():
        if name not in known:
            hint = f"it schedules {', '.join(known)}" if known else "it schedules nothing"
            raise Refused(f"{where}.{name}: unknown to the environment; {hint}")
        try:
            schedule = ValueSchedule(**{"steps": max(steps, 1), **table})
            schedule.at(0)
        except (TypeError, CurriculumError) as error:
            raise Refused(
                f"{where}.{name} = {table!r}: expected numbers start, end, steps and base ({error})"
            ) from error
        labels = frozenset(label for label, spec in specs.items() if name in spec.scheduled)
        found[name] = (labels, schedule)
    return found


def _distinct(tasks: Iterator[Task], count: int) -> list[Task]:
    """The next `count` tasks, each once; fewer where the stream has no more of them."""
    found: dict[str, Task] = {}
    for task in islice(tasks, _REPEATS * count):
        found.setdefault(task.id, task)
        if len(found) == count:
            break
    if not found:
        raise RunError("the environment has no tasks in its 'train' split")
    return list(found.values())


def _uniform(seed: int, number: int, what: str) -> float:
    digest = hashlib.sha256(f"{what}/{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
