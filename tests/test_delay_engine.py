"""The simulated engine keeps the promises of `Engine` that the loop lives on."""

import asyncio
from typing import Any

import numpy as np

from loopwright.actors.delay_engine import DelayEngine, Delays
from loopwright.actors.engine import EngineSettings, FinishReason, GenerateRequest
from loopwright.actors.weights import WeightManifest

DELAYS: dict[str, Any] = {"token_s": 0.002, "mean_tokens": 20}


def engine(**options: Any) -> DelayEngine:
    """With two slots."""
    return DelayEngine(
        EngineSettings(
            model_path="none", max_concurrency=2, max_context=300, options=DELAYS | options
        )
    )


def request(number: int, **fields: Any) -> GenerateRequest:
    """Request `number`."""
    given: dict[str, Any] = {"max_new_tokens": 200, "seed": number, "priority": number}
    return GenerateRequest(
        request_id=f"r{number}",
        session="s",
        prompt_ids=np.zeros(4, np.int32),
        stop_token_ids=(7,),
        **(given | fields),
    )


def published(version: int) -> WeightManifest:
    """No weights."""
    return WeightManifest(
        version=version,
        kind="full",
        segment="none",
        names=(),
        shapes=(),
        dtypes=(),
        offsets=(),
        checksums=(),
        size_bytes=0,
    )


async def _running(held: DelayEngine, count: int) -> None:
    while (await held.stats()).running < count:
        await asyncio.sleep(0)


def test_a_turn_takes_its_tokens_and_ends_with_a_stop() -> None:
    async def scenario() -> None:
        held = engine()
        await held.start()
        before = asyncio.get_running_loop().time()
        completion = await held.generate(request(1))
        assert asyncio.get_running_loop().time() - before >= 20 * 0.002
        assert completion.finish_reason is FinishReason.STOP
        assert completion.token_ids.tolist() == [5] * 19 + [7]
        cut = await held.generate(request(2, max_new_tokens=5))
        assert cut.finish_reason is FinishReason.LENGTH and len(cut.token_ids) == 5

    asyncio.run(scenario())


def test_an_update_divides_a_turn_into_versions_and_sleep_holds_new_ones() -> None:
    async def scenario() -> None:
        held = engine(mean_tokens=50)
        await held.start()
        turn = asyncio.create_task(held.generate(request(1)))
        await _running(held, 1)
        await asyncio.sleep(0.02)
        await held.sleep()
        later = asyncio.create_task(held.generate(request(2)))
        await asyncio.sleep(0)
        assert (await held.stats()).running == 1
        await held.update_weights(published(3), "continue")
        versions = (await turn).versions.tolist()
        assert versions == sorted(versions) and set(versions) == {0, 3} and len(versions) == 50
        assert set((await later).versions.tolist()) == {3}

    asyncio.run(scenario())


def test_slots_go_to_the_oldest_and_cancelling_keeps_what_was_said() -> None:
    async def scenario() -> None:
        held = engine(mean_tokens=200)
        await held.start()
        turns = {n: asyncio.create_task(held.generate(request(n))) for n in (0, 1, 9, 4)}
        await _running(held, 2)
        assert (await held.stats()).waiting == 2
        await asyncio.sleep(0.02)
        assert await held.cancel("r0")
        first = await turns[0]
        assert first.finish_reason is FinishReason.CANCELLED and 1 <= len(first.token_ids) < 200
        await _running(held, 2)
        assert await held.cancel("r4") and not await held.cancel("r9"), "r4 went first"
        assert await held.cancel("r1")
        await asyncio.gather(turns[1], turns[4])
        turns[9].cancel()

    asyncio.run(scenario())


def test_lengths_are_of_the_seed_and_spread_as_asked() -> None:
    delays = Delays(mean_tokens=100, cv=1.0)
    lengths = np.array([delays.length(seed) for seed in range(4000)])
    assert lengths.tolist() == [delays.length(seed) for seed in range(4000)]
    assert abs(lengths.mean() / 100 - 1) < 0.06
    assert abs(lengths.std() / lengths.mean() - 1) < 0.15
    resumed = request(11, sampled=delays.length(11) - 3)
    assert delays.turn_tokens(resumed) == 3
