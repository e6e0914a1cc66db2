"""What an environment is: the protocol every world, adapter and plugin implements.

An environment plays one live episode at a time, sees text only (never tokens), and grades from its
own trusted state. The framework owns the loop:

    observation = await env.reset(task)
    while turns are left:
        step = await env.step(text)        # what the policy wrote; never raises because of it
        if step.terminated:
            break
    verdict = await env.evaluate()         # also when a budget ran out

Errors by boundary: what the *agent* did wrong comes back as an observation with a category in
`signals`; an exception out of `reset`, `step` or `evaluate` is an *infrastructure fault*: retried,
never scored as 0. `TaskError` quarantines the task.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import msgpack


class EnvError(Exception):
    """Base of everything an environment may raise on purpose."""


class TaskError(EnvError):
    """The task itself is broken: it is quarantined and never drawn again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One problem with a seed. `id` is unique within the environment; the seed is its only
    randomness."""

    environment: str
    id: str
    seed: int
    split: str  # "train" or "test"
    scenario: str  # the family of variants it belongs to
    difficulty: int = 1  # 1 … 3
    # msgpack-able; training adds the values of its schedules (`EnvSpec.scheduled`), by name
    payload: Mapping[str, Any] = field(default_factory=dict)


def encode_task(task: Task) -> bytes:
    """The task as msgpack; raises `TypeError` for a payload that is not plain data."""
    return msgpack.packb(asdict(task))


def decode_task(data: bytes) -> Task:
    """The task that `encode_task` wrote."""
    return Task(**msgpack.unpackb(data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message; roles are `system`, `user`, `assistant`, `tool`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """New messages for the policy, append-only; tool schemas (OpenAI style) come with the first
    one.

    An environment whose agent keeps no transcript (MEM1, arXiv:2506.15841) rewrites the context
    instead: with `fresh`, these messages and tools are all that the policy sees from now on. Each
    distinct context is one training instance of the same rollout.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    fresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one action did. `signals` counts things worth a metric: `tool_error/unknown_api`,
    `policy_fault/parse`."""

    observation: Observation
    terminated: bool = False
    signals: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The grade: `reward` (finite, usually 0 … 1), its named parts, and whether the task is solved
    entirely."""

    reward: float
    success: bool
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvSpec:
    """What an environment declares about itself."""

    name: str
    version: str  # with the data's hash; stored with every rollout
    description: str
    max_turns: int  # default budget of turns
    deterministic: bool = True
    scheduled: tuple[str, ...] = ()  # payload values that training may schedule, e.g. noise
    license: str = "Apache-2.0"
    max_concurrency: int = 0  # episodes that one worker plays at once; 0 = as many as come
    snapshots: bool = False  # as configured it implements `Snapshots`


@runtime_checkable
class Env(Protocol):
    """One live episode. Instances are reused: `reset` starts over, whatever state the last episode
    left."""

    spec: EnvSpec

    async def reset(self, task: Task) -> Observation:
        """Start the task; the first messages."""
        ...

    async def step(self, action: str) -> Step:
        """Take the policy's whole turn as text. Total: any text gives a step, never an
        exception."""
        ...

    async def evaluate(self) -> Verdict:
        """Grade the current state. Idempotent; allowed at any time."""
        ...

    def oracle(self) -> Iterator[str]:
        """Actions that solve the task just reset, one at a time, drawn between steps; empty if it
        has no oracle."""
        ...

    async def close(self) -> None:
        """Free what the episode holds."""
        ...


@runtime_checkable
class Snapshots(Protocol):
    """What an environment can do beside `Env` if it says so in `EnvSpec.snapshots`: leave an
    episode at some point and return to it, as often as one likes."""

    async def snapshot(self) -> bytes:
        """The live episode as it is now. Plain data: it may be kept, and travel."""
        ...

    async def restore(self, task: Task, blob: bytes) -> None:
        """Be in the episode of `task` that `snapshot` saw, whatever this instance has played.
        Raises `EnvError` for a blob of another task or version."""
        ...


@runtime_checkable
class HasAnswers(Protocol):
    """What an environment whose tasks have an answer can do beside `Env`: tell it to the
    conformance kit, which then looks for leaks."""

    def answers(self) -> Sequence[str]:
        """The ground truth of the live task: texts that neither the task's id and scenario, nor
        the opening, nor a reply to nonsense may hold."""
        ...


@runtime_checkable
class TaskSource(Protocol):
    """Where tasks come from. Splits are disjoint by construction."""

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """An endless or finite stream of tasks, the same for the same arguments."""
        ...
