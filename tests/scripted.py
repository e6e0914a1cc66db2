"""Fakes that follow a script: an engine, an environment, an actor. Each implements the real
protocol and keeps what it was asked."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loopwright.actors.engine import Completion, FinishReason, GenerateRequest
from loopwright.envs.protocol import EnvSpec, Message, Observation, Step, Task, Verdict

TASK = Task(environment="scripted", id="task 0", seed=0, split="train", scenario="s")


class Aborted(list[int]):
    """Tokens of a completion that the engine itself cuts short."""


@dataclass(slots=True)
class ScriptedEngine:
    """Says the given completions one after another: token ids, ended by a stop token or cut off.

    Token i of completion n has logprob −(n + i / 10) and version n. A completion that is an
    exception is raised; one that is an event is waited for, for ever if nobody sets it."""

    says: Sequence["list[int] | Exception | asyncio.Event"]
    asked: list[GenerateRequest] = field(default_factory=list)

    async def __call__(self, request: GenerateRequest) -> Completion:
        """The next completion; cut off at `max_new_tokens`."""
        turn = len(self.asked)
        self.asked.append(request)
        said = self.says[turn]
        if isinstance(said, asyncio.Event):
            await said.wait()
            said = []
        if isinstance(said, Exception):
            raise said
        ids = np.array(said[: request.max_new_tokens], np.int32)
        aborted = isinstance(said, Aborted)
        stopped = ids.size > 0 and int(ids[-1]) in request.stop_token_ids
        return Completion(
            request_id=request.request_id,
            token_ids=ids,
            logprobs=-(turn + np.arange(ids.size, dtype=np.float32) / 10),
            versions=np.full(ids.size, turn, np.int32),
            finish_reason=FinishReason.CANCELLED
            if aborted
            else FinishReason.STOP
            if stopped
            else FinishReason.LENGTH,
        )


def reply(text: str, *, terminated: bool = False) -> Step:
    """A step whose observation is one user message."""
    observation = Observation(messages=[Message(role="user", content=text)])
    return Step(observation=observation, terminated=terminated, signals={"policy_fault/parse": 1})


@dataclass(slots=True)
class ScriptedEnv:
    """Opens with one message, answers with the given steps, and gives the given verdict. A step
    that is an exception is raised; one that is an event is waited for."""

    steps: Sequence["Step | Exception | asyncio.Event"]
    verdict: "Verdict | Exception" = field(
        default_factory=lambda: Verdict(reward=1.0, success=True)
    )
    opening: "str | Exception" = "find Ana"
    spec: EnvSpec = field(
        default_factory=lambda: EnvSpec(name="scripted", version="1", description="", max_turns=4)
    )
    heard: list[str] = field(default_factory=list)
    actions: Sequence[str] = ()  # of the oracle

    async def reset(self, task: Task) -> Observation:
        """The opening."""
        self.heard.clear()
        if isinstance(self.opening, Exception):
            raise self.opening
        return Observation(
            messages=[
                Message(role="system", content="office"),
                Message(role="user", content=self.opening),
            ]
        )

    async def step(self, action: str) -> Step:
        """The next step."""
        self.heard.append(action)
        step = self.steps[len(self.heard) - 1]
        if isinstance(step, asyncio.Event):
            await step.wait()
            raise AssertionError("nobody sets this event")
        if isinstance(step, Exception):
            raise step
        return step

    async def evaluate(self) -> Verdict:
        """The verdict."""
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict

    def oracle(self) -> Iterator[str]:
        """The actions given."""
        yield from self.actions

    async def close(self) -> None:
        """Nothing to free."""


Answer = Callable[..., Any]


@dataclass(slots=True)
class ScriptedActor:
    """An actor whose methods are the functions given; an exception that one returns is raised, an
    awaitable is awaited."""

    name: str
    answers: dict[str, Answer]
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    restarts: int = 0
    ended: int = 0
    lack: str = ""

    async def call(self, method: str, *args: Any, timeout_s: float, waiting_for: str) -> Any:
        """The answer to `method`."""
        self.calls.append((method, args))
        answer = self.answers[method](*args)
        if asyncio.iscoroutine(answer):
            answer = await answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def restart(self) -> None:
        """Counted."""
        self.restarts += 1
        self.calls.append(("restart", ()))

    def end(self) -> None:
        """Counted."""
        self.ended += 1

    async def lacks(self) -> str:
        """As told."""
        return self.lack

    def generate_client(self) -> Any:
        """Nothing that generates: scripted workers play without it."""
        return self.name

    def called(self) -> list[str]:
        """Names of the methods called, in order."""
        return [method for method, _ in self.calls]
