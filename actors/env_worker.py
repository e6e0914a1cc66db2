"""Environment worker: many episodes at once on one event loop, each with an environment instance of
its own."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loopwright.actors.episode import EpisodeLimits, Generate, play_episode
from loopwright.algorithms.records import encode
from loopwright.envs import registry
from loopwright.envs.protocol import Env, decode_task

# transformers is imported where the tokenizer is loaded, in the worker's own process
if TYPE_CHECKING:
    from loopwright.actors.chat import ChatFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How to build an environment worker."""

    environment: str  # name in the registry, `module:Class`, or `path.py:Class`
    options: Mapping[str, Any]
    tokenizer_path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeOrder:
    """One episode to play."""

    task: bytes  # `encode_task`
    attempt: int
    engine: int  # which engine serves all its turns (sticky: its prefix stays cached there)
    seed: int
    priority: int
    limits: EpisodeLimits


class WorkerLost(Exception):
    """This process was restarted and does not know yet who generates."""


class EnvWorker:
    """Plays episodes. Environment instances are kept and reused; a faulted one is thrown away."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._engines: Sequence[Generate] = ()
        self._loaded_chat: ChatFormat | None = None
        self._idle: list[Env] = []
        self._playing = 0
        self._played = 0

    async def start(self, engines: Sequence[Generate]) -> int:
        """Load the tokenizer, build one environment, learn who generates; the process id."""
        self._chat()
        if not self._idle:
            self._idle.append(self._build())
        self._engines = engines
        return os.getpid()

    async def play(self, order: EpisodeOrder) -> bytes:
        """Play one episode; the encoded `Rollout`, also when the infrastructure failed. Raises
        `TaskError`, and `WorkerLost` before `start`."""
        if not self._engines:
            raise WorkerLost("restarted, and not started yet")
        env = self._idle.pop() if self._idle else self._build()
        self._playing += 1
        try:
            rollout = await play_episode(
                env,
                decode_task(order.task),
                order.attempt,
                self._engines[order.engine],
                self._chat(),
                order.limits,
                seed=order.seed,
                priority=order.priority,
            )
        finally:
            self._playing -= 1
        if rollout.fault:
            await _close_quietly(env)
        else:
            self._idle.append(env)
        self._played += 1
        return encode(rollout)

    async def ping(self) -> dict[str, int]:
        """Proof of life: process id and counters."""
        return {"pid": os.getpid(), "playing": self._playing, "played": self._played}

    async def close(self) -> None:
        """Close every idle environment."""
        for env in self._idle:
            await _close_quietly(env)
        self._idle.clear()

    def _chat(self) -> "ChatFormat":
        from loopwright.actors.chat import ChatFormat

        if self._loaded_chat is None:
            self._loaded_chat = ChatFormat.load(self._settings.tokenizer_path)
        return self._loaded_chat

    def _build(self) -> Env:
        return registry.load(self._settings.environment, self._settings.options)


async def _close_quietly(env: Env) -> None:
    """A broken environment may fail to close or hang; its fault is already reported."""
    try:
        await asyncio.wait_for(env.close(), timeout=5.0)
    except Exception:  # noqa: BLE001 plugin code, at the same boundary as play_episode
        return
