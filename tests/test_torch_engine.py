"""The torch engine: the shared conformance suite, and what only it promises."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loopwright.actors.engine import (
    Completion,
    EngineError,
    EngineSettings,
    FinishReason,
    GenerateRequest,
)
from loopwright.actors.shared_memory import SharedWeights
from loopwright.actors.torch_engine import TorchEngine
from tests.adapter_conformance import check_adapters
from tests.engine_conformance import (
    VOCAB,
    EngineBench,
    EngineConformance,
    build_model,
    prompts,
    reference_logprobs,
)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineBench]:
    folder = tmp_path_factory.mktemp("model")
    with EngineBench(TorchEngine, folder, tied=request.param) as bench:
        yield bench


class TestTorchEngine(EngineConformance):
    """The shared suite."""

    resumes_exactly = True


@pytest.mark.parametrize(
    ("carrier", "kind"), [("shared_memory", "lora"), ("collective", "lora"), ("collective", "dora")]
)
def test_adapters_are_added_to_a_base_that_came_once(
    tmp_path: Path, carrier: str, kind: str
) -> None:
    with EngineBench(TorchEngine, tmp_path, tied=True, lora_rank=4) as bench:
        check_adapters(bench, 1e-4, carrier, kind)


SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
    "initializer_range": 0.12,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=1)),
    "llama-biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, num_key_value_heads=4, attention_bias=True, mlp_bias=True)
    ),
    "llama3-rope": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE)
    ),
    "linear-rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SHAPE, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        )
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=None)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2)),
    "qwen3-wide-heads": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=40, attention_bias=True)
    ),
}


def save(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model in eval mode, its biases and norms made random too, saved to `folder`."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(folder)
    return model


@asynccontextmanager
async def started(folder: Path, **settings: Any) -> AsyncIterator[TorchEngine]:
    """A running engine on the model in `folder`."""
    defaults: dict[str, Any] = {"max_concurrency": 8, "max_context": 256}
    engine = TorchEngine(EngineSettings(model_path=str(folder), **{**defaults, **settings}))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def ask(number: int, prompt: np.ndarray, **fields: Any) -> GenerateRequest:
    """A request with an id, session and seed made of `number`."""
    defaults: dict[str, Any] = {
        "request_id": f"r{number}",
        "session": f"s{number}",
        "max_new_tokens": 8,
        "stop_token_ids": (),
        "seed": number,
    }
    return GenerateRequest(prompt_ids=prompt, **{**defaults, **fields})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return save(build_model(7, tied=True), folder), folder


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_supported_architecture_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = save(ARCHITECTURES[name](), tmp_path)

    async def check() -> None:
        async with started(tmp_path) as engine:
            asked = [ask(i, p) for i, p in enumerate(prompts(1, [3, 90, 150]))]
            for request, done in zip(asked, await gather(engine, asked), strict=True):
                expected = reference_logprobs(model, request.prompt_ids, done.token_ids)
                np.testing.assert_allclose(done.logprobs, expected, atol=1e-4, rtol=0)

    asyncio.run(check())


async def gather(engine: TorchEngine, requests: Sequence[GenerateRequest]) -> list[Completion]:
    """Serve the requests together."""
    return list(await asyncio.gather(*(engine.generate(r) for r in requests)))


def test_other_architectures_are_refused_with_a_remedy(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCAB, n_positions=64)
    save(GPT2LMHeadModel(config), tmp_path)
    with pytest.raises(EngineError, match=r'GPT2LMHeadModel.*Qwen3ForCausalLM.*engine = "vllm"'):
        asyncio.run(TorchEngine(EngineSettings(model_path=str(tmp_path))).start())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dtype": "int8"}, "int8"),
        ({"options": {"speed": 11}}, "speed"),
        ({"max_context": 5000}, "max_position_embeddings"),
    ],
)
def test_bad_settings_are_refused(
    tiny: tuple[PreTrainedModel, Path], settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(EngineError, match=named):
        asyncio.run(TorchEngine(EngineSettings(model_path=str(tiny[1]), **settings)).start())


def test_a_missing_model_is_named() -> None:
    with pytest.raises(EngineError, match="/nowhere/at/all"):
        asyncio.run(TorchEngine(EngineSettings(model_path="/nowhere/at/all")).start())


def test_lower_priority_numbers_go_first(tiny: tuple[PreTrainedModel, Path]) -> None:
    ended: list[str] = []

    async def check() -> None:
        async with started(tiny[1], max_concurrency=1, max_context=1000) as engine:

            async def serve(request: GenerateRequest) -> None:
                await engine.generate(request)
                ended.append(request.request_id)

            every = prompts(2, [5] * 5)
            first = asyncio.create_task(serve(ask(0, every[0], max_new_tokens=900, priority=9)))
            while not (await engine.stats()).running:
                await asyncio.sleep(0.001)
            numbers = ((1, 5), (2, 1), (3, 5), (4, 0))
            await asyncio.gather(
                first, *(serve(ask(n, every[n], priority=priority)) for n, priority in numbers)
            )

    asyncio.run(check())
    assert ended == ["r0", "r4", "r2", "r1", "r3"]


def test_a_sessions_next_turn_prefills_only_what_is_new(
    tiny: tuple[PreTrainedModel, Path],
) -> None:
    async def check() -> None:
        async with started(tiny[1]) as engine:
            first = ask(0, prompts(3, [100])[0])
            done = await engine.generate(first)
            before = await engine.stats()
            longer = np.concatenate((first.prompt_ids, done.token_ids, prompts(4, [10])[0]))
            await engine.generate(ask(1, longer, session=first.session))
            after = await engine.stats()
            kept = len(first.prompt_ids) + len(done.token_ids) - 1  # the last token has no KV yet
            assert after.cached_prefix_tokens - before.cached_prefix_tokens == kept
            assert after.prefill_tokens - before.prefill_tokens == len(longer) - kept

    asyncio.run(check())


def test_rollouts_of_a_group_prefill_their_prompt_once(tiny: tuple[PreTrainedModel, Path]) -> None:
    model, folder = tiny
    prompt = prompts(5, [120])[0]

    async def check() -> None:
        async with started(folder) as engine:
            asked = [ask(i, prompt, max_new_tokens=100) for i in range(8)]
            for done in await gather(engine, asked):
                expected = reference_logprobs(model, prompt, done.token_ids)
                np.testing.assert_allclose(done.logprobs, expected, atol=1e-4, rtol=0)
            assert (await engine.stats()).cached_prefix_tokens == 7 * (len(prompt) - 1)

    asyncio.run(check())


def test_little_kv_memory_slows_but_never_corrupts(tiny: tuple[PreTrainedModel, Path]) -> None:
    model, folder = tiny
    token_bytes = 2 * 2 * 2 * 32 * 4  # keys and values, layers, KV heads, head_dim, float32

    async def check() -> None:
        async with started(folder, kv_bytes=250 * token_bytes) as engine:
            lengths = [40, 90, 10, 120, 70, 33, 5, 60, 100, 20]
            contexts, sessions = prompts(6, lengths), range(len(lengths))
            for turn in range(3):
                asked = [
                    ask(100 * turn + i, contexts[i], session=f"s{i}", max_new_tokens=4 + i)
                    for i in sessions
                ]
                for i, done in enumerate(await gather(engine, asked)):
                    expected = reference_logprobs(model, contexts[i], done.token_ids)
                    np.testing.assert_allclose(done.logprobs, expected, atol=1e-4, rtol=0)
                    contexts[i] = np.concatenate((contexts[i], done.token_ids))
            assert 0 < (await engine.stats()).kv_waits <= 3 * len(lengths), "each is counted once"
            with pytest.raises(EngineError, match="Raise kv_bytes"):
                await engine.generate(ask(999, prompts(7, [240])[0], max_new_tokens=16))

    asyncio.run(check())


def test_published_weights_are_served_where_they_lie(tiny: tuple[PreTrainedModel, Path]) -> None:
    async def check() -> None:
        model = build_model(8, tied=True)
        writer = SharedWeights.create("test-in-place", model.state_dict())
        try:
            async with started(tiny[1]) as engine:
                manifest = writer.write(1, model.state_dict())
                await engine.update_weights(manifest, "continue")
                maps = Path("/proc/self/maps").read_text()
                assert sum(writer.segment in line for line in maps.splitlines()) == 2
        finally:
            writer.close()

    asyncio.run(check())


def test_diverged_weights_fail_requests_and_a_good_publish_recovers(
    tiny: tuple[PreTrainedModel, Path],
) -> None:
    async def check() -> None:
        model = build_model(8, tied=True)
        tensors = model.state_dict()
        broken = {name: torch.full_like(value, torch.nan) for name, value in tensors.items()}
        writer = SharedWeights.create("test-diverged", tensors)
        try:
            async with started(tiny[1]) as engine:
                request = ask(0, prompts(8, [20])[0])
                await engine.update_weights(writer.write(1, broken), "continue")
                with pytest.raises(EngineError, match="not finite under policy version 1"):
                    await engine.generate(request)
                await engine.update_weights(writer.write(2, tensors), "finish")
                # The first takes the slot where NaNs lay, the second has it read beyond its end.
                asked = [ask(i, p) for i, p in enumerate(prompts(8, [5, 30]))]
                for request, done in zip(asked, await gather(engine, asked), strict=True):
                    expected = reference_logprobs(model, request.prompt_ids, done.token_ids)
                    np.testing.assert_allclose(done.logprobs, expected, atol=1e-4, rtol=0)
        finally:
            writer.close()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda t: t.update(surplus=torch.zeros(1)), "unknown: surplus"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"misshapen: .* \[3\]"),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_another_models_weights_are_refused(
    tiny: tuple[PreTrainedModel, Path], change: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    tensors = dict(build_model(9, tied=True).state_dict())
    change(tensors)
    writer = SharedWeights.create("test-other", tensors)

    async def check() -> None:
        async with started(tiny[1]) as engine:
            with pytest.raises(EngineError, match=named):
                await engine.update_weights(writer.write(1, tensors), "continue")
            assert (await engine.stats()).version == 0

    try:
        asyncio.run(check())
    finally:
        writer.close()


def test_requests_that_cannot_be_served_are_refused(tiny: tuple[PreTrainedModel, Path]) -> None:
    async def check() -> None:
        async with started(tiny[1]) as engine:
            prompt = prompts(9, [4])[0]
            for bad, named in (
                (ask(0, np.array([VOCAB], np.int32)), "vocabulary is 0 to 127"),
                (ask(1, prompt, max_new_tokens=0), "max_new_tokens 0"),
                (ask(2, prompt, temperature=-1.0), r"temperature -1\.0"),
            ):
                with pytest.raises(EngineError, match=named):
                    await engine.generate(bad)
            twice = [engine.generate(ask(3, prompt)) for _ in range(2)]
            first, second = await asyncio.gather(*twice, return_exceptions=True)
            assert isinstance(first, Completion)
            assert isinstance(second, EngineError) and "r3" in str(second)

    asyncio.run(check())


def test_a_caller_that_goes_away_frees_its_slot(tiny: tuple[PreTrainedModel, Path]) -> None:
    async def check() -> None:
        async with started(tiny[1], max_concurrency=1, max_context=1000) as engine:
            prompt = prompts(10, [4])[0]
            long = asyncio.create_task(engine.generate(ask(0, prompt, max_new_tokens=900)))
            queued = asyncio.create_task(engine.generate(ask(1, prompt, max_new_tokens=900)))
            while not (await engine.stats()).generated_tokens:
                await asyncio.sleep(0.001)
            long.cancel()
            assert await engine.cancel("r1")  # waiting, so it has nothing
            waiting = await queued
            done = await engine.generate(ask(2, prompt))
            stats = await engine.stats()
            assert waiting.finish_reason is FinishReason.CANCELLED
            assert (stats.running, stats.waiting, len(done.token_ids)) == (0, 0, 8)
            assert long.cancelled() and stats.generated_tokens < 900

    asyncio.run(check())


def test_closing_fails_what_is_pending(tiny: tuple[PreTrainedModel, Path]) -> None:
    async def check() -> None:
        async with started(tiny[1], max_concurrency=1, max_context=1000) as engine:
            prompt = prompts(11, [4])[0]
            turns = [
                asyncio.create_task(engine.generate(ask(i, prompt, max_new_tokens=900)))
                for i in range(3)
            ]
            await engine.cancel("nobody")  # by then the turns are in the inbox before it
            await engine.close()
            for turn in turns:
                with pytest.raises(EngineError, match="closed"):
                    await turn
            with pytest.raises(EngineError, match="not started, or closed"):
                await engine.generate(ask(9, prompt))
            await engine.close()

    asyncio.run(check())
