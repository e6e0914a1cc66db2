"""The environment worker with scripted engines: an episode parks, goes on, and is taken back."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopwright.actors.engine import Completion, FinishReason, GenerateRequest
from loopwright.actors.env_worker import (
    Cut,
    EnvWorker,
    EpisodeOrder,
    Parked,
    WorkerLost,
    WorkerSettings,
)
from loopwright.actors.episode import EngineLost, EpisodeLimits
from loopwright.actors.tiny_model import train_tokenizer
from loopwright.algorithms.records import Outcome, Rollout, decode
from loopwright.envs.conformance.held import descendants
from loopwright.envs.mix import Mix, specs
from loopwright.envs.protocol import Task, encode_task
from loopwright.envs.registry import load
from loopwright.orchestrator.members import Member, Seats
from tests.scripted import ScriptedActor

LIMITS = EpisodeLimits(
    max_turns=2, max_new_tokens=8, max_context=200, timeout_s=20, temperature=1.0
)
WORLD = f"{Path(__file__).parent / 'fault_envs.py'}:Letters"
TASK = Task(environment="letters", id="train-0-1", seed=1, split="train", scenario="letters")


class HeldEngine:
    """Hands out its tokens when it is let, when it is cancelled, or dies."""

    def __init__(self, tokens: int = 3) -> None:
        self.asked: list[GenerateRequest] = []
        self.began = asyncio.Event()
        self._tokens = tokens
        self._end: asyncio.Future[FinishReason] = asyncio.get_running_loop().create_future()

    async def __call__(self, request: GenerateRequest) -> Completion:
        self.asked.append(request)
        self.began.set()
        reason = await self._end
        size = self._tokens
        return Completion(
            request_id=request.request_id,
            token_ids=np.full(size, 5, np.int32),
            logprobs=np.zeros(size, np.float32),
            versions=np.zeros(size, np.int32),
            finish_reason=reason,
        )

    async def cancel(self, request_id: str) -> bool:
        assert request_id == self.asked[-1].request_id
        self._end.set_result(FinishReason.CANCELLED)
        return True

    def speak(self) -> None:
        """Let it answer."""
        self._end.set_result(FinishReason.STOP)

    def die(self) -> None:
        """Its process is gone."""
        self._end.set_exception(EngineLost("rollout 0: ActorDiedError"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["write 0 1 2 abc"] * 3, vocab_size=300).save_pretrained(folder)
    return str(folder)


def _order(key: str = "1") -> EpisodeOrder:
    return EpisodeOrder(
        key=key,
        task=encode_task(TASK),
        attempt=0,
        engine=0,
        seed=3,
        priority=0,
        limits=LIMITS,
    )


Scenario = Callable[[EnvWorker, HeldEngine, HeldEngine], Coroutine[Any, Any, None]]


def _run(tokenizer: str, scenario: Scenario) -> None:
    async def body() -> None:
        settings = WorkerSettings(environment=WORLD, options={}, tokenizer_path=tokenizer)
        worker, first, second = EnvWorker(settings), HeldEngine(), HeldEngine(2)
        await worker.start({0: first, 1: second})
        async with asyncio.timeout(20):
            await scenario(worker, first, second)
        assert (await worker.ping())["playing"] == 0
        await worker.close()

    asyncio.run(body())


def test_an_episode_parks_and_goes_on(tokenizer: str) -> None:
    async def scenario(worker: EnvWorker, first: HeldEngine, second: HeldEngine) -> None:
        playing = asyncio.create_task(worker.play(_order()))
        await first.began.wait()
        first.die()
        assert await playing == Parked(why="rollout 0: ActorDiedError")
        assert (await worker.ping())["playing"] == 1, "it waits, with its tokens"
        going_on = asyncio.create_task(worker.go_on("1", 1))
        await second.began.wait()
        assert second.asked[0].prompt_ids.tolist() == first.asked[0].prompt_ids.tolist()
        second.speak()
        outcome = await going_on
        assert isinstance(outcome, bytes)
        rollout: Rollout = decode(outcome)
        assert rollout.outcome is Outcome.SCORED and rollout.generated_tokens == 2

    _run(tokenizer, scenario)


def test_taken_back_in_a_turn_it_counts_what_the_engine_has(tokenizer: str) -> None:
    async def scenario(worker: EnvWorker, first: HeldEngine, _second: HeldEngine) -> None:
        playing = asyncio.create_task(worker.play(_order()))
        await first.began.wait()
        cut = await worker.take_back("1")
        told = await playing
        assert isinstance(cut, Cut) and isinstance(told, Cut)
        assert (cut.tokens, cut.turns) == (told.tokens, told.turns) == (3, 0)
        assert await worker.take_back("1") is None, "it is over"

    _run(tokenizer, scenario)


def test_taken_back_while_it_waits_for_an_engine(tokenizer: str) -> None:
    async def scenario(worker: EnvWorker, first: HeldEngine, _second: HeldEngine) -> None:
        playing = asyncio.create_task(worker.play(_order()))
        await first.began.wait()
        first.die()
        assert isinstance(await playing, Parked)
        cut = await worker.take_back("1")
        assert cut is not None and cut.tokens == 0
        assert not first.asked[1:], "nobody is asked to cancel what is lost"
        with pytest.raises(WorkerLost, match="does not know episode 1"):
            await worker.go_on("1", 1)

    _run(tokenizer, scenario)


def test_a_restarted_worker_says_so(tokenizer: str) -> None:
    async def body() -> None:
        settings = WorkerSettings(environment=WORLD, options={}, tokenizer_path=tokenizer)
        with pytest.raises(WorkerLost, match="not started yet"):
            await EnvWorker(settings).play(_order())

    asyncio.run(body())


class QuickEngine:
    """Answers every request at once, with one token."""

    async def __call__(self, request: GenerateRequest) -> Completion:
        await asyncio.sleep(0)
        return Completion(
            request_id=request.request_id,
            token_ids=np.array([5, request.stop_token_ids[0]], np.int32),
            logprobs=np.zeros(2, np.float32),
            versions=np.zeros(2, np.int32),
            finish_reason=FinishReason.STOP,
        )

    async def cancel(self, request_id: str) -> bool:
        return False


WORLDS = Path(__file__).parent / "plain_world.py"
MIX: dict[str, Any] = {
    "members": {
        "echo": {
            "environment": "process",
            "options": {"target": f"{WORLDS}:Echo", "processes": 2, "sessions": 2},
        },
        "letters": {"environment": WORLD},
    }
}


def test_a_mix_keeps_to_the_processes_that_its_member_may_have(tokenizer: str) -> None:
    """Two hundred episodes at once of two environments, one of which has two processes with two
    places each: idle instances of the mix keep none of them from the next episode."""

    others = set(descendants())

    async def body() -> None:
        env = load("mix", MIX)
        assert isinstance(env, Mix)
        most = {name: spec.max_concurrency for name, spec in specs(env).items()}
        assert most == {"echo": 4, "letters": 0}
        tasks = list(itertools.islice(env.tasks("train", 0), 200))
        await env.close()
        settings = WorkerSettings(environment="mix", options=MIX, tokenizer_path=tokenizer)
        worker = EnvWorker(settings)
        await worker.start({0: QuickEngine()})
        member = Member(ScriptedActor(name="worker", answers={}))
        member.ready.set()
        seats = Seats([member], most)

        async def one(number: int, task: Task) -> Rollout:
            await seats.take(number, task.environment)
            try:
                order = replace(_order(str(number)), task=encode_task(task))
                outcome = await worker.play(order)
                assert isinstance(outcome, bytes)
                return decode(outcome)
            finally:
                seats.leave(member, task.environment)

        rollouts = await asyncio.gather(*(one(n, task) for n, task in enumerate(tasks)))
        assert [r.fault for r in rollouts if r.fault] == []
        assert Counter(r.environment for r in rollouts).keys() == {"echo", "letters"}
        assert len(set(descendants()) - others) <= 2
        await worker.close()
        assert not set(descendants()) - others

    asyncio.run(body())


def test_a_mix_lets_go_of_what_another_member_held() -> None:
    others = set(descendants())

    async def body() -> None:
        env = load("mix", MIX)
        tasks = {t.environment: t for t in itertools.islice(env.tasks("train", 0), 20)}
        await env.close()
        await env.reset(tasks["echo"])
        assert len(set(descendants()) - others) == 1
        await env.reset(tasks["letters"])
        assert not set(descendants()) - others
        await env.close()

    asyncio.run(body())
