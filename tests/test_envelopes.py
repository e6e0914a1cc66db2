"""Mailbox and post office against each other on one event loop: nothing lost, few envelopes."""

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from loopwright.actors.engine import Completion, EngineError, FinishReason, GenerateRequest
from loopwright.actors.envelopes import Answer, Envelope, Mailbox, PostOffice
from loopwright.actors.episode import EngineLost


def request(number: int) -> GenerateRequest:
    """Request `number`."""
    return GenerateRequest(
        request_id=f"r{number}",
        session="s",
        prompt_ids=np.array([number], np.int32),
        max_new_tokens=1,
        stop_token_ids=(),
        seed=number,
    )


def completion(number: int) -> Completion:
    """The answer to request `number`: one token, its number."""
    return Completion(
        request_id=f"r{number}",
        token_ids=np.array([number], np.int32),
        logprobs=np.zeros(1, np.float32),
        versions=np.zeros(1, np.int32),
        finish_reason=FinishReason.LENGTH,
    )


class Steps:
    """An engine that ends, at each step, whichever of its requests chance picks."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._running: dict[str, asyncio.Future[Completion]] = {}
        self.cancelled: list[str] = []
        self.lost = False
        self.envelopes = 0
        self.office = PostOffice(self._serve, self._cancel)

    async def exchange(self, envelope: Envelope) -> list[Answer]:
        """What crosses the process boundary."""
        self.envelopes += 1
        if self.lost:
            raise EngineLost("gone")
        return await self.office.exchange(envelope)

    async def _serve(self, wanted: GenerateRequest) -> Completion:
        if wanted.seed < 0:
            raise EngineError("the prompt does not fit")
        future = asyncio.get_running_loop().create_future()
        self._running[wanted.request_id] = future
        try:
            return await future
        finally:
            self._running.pop(wanted.request_id, None)

    async def _cancel(self, request_id: str) -> bool:
        self.cancelled.append(request_id)
        return request_id in self._running

    async def step(self) -> None:
        """End some of what runs."""
        for request_id, future in list(self._running.items()):
            if not future.done() and self._chance.random() < 0.5:
                future.set_result(completion(int(request_id[1:])))
        await asyncio.sleep(0.001)

    async def run(self) -> None:
        """Step for ever."""
        while True:
            await self.step()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """With an end."""

    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scenario

    asyncio.run(bounded())


@pytest.mark.parametrize("seed", range(3))
def test_every_request_gets_its_own_answer_in_few_envelopes(seed: int) -> None:
    async def scenario() -> None:
        engine = Steps(seed)
        mailboxes = [Mailbox(engine.exchange) for _ in range(2)]
        running = asyncio.create_task(engine.run())

        async def episode(number: int) -> None:
            for turn in range(5):
                asked = number * 100 + turn
                answer = await mailboxes[number % 2].generate(request(asked))
                assert answer.token_ids.tolist() == [asked]

        await asyncio.gather(*(episode(n) for n in range(40)))
        assert engine.envelopes < 40 * 5 * 0.75, "many turns to an envelope"
        running.cancel()

    run(scenario())


def test_a_refusal_reaches_its_caller_alone() -> None:
    async def scenario() -> None:
        engine = Steps(0)
        mailbox = Mailbox(engine.exchange)
        running = asyncio.create_task(engine.run())
        good = asyncio.create_task(mailbox.generate(request(1)))
        with pytest.raises(EngineError, match="the prompt does not fit"):
            await mailbox.generate(request(-1))
        assert (await good).token_ids.tolist() == [1]
        running.cancel()

    run(scenario())


def test_a_lost_engine_is_told_to_all_who_wait_and_a_new_one_serves() -> None:
    async def scenario() -> None:
        engine = Steps(0)
        mailbox = Mailbox(engine.exchange)
        waiting = [asyncio.create_task(mailbox.generate(request(n))) for n in range(5)]
        while not engine.envelopes:
            await asyncio.sleep(0)
        engine.lost = True
        waiting.append(asyncio.create_task(mailbox.generate(request(7))))
        for one in waiting:
            with pytest.raises(EngineLost, match="gone"):
                await one
        engine.lost = False
        running = asyncio.create_task(engine.run())
        assert (await mailbox.generate(request(8))).token_ids.tolist() == [8]
        running.cancel()

    run(scenario())


def test_a_caller_that_goes_away_takes_its_request_along() -> None:
    async def scenario() -> None:
        engine = Steps(0)
        mailbox = Mailbox(engine.exchange)
        going, staying = (asyncio.create_task(mailbox.generate(request(n))) for n in (1, 2))
        while not engine.envelopes:
            await asyncio.sleep(0)
        going.cancel()
        running = asyncio.create_task(engine.run())
        assert (await staying).token_ids.tolist() == [2]
        while not engine.cancelled:
            await asyncio.sleep(0)
        assert engine.cancelled == ["r1"]
        running.cancel()

    run(scenario())


def test_two_envelopes_that_come_home_at_once_do_not_leave_a_request_behind() -> None:
    async def scenario() -> None:
        at_engine: list[asyncio.Future[list[Answer]]] = []

        async def exchange(envelope: Envelope) -> list[Answer]:
            at_engine.append(asyncio.get_running_loop().create_future())
            return await at_engine[-1]

        async def sent(count: int) -> None:
            while len(at_engine) < count:
                await asyncio.sleep(0)

        mailbox = Mailbox(exchange)
        first = asyncio.create_task(mailbox.generate(request(1)))
        await sent(1)
        second = asyncio.create_task(mailbox.generate(request(2)))
        await sent(2)
        at_engine[0].set_result([completion(1)])
        at_engine[1].set_result([])
        assert (await first).token_ids.tolist() == [1]
        await sent(3)  # it fetches the other answer
        at_engine[2].set_result([completion(2)])
        assert (await second).token_ids.tolist() == [2]

    run(scenario())
