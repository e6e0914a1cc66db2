"""Environment worker: many episodes at once on one event loop, each with an environment instance of
its own.

An episode outlives its engine. When that is lost, `play` returns `Parked`: the episode waits here,
with all its tokens, until `go_on` names the engine to continue on. It outlives this process too,
where its world is deterministic: whoever is ordered to play it next finds its turns on record.
"""

import asyncio
import contextlib
import gc
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loopwright.actors.engine import Completion, EngineError, GenerateRequest
from loopwright.actors.episode import (
    EngineLost,
    EpisodeLimits,
    Generate,
    Progress,
    play_episode,
)
from loopwright.actors.episode_record import EpisodeRecord, EpisodeRecords
from loopwright.actors.memory_watch import MemoryWatch
from loopwright.actors.model_identity import ModelIdentity, model_identity
from loopwright.algorithms.records import Rollout, encode
from loopwright.envs import registry
from loopwright.envs.protocol import Env, decode_task

# transformers is imported where the tokenizer is loaded, in the worker's own process
if TYPE_CHECKING:
    from loopwright.actors.chat import ChatFormat

_PARKED_S = 1800.0  # nobody names another engine for so long: the episode is given up
_TAKE_BACK_S = 5.0  # for an engine to hand out what it has of a turn
_REQUESTS_A_LIFE = 1000  # an engine may still serve what a lost worker asked for: other names


class EngineClient(Protocol):
    """A rollout actor, as seen from here."""

    async def __call__(self, request: GenerateRequest) -> Completion:
        """One completion. Raises `EngineLost` when the actor is gone or not yet serving."""
        ...

    async def cancel(self, request_id: str) -> bool:
        """End a request early: it is answered with what there is."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How to build an environment worker."""

    environment: str  # name in the registry, `module:Class`, or `path.py:Class`
    options: Mapping[str, Any]
    tokenizer_path: str
    memory_share: float = 0.0  # of the machine's, that it and its environments may hold; 0: any
    # where what its episodes have so far is kept for whoever plays them next; empty: nowhere
    records: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeOrder:
    """One episode to play."""

    key: str  # of this playing of it, among all that the worker plays
    life: int = 0  # how many workers were lost while they played it
    task: bytes  # `encode_task`
    attempt: int
    engine: int  # number of the one that serves all its turns: its prefix stays cached there
    seed: int
    priority: int
    limits: EpisodeLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked:
    """The episode's engine is lost; it waits for `go_on`, and nothing it has is lost."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The episode was taken back; how far it had come."""

    turns: int
    tokens: int
    seconds: float


class WorkerLost(Exception):
    """This process was restarted: it does not know who generates, or the episode asked for."""


@dataclass(slots=True, eq=False)
class _Playing:
    """An episode under way."""

    client: EngineClient
    started: float = field(default_factory=time.monotonic)
    progress: Progress = field(default_factory=Progress)
    parked: "asyncio.Event" = field(default_factory=asyncio.Event)
    why: str = ""  # it is parked
    seat: "asyncio.Future[EngineClient] | None" = None
    task: "asyncio.Task[Rollout] | None" = None

    async def another(self, why: str) -> Generate:
        """Park until `go_on`."""
        self.seat = asyncio.get_running_loop().create_future()
        self.why = why
        self.parked.set()
        async with asyncio.timeout(_PARKED_S):
            self.client = await self.seat
        return self.client

    def cut(self) -> Cut:
        """How far it has come."""
        p = self.progress
        seconds = time.monotonic() - self.started
        return Cut(turns=p.turns, tokens=p.tokens, seconds=seconds)


