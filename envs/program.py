"""Programs: agents that own their loop, and ask the policy whenever they like.

An `Env` is asked for its next message; a `Program` runs, and asks. It may keep several
conversations, rewrite its prompts, plan in one context and act in another:

    async def run(self, task, model):
        plan = await model.chat([Message(role="user", content="make a plan")])
        self.done = await model.chat([Message(role="user", content=f"do this: {plan}")])

`ProgramEnv` plays a program as an environment, so everything else stays as it is: each request that
continues the conversation before it continues its context, token by token; any other begins a fresh
one, which is a training instance of the same rollout. Requests made side by side are answered one
after the other.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from loopwright.envs.protocol import EnvError, EnvSpec, Message, Observation, Step, Task, Verdict

_GRACE_S = 5.0  # for a program to end after its cancellation


class Model(Protocol):
    """The policy, as a program sees it."""

    async def chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """What the policy writes after these messages."""
        ...


@runtime_checkable
class Program(Protocol):
    """One live episode that owns its loop. Instances are reused. `tasks` as in `TaskSource`."""

    spec: EnvSpec  # `max_turns`: requests

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """The stream of tasks."""
        ...

    async def run(self, task: Task, model: Model) -> None:
        """Play the task from the beginning. What it raises is a fault of the infrastructure; where
        the budget of turns runs out, or the episode is given up, it is cancelled."""
        ...

    async def evaluate(self) -> Verdict:
        """Grade from trusted state, not from what the policy says of itself. Idempotent; allowed at
        any time, also while `run` waits for an answer."""
        ...

    async def close(self) -> None:
        """Free what the episode holds; `run` may follow."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    reply: "asyncio.Future[str]"


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A `Model` whose requests wait until the episode loop takes them."""

    requests: "asyncio.Queue[_Request]" = field(default_factory=asyncio.Queue)

    async def chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """See `Model`. Raises `EnvError` for a request without messages."""
        if not messages:
            raise EnvError("chat(): no messages; the policy needs something to answer")
        reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await self.requests.put(_Request(messages=tuple(messages), tools=tuple(tools), reply=reply))
        return await reply


class ProgramEnv:
    """A program as `Env` and `TaskSource`. It has no oracle: nothing can be cloned from it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.spec = program.spec
        self._model = _Waiting()
        self._running: asyncio.Task[None] | None = None
        self._request: _Request | None = None

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """The program's own stream."""
        return self.program.tasks(split, seed)

    async def reset(self, task: Task) -> Observation:
        """Start the program; its first request. Raises `EnvError` if it ends without one."""
        await self._stop()
        self._model = _Waiting()
        self._running = asyncio.create_task(self.program.run(task, self._model))
        self._request = await self._next()
        if self._request is None:
            raise EnvError(f"{task.id}: the program {self.spec.name} ended without asking anything")
        return Observation(messages=self._request.messages, tools=self._request.tools)

    async def step(self, action: str) -> Step:
        """Answer the program's request; its next one, or the end."""
        before = self._request
        if before is None:
            return Step(observation=Observation(messages=()), terminated=True)
        if not before.reply.done():  # the program may have given up waiting
            before.reply.set_result(action)
        self._request = now = await self._next()
        if now is None:
            return Step(observation=Observation(messages=()), terminated=True)
        so_far = (*before.messages, Message(role="assistant", content=action))
        size = len(so_far)
        if now.messages[:size] == so_far and len(now.messages) > size and now.tools == before.tools:
            return Step(observation=Observation(messages=now.messages[size:]))
        return Step(observation=Observation(messages=now.messages, tools=now.tools, fresh=True))

    async def evaluate(self) -> Verdict:
        """The program's grade."""
        return await self.program.evaluate()

    def oracle(self) -> Iterator[str]:
        """None."""
        return iter(())

    async def close(self) -> None:
        """End the program. Idempotent."""
        await self._stop()
        await self.program.close()

    async def _next(self) -> _Request | None:
        """The program's next request, None once it has ended. Raises what it raised."""
        assert self._running is not None, "reset started it"
        asked = asyncio.ensure_future(self._model.requests.get())
        try:
            await asyncio.wait({asked, self._running}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            self._running.result()
            return None
        finally:
            asked.cancel()

    async def _stop(self) -> None:
        running, self._running, self._request = self._running, None, None
        if running is None:
            return
        running.cancel()
        _, stubborn = await asyncio.wait([running], timeout=_GRACE_S)
        if stubborn:
            raise EnvError(f"{self.spec.name}: run() did not end within {_GRACE_S:g} s")
        if not running.cancelled():
            running.exception()  # seen: its episode is over
