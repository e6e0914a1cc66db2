"""A pool over scripted actors, and what tests of it need: answers, rollouts, events."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import numpy as np

from loopwright.actors.engine import EngineStats, UpdateReport
from loopwright.actors.env_worker import EpisodeOrder
from loopwright.actors.episode import EpisodeLimits
from loopwright.actors.weights import WeightManifest
from loopwright.algorithms.records import Context, EndReason, Outcome, Rollout, encode
from loopwright.envs.protocol import decode_task
from loopwright.orchestrator.faults import RestartBudget
from loopwright.orchestrator.membership import Deadlines
from loopwright.orchestrator.pool import FaultLimits, Pool
from tests.scripted import TASK, ScriptedActor

LIMITS = EpisodeLimits(max_turns=2, max_new_tokens=4, max_context=64, timeout_s=5, temperature=1.0)
Play = Callable[[EpisodeOrder], Any]


def manifest(version: int) -> WeightManifest:
    """Two tensors whose checksums depend on the version."""
    return WeightManifest(
        version=version,
        kind="full",
        segment="s",
        names=("a", "b"),
        shapes=((1,), (1,)),
        dtypes=("float32", "float32"),
        offsets=(0, 64),
        checksums=(version, version + 100),
        size_bytes=128,
    )


def acknowledged(published: WeightManifest, _on_update: str) -> UpdateReport:
    """What an engine answers that took the weights."""
    checksums = dict(zip(published.names, published.checksums, strict=True))
    return UpdateReport(version=published.version, checksums=checksums, pause_s=0, seconds=0)


def rollout_of(order: EpisodeOrder, fault: str = "") -> bytes:
    """The episode that was ordered, well played or ended by a fault."""
    one = Context(
        token_ids=np.zeros(2, np.int32),
        action_mask=np.array([False, True]),
        behavior_logprobs=np.zeros(2, np.float32),
        policy_versions=np.array([-1, 0], np.int32),
        turn_ids=np.array([-1, 0], np.int16),
    )
    return encode(
        Rollout(
            task_id=decode_task(order.task).id,
            environment="scripted",
            environment_version="1",
            scenario="s",
            attempt=order.attempt,
            contexts=() if fault else (one,),
            reward=0.0 if fault else 1.0,
            success=not fault,
            end_reason=EndReason.ERROR if fault else EndReason.DONE,
            outcome=Outcome.INFRA_FAULT if fault else Outcome.SCORED,
            turns=1,
            fault=fault,
        )
    )


def engine(index: int = 0, **answers: Any) -> ScriptedActor:
    """An engine that does all it is asked; `answers` replace some of that."""
    stats = EngineStats(
        version=0,
        running=0,
        waiting=0,
        generated_tokens=0,
        prefill_tokens=0,
        cached_prefix_tokens=0,
        busy_s=0.0,
        uptime_s=1.0,
    )
    usual: dict[str, Any] = {
        "start": lambda: 100 + index,
        "update": acknowledged,
        "ping": lambda: stats,
        "retire": lambda: 0,
        "close": lambda: None,
    }
    return ScriptedActor(name=f"rollout {index}", answers=usual | answers)


def worker(index: int = 0, play: Play = rollout_of, **answers: Any) -> ScriptedActor:
    """A worker that plays every episode well, or as `play` says."""
    usual: dict[str, Any] = {
        "start": lambda clients: 200 + index,
        "meet": lambda clients: None,
        "close": lambda: None,
        "play": play,
        "ping": lambda: {"pid": 200 + index},
    }
    return ScriptedActor(name=f"environment worker {index}", answers=usual | answers)


def then(*answers: Any) -> Callable[..., Any]:
    """A method that answers with these in turn, the last one for ever; functions are called."""
    waiting = list(answers)

    def answer(*args: Any) -> Any:
        chosen = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        return chosen(*args) if callable(chosen) else chosen

    return answer


class Events:
    """Events of a pool, kept, and awaited by kind."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self._more = asyncio.Event()

    def __call__(self, kind: str, **fields: Any) -> None:
        self.seen.append((kind, fields))
        self._more.set()

    def count(self, kind: str) -> int:
        """How many of this kind there were."""
        return sum(k == kind for k, _ in self.seen)

    async def wait_for(self, kind: str) -> None:
        """Until one of this kind was seen."""
        while not self.count(kind):
            self._more.clear()
            await self._more.wait()


def pool_of(
    engines: list[ScriptedActor],
    workers: list[ScriptedActor],
    events: Events,
    *,
    restarts: int = 5,
    retries: int = 2,
    ping_every_s: float = 0.01,
    start_s: float = 5,
    most_episodes: int = 0,
    most_of: Mapping[str, int] | None = None,
) -> Pool:
    """A pool over scripted actors."""
    return Pool(
        list(engines),
        list(workers),
        deadlines=Deadlines(start_s=start_s, publish_s=5, ping_every_s=ping_every_s, hang_s=5),
        faults=FaultLimits(retries=retries, infra_fault_share=0.2),
        restarts=RestartBudget(restarts),
        on_update="continue",
        event=events,
        most_episodes=most_episodes,
        most_of=most_of,
    )


async def play(pool: Pool, attempt: int = 0) -> Rollout:
    """One episode."""
    rollout, _ = await pool.play(TASK, attempt, seed=9, priority=1, limits=LIMITS)
    return rollout


def run(test: Coroutine[Any, Any, None]) -> None:
    """A test's coroutine, with an end."""

    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(bounded())


def orders(actor: ScriptedActor) -> list[EpisodeOrder]:
    """The episodes that a worker was given."""
    return [args[0] for method, args in actor.calls if method == "play"]