class EnvWorker:
    """Plays episodes. Environment instances are kept and reused; a faulted one is thrown away."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        folder = settings.records
        self._records = EpisodeRecords(Path(folder)) if folder else None
        self._engines: dict[int, EngineClient] = {}  # by number
        self._loaded_chat: ChatFormat | None = None
        # By what they played last: that may hold a process or a connection for its next task.
        self._idle: dict[str, list[Env]] = defaultdict(list)
        self._playing: dict[str, _Playing] = {}
        self._played = 0
        self._memory = MemoryWatch(settings.environment, settings.memory_share)

    async def start(self, engines: Mapping[int, EngineClient]) -> int:
        """Load the tokenizer, build one environment, learn who generates (rollout actors by
        number); the process id."""
        self._chat()
        if not self._idle:
            env = self._build()
            self._idle[env.spec.name].append(env)
        self._engines = dict(engines)
        gc.freeze()  # a full collection of all that was imported stops every episode for 0.3 s
        return os.getpid()

    async def meet(self, engines: Mapping[int, EngineClient]) -> None:
        """These rollout actors generate too from now on. Raises `WorkerLost` before `start`."""
        if not self._engines:
            raise WorkerLost("restarted, and not started yet")
        self._engines.update(engines)

    async def play(self, order: EpisodeOrder) -> bytes | Parked | Cut:
        """Play one episode; the encoded `Rollout`, also when the infrastructure failed. Raises
        `TaskError`, and `WorkerLost` before `start`."""
        playing = _Playing(self._client(order.engine))
        playing.progress.requests = _REQUESTS_A_LIFE * order.life
        playing.task = asyncio.create_task(self._rollout(order, playing))
        self._playing[order.key] = playing
        return await self._outcome(order.key, playing)

    async def go_on(self, key: str, engine: int) -> bytes | Parked | Cut:
        """Continue a parked episode on another engine; as `play`."""
        playing = self._known(key)
        if playing.seat is None or playing.seat.done():
            raise WorkerLost(f"episode {key} does not wait for an engine")
        client = self._client(engine)
        playing.parked.clear()
        playing.seat.set_result(client)
        return await self._outcome(key, playing)

    async def take_back(self, key: str) -> Cut | None:
        """End an episode early; how far it had come, or None if it is over already. Whoever waits
        in `play` or `go_on` gets the same."""
        playing = self._playing.get(key)
        if playing is None or playing.task is None:
            return None
        playing.progress.taken_back = True
        if playing.progress.request_id:
            with contextlib.suppress(EngineLost, EngineError, TimeoutError):
                async with asyncio.timeout(_TAKE_BACK_S):
                    await playing.client.cancel(playing.progress.request_id)
                    await asyncio.wait([playing.task])
        playing.task.cancel()
        await asyncio.wait([playing.task], timeout=_TAKE_BACK_S)
        self._playing.pop(key, None)
        return playing.cut()

    async def identity(self) -> ModelIdentity:
        """The tokenizer it plays with."""
        return await asyncio.to_thread(model_identity, self._settings.tokenizer_path)

    async def ping(self) -> dict[str, Any]:
        """Proof of life: process id, counters, and the `Footprint` if memory is watched."""
        return {
            "pid": os.getpid(),
            "playing": len(self._playing),
            "played": self._played,
            "memory": self._memory.newest(),
        }

    async def close(self) -> None:
        """Close every idle environment."""
        for env in (env for idle in self._idle.values() for env in idle):
            await _close_quietly(env)
        self._idle.clear()

    async def _outcome(self, key: str, playing: _Playing) -> bytes | Parked | Cut:
        """Wait until the episode is over, or has to wait for an engine."""
        task = playing.task
        assert task is not None
        parked = asyncio.create_task(playing.parked.wait())
        try:
            await asyncio.wait([task, parked], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                return Parked(why=playing.why)
            self._playing.pop(key, None)
            if playing.progress.taken_back:
                return playing.cut()
            return encode(task.result())
        except asyncio.CancelledError:  # the caller does not wait any more
            task.cancel()
            raise
        finally:
            parked.cancel()

    async def _rollout(self, order: EpisodeOrder, playing: _Playing) -> Rollout:
        task = decode_task(order.task)
        env, reusable = self._take(task.environment), False
        record = self._record(order, env)
        try:
            rollout = await play_episode(
                env,
                task,
                order.attempt,
                playing.client,
                self._chat(),
                order.limits,
                seed=order.seed,
                priority=order.priority,
                another=playing.another,
                progress=playing.progress,
                record=record,
            )
            reusable = not rollout.fault
            self._played += 1
            return rollout
        finally:
            if record is not None:
                record.close()
            if reusable:
                self._idle[task.environment].append(env)
            else:
                await _close_quietly(env)

    def _client(self, engine: int) -> EngineClient:
        if engine not in self._engines:
            missing = f"it does not know rollout {engine}" if self._engines else "not started yet"
            raise WorkerLost(f"restarted, and {missing}")
        return self._engines[engine]

    def _record(self, order: EpisodeOrder, env: Env) -> EpisodeRecord | None:
        """None where a world cannot be brought back to where it was."""
        if self._records is None or not env.spec.deterministic:
            return None
        return self._records.open(order.key, order.life)

    def _known(self, key: str) -> _Playing:
        if key not in self._playing:
            raise WorkerLost(f"restarted: it does not know episode {key}")
        return self._playing[key]

    def _chat(self) -> "ChatFormat":
        from loopwright.actors.chat import ChatFormat

        if self._loaded_chat is None:
            self._loaded_chat = ChatFormat.load(self._settings.tokenizer_path)
        return self._loaded_chat

    def _take(self, environment: str) -> Env:
        """An idle instance, best the one that played this environment last; or a new one."""
        idle = self._idle[environment] or max(self._idle.values(), key=len)
        return idle.pop() if idle else self._build()

    def _build(self) -> Env:
        return registry.load(self._settings.environment, self._settings.options)


async def _close_quietly(env: Env) -> None:
    """A broken environment may fail to close or hang; its fault is already reported."""
    try:
        await asyncio.wait_for(env.close(), timeout=5.0)
    except Exception:  # noqa: BLE001 plugin code, at the same boundary as play_episode
        return
