"""The torch engine's parts: sampling, the prefix cache, and a step that fails."""

import asyncio
import queue

import numpy as np
import pytest
import torch
from torch import Tensor

from loopwright.actors.decode_batch import DecodeBatch, sample
from loopwright.actors.engine import Completion, EngineError, GenerateRequest
from loopwright.actors.engine_thread import Command, EngineThread, Submit
from loopwright.actors.kv_slots import KeptPrefix, KVSlots, PrefixCache
from loopwright.actors.torch_model import LeanModel, StepInput
from tests.engine_conformance import build_model, prompts


class _BrokenModel(LeanModel):
    """A model whose forward pass fails, as it would for want of memory."""

    def forward(self, step: StepInput, kv: KVSlots, *, every: bool = False) -> Tensor:
        raise MemoryError(f"no room for {step.decoded} sequences")


def test_a_failing_step_fails_every_caller() -> None:
    model = _BrokenModel(build_model(7, tied=True), max_context=64, device="cpu")
    batch = DecodeBatch(model, max_concurrency=2, max_context=64, kv_bytes=1 << 20)

    async def check() -> None:
        loop, inbox = asyncio.get_running_loop(), queue.SimpleQueue[Command]()
        futures: list[asyncio.Future[Completion]] = [loop.create_future() for _ in range(4)]
        for number, future in enumerate(futures):
            request = GenerateRequest(
                request_id=f"r{number}",
                session=f"s{number}",
                prompt_ids=prompts(12, [4])[0],
                max_new_tokens=8,
                stop_token_ids=(),
                seed=number,
            )
            inbox.put(Submit(request, 8, future))
        thread = EngineThread(batch, inbox, loop, 1)
        thread.start()
        for future in futures:
            with pytest.raises(EngineError, match="MemoryError: no room for 2 sequences"):
                await asyncio.wait_for(future, 60)
        await asyncio.to_thread(thread.join)
        assert thread.failure is not None and thread.stats().version == 0

    asyncio.run(check())


def test_sampling_follows_the_distribution() -> None:
    n = 40_000
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, -torch.inf])
    temperatures = np.full(n, 0.8, np.float32)
    tokens, logprobs = sample(
        logits.repeat(n, 1),
        temperatures=temperatures,
        greedy=np.zeros(n, np.bool_),
        uniforms=(np.arange(n) + 0.5) / n,  # every quantile once
    )
    expected = torch.softmax(logits / 0.8, -1).numpy()
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / n, expected, atol=2 / n)
    np.testing.assert_allclose(np.exp(logprobs), expected[tokens], rtol=1e-5)


def test_the_prefix_cache_evicts_the_least_recently_used() -> None:
    cache = PrefixCache()
    tokens = np.arange(10, dtype=np.int32)
    for session in "abc":
        cache.keep(session, KeptPrefix(token_ids=tokens, kv=torch.zeros(25)))
    found = cache.find("a", np.array([0, 1, 2, 9], np.int32))
    assert found is not None and found[1] == 3
    cache.shrink(200)
    assert cache.size_bytes == 200
    assert cache.find("b", tokens) is None
    assert cache.find("a", tokens) is not None
    cache.clear()
    assert cache.find("a", tokens) is None and cache.size_bytes == 0


def test_a_turn_asked_for_again_is_computed_as_the_first_time_and_the_next_one_reuses_it() -> None:
    torch.set_num_threads(1)
    model = LeanModel(build_model(7, tied=True), max_context=64, device="cpu")
    batch = DecodeBatch(model, max_concurrency=1, max_context=64, kv_bytes=1 << 20)
    prompt = prompts(12, [20])[0]

    def ask(name: str, prompt_ids: np.ndarray) -> Completion:
        request = GenerateRequest(
            request_id=name,
            session="s",
            prompt_ids=prompt_ids,
            max_new_tokens=6,
            stop_token_ids=(),
            seed=3,
        )
        batch.add(request, 6)
        while True:
            for ended in batch.step():
                assert isinstance(ended.result, Completion)
                return ended.result

    with torch.inference_mode():
        first, again = ask("1", prompt), ask("2", prompt)
        assert batch.cached_prefix_tokens == 0
        assert first.token_ids.tolist() == again.token_ids.tolist()
        assert first.logprobs.tolist() == again.logprobs.tolist(), "to the bit"
        ask("3", np.concatenate([prompt, again.token_ids]))  # the rest of a turn asked for in parts
        assert batch.cached_prefix_tokens == 20 + 6 - 1
