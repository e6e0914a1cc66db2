"""The loop without actors: a discrete-event simulation of admission, episodes, training and cuts.

The scheduling is not a model of the loop's: it is the same `Admission`. What is simulated are
seconds: `slots` episodes are played at a time, the oldest ticket's first, and the trainer takes
`train_s` a step (with publishing) beside them. For predictions (how much does a lag of 1 buy with
such lengths?) and for tests of the bound over any schedule.
"""

import heapq
import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from loopwright.algorithms.admission import Admission, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """How one episode goes."""

    seconds: float
    scored: bool = True  # False: an infra fault, in no group
    lost_at_s: float | None = None  # its engine dies after so long
    resumes: bool = True  # then it goes on with its tokens; otherwise it is played again


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedStep:
    """One step as it went."""

    tickets: tuple[int, ...]
    began_s: float  # its batch was complete
    ended_s: float  # its weights were in every engine
    waited_s: float  # the trainer stood still before it
    lags: tuple[int, ...]  # of each group: version trained at − version its oldest tokens are of


@dataclass(slots=True, kw_only=True)
class SimulatedRun:
    """Everything that happened."""

    steps: list[SimulatedStep] = field(default_factory=list)
    admitted: dict[int, int] = field(default_factory=dict)  # ticket -> version at admission
    cancelled_s: list[float] = field(default_factory=list)  # how long each had been played
    rollouts: dict[int, int] = field(default_factory=dict)  # ticket -> rollouts in its group
    busy_s: float = 0.0  # seconds of all slots together

    def step_s(self, *, skip: int = 0) -> float:
        """Mean seconds from one publish to the next, after the first `skip` (≥ 1) steps."""
        first = self.steps[max(skip, 1) - 1].ended_s
        return (self.steps[-1].ended_s - first) / (len(self.steps) - max(skip, 1))

    @property
    def lag_max(self) -> int:
        """The largest policy lag of all groups."""
        return max((lag for step in self.steps for lag in step.lags), default=0)

    @property
    def lag_mean(self) -> float:
        """Their mean policy lag."""
        lags = [lag for step in self.steps for lag in step.lags]
        return sum(lags) / max(len(lags), 1)

    @property
    def trainer_idle_frac(self) -> float:
        """Share of all time in which the trainer waited for a batch."""
        return sum(step.waited_s for step in self.steps) / self.steps[-1].ended_s


Episodes = Callable[[int, int], Episode]  # of (ticket, attempt)


def long_tailed(mean_s: float, cv: float, seed: int) -> Episodes:
    """Episodes of log-normal length with this mean and coefficient of variation, always the same
    for the same ticket and attempt."""
    sigma = math.sqrt(math.log1p(cv * cv))
    mu = math.log(mean_s) - sigma * sigma / 2

    def episode(ticket: int, attempt: int) -> Episode:
        chance = random.Random(f"{seed}/{ticket}/{attempt}")
        return Episode(seconds=chance.lognormvariate(mu, sigma) if cv else mean_s)

    return episode


def simulate(
    schedule: Schedule,
    episodes: Episodes,
    *,
    slots: int,
    train_s: Callable[[int], float],
    steps: int,
    version: int = 0,
    consumed: Collection[int] | None = None,
    planned: Mapping[int, tuple[int, ...]] | None = None,
) -> SimulatedRun:
    """Run to step `steps`, from `version` on; `train_s` of a step is what it and its publish take.

    `consumed` and `planned` are those of `Admission`, for a run that is resumed. Raises
    `RuntimeError` if the loop stands still, which no schedule may bring about.
    """
    admission = Admission(schedule, version=version, consumed=consumed, planned=planned)
    return _Simulation(admission, episodes, slots, train_s).run(steps)


@dataclass(slots=True)
class _Playing:
    """An episode that is waiting for a slot or holds one."""

    ticket: int
    attempt: int
    plan: Episode
    rest_s: float  # still to be played
    version: int = -1  # of its oldest tokens; -1 before it has any
    started_s: float = 0.0
    played_s: float = 0.0
    running: bool = False
    over: bool = False


class _Simulation:
    """The state of `simulate`."""

    def __init__(
        self, admission: Admission, episodes: Episodes, slots: int, train_s: Callable[[int], float]
    ) -> None:
        self.result = SimulatedRun()
        self._admission = admission
        self._episodes = episodes
        self._free = slots
        self._train_s = train_s
        self._now = 0.0
        self._serial = 0
        self._events: list[tuple[float, int, _Playing | None]] = []  # None: a step ends
        self._queue: list[tuple[int, int, _Playing]] = []
        self._groups: dict[int, list[_Playing]] = {}
        self._scored: dict[
            int, list[int]
        ] = {}  # ticket -> oldest version of each rollout that is in
        self._training: tuple[int, ...] = ()
        self._began_s = 0.0
        self._idle_since = 0.0

    def run(self, steps: int) -> SimulatedRun:
        """Until step `steps` has ended."""
        while self._admission.version < steps:
            self._admit()
            self._fill()
            self._try_step()
            self._fill()
            if not self._events:
                raise RuntimeError(f"nothing happens any more at version {self._admission.version}")
            self._now, _, episode = heapq.heappop(self._events)
            if episode is None:
                self._end_step()
            elif not episode.over:
                self._end_episode(episode)
        return self.result

    def _admit(self) -> None:
        while self._admission.may_admit():
            ticket = self._admission.admit()
            self.result.admitted[ticket] = self._admission.version
            self._scored[ticket] = []
            self._groups[ticket] = []
            for attempt in range(self._admission.schedule.group_size):
                plan = self._episodes(ticket, attempt)
                episode = _Playing(ticket, attempt, plan, plan.seconds)
                self._groups[ticket].append(episode)
                heapq.heappush(self._queue, (ticket, attempt, episode))

    def _fill(self) -> None:
        while self._free and self._queue:
            episode = heapq.heappop(self._queue)[2]
            if episode.over:
                continue
            self._free -= 1
            if episode.version < 0:
                episode.version = self._admission.version
            episode.started_s, episode.running = self._now, True
            lost = episode.plan.lost_at_s
            dies = lost is not None and episode.played_s < lost < episode.plan.seconds
            self._at(
                min(lost, episode.rest_s) if dies and lost is not None else episode.rest_s, episode
            )

    def _at(self, seconds: float, episode: _Playing | None) -> None:
        self._serial += 1
        heapq.heappush(self._events, (self._now + seconds, self._serial, episode))

    def _leave_slot(self, episode: _Playing) -> None:
        played = self._now - episode.started_s
        self._free += 1
        self.result.busy_s += played
        episode.played_s += played
        episode.rest_s -= played
        episode.running = False

    def _end_episode(self, episode: _Playing) -> None:
        self._leave_slot(episode)
        if episode.rest_s > 1e-9:  # its engine died
            if not episode.plan.resumes:
                episode.rest_s, episode.version = episode.plan.seconds, -1
                episode.played_s = episode.plan.seconds  # it dies once
            heapq.heappush(self._queue, (episode.ticket, episode.attempt, episode))
            return
        episode.over = True
        if episode.plan.scored:
            self._scored[episode.ticket].append(episode.version)
            self._admission.arrived(episode.ticket)
        if all(e.over for e in self._groups[episode.ticket]):
            self._fulfil(episode.ticket)

    def _fulfil(self, ticket: int) -> None:
        self._admission.fulfil(ticket, len(self._scored[ticket]))
        self.result.rollouts[ticket] = len(self._scored[ticket])

    def _try_step(self) -> None:
        if self._training:
            return
        if self._admission.choose() is None:
            for ticket in self._admission.stragglers():
                self._cancel(ticket)
        chosen = self._admission.choose()
        if chosen is not None:
            self._training, self._began_s = chosen, self._now
            self._at(self._train_s(self._admission.version + 1), None)

    def _cancel(self, ticket: int) -> None:
        for episode in self._groups[ticket]:
            if not episode.over:
                if episode.running:
                    self._leave_slot(episode)
                episode.over = True
                self.result.cancelled_s.append(episode.played_s)
        self._fulfil(ticket)

    def _end_step(self) -> None:
        version = self._admission.version
        oldest = (min(self._scored[t]) for t in self._training if self._scored[t])
        self.result.steps.append(
            SimulatedStep(
                tickets=self._training,
                began_s=self._began_s,
                ended_s=self._now,
                waited_s=self._began_s - self._idle_since,
                lags=tuple(version - v for v in oldest),
            )
        )
        self._admission.release(self._training)
        self._training, self._idle_since = (), self._now
