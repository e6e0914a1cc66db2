"""What every engine must do: one suite, run by the tests of each engine.

A test module provides a `bench` fixture (module scope, since an engine may take long to start) and
subclasses `EngineConformance`:

    @pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
    def bench(request, tmp_path_factory):
        with EngineBench(MyEngine, tmp_path_factory.mktemp("model"), tied=request.param) as bench:
            yield bench

    class TestMyEngine(EngineConformance):
        tolerance = 1e-4

Every test starts from whatever weights the engine holds and leaves `bench.model` equal to them.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import numpy as np
import pytest
import torch

from loopwright.actors.channels.channel import open_channel
from loopwright.actors.channels.lowrank import Basis
from loopwright.actors.channels.settings import ChannelSettings
from loopwright.actors.engine import (
    Completion,
    Engine,
    EngineError,
    EngineSettings,
    EngineStats,
    FinishReason,
    GenerateRequest,
    OnUpdate,
    UpdateReport,
)
from loopwright.actors.shared_memory import SharedWeights
from loopwright.actors.weights import WeightManifest, manifest_checksums
from tests.weight_sources import ModelSource, flip_bit, nudged

VOCAB = 128
MAX_CONTEXT = 512
DEADLINE_S = 120.0
T = TypeVar("T")


def build_model(seed: int, *, tied: bool) -> Any:
    """A tiny random Qwen3 causal LM with peaked distributions, eval mode, float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=96, vocab_size=VOCAB, tie_word_embeddings=tied,
        max_position_embeddings=1024, initializer_range=0.12, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def reference_logprobs(
    model: Any, prompt: np.ndarray, generated: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """Logprobs `[n]` of `generated` after `prompt`, by one plain transformers forward pass."""
    ids = torch.from_numpy(np.concatenate((prompt, generated)).astype(np.int64))[None]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return _picked(logits, generated, temperature)


def continued_logprobs(
    before: Any, after: Any, prompt: np.ndarray, generated: np.ndarray, switched: int
) -> np.ndarray:
    """Logprobs of `generated[switched:]` by `after`, on the keys and values that `before` left
    behind."""
    ids = torch.from_numpy(np.concatenate((prompt, generated)).astype(np.int64))[None]
    first = len(prompt) + switched - 1  # the token whose logits give generated[switched]
    with torch.inference_mode():
        cache = before(input_ids=ids[:, :first], use_cache=True).past_key_values
        logits = after(input_ids=ids[:, first:-1], past_key_values=cache).logits[0].float()
    return _picked(logits, generated[switched:], 1.0)


def _picked(logits: torch.Tensor, tokens: np.ndarray, temperature: float) -> np.ndarray:
    scores = torch.log_softmax(logits / temperature, dim=-1)
    return scores.gather(1, torch.from_numpy(tokens.astype(np.int64))[:, None])[:, 0].numpy()


@dataclass(frozen=True, slots=True)
class Staged:
    """A model written to shared memory, which no engine has taken yet."""

    model: Any
    manifest: WeightManifest


class EngineBench:
    """One started engine, the model it should be serving, and the weight channel between them."""

    def __init__(
        self,
        build: Callable[[EngineSettings], Engine],
        folder: Path,
        *,
        tied: bool,
        **settings: Any,
    ) -> None:
        """Save a model to `folder` and start `build(settings)` on it, on an event loop of its
        own."""
        self.tied = tied
        self.version = 0
        self.model = build_model(0, tied=tied)
        self.model.save_pretrained(folder)
        self.writer = SharedWeights.create("test-conformance", self.model.state_dict())
        self._runner = asyncio.Runner()
        self._ids = itertools.count()
        defaults: dict[str, Any] = {"max_concurrency": 16, "max_context": MAX_CONTEXT}
        self.settings = EngineSettings(model_path=str(folder), **{**defaults, **settings})
        self.engine = build(self.settings)
        self.run(self.engine.start())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.run(self.engine.close())
        self._runner.close()
        self.writer.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's event loop, under a deadline."""

        async def within() -> T:
            return await asyncio.wait_for(work, DEADLINE_S)

        return self._runner.run(within())

    def request(self, prompt: np.ndarray, **fields: Any) -> GenerateRequest:
        """A request with an id and session of its own unless given."""
        number = next(self._ids)
        defaults: dict[str, Any] = {
            "request_id": f"request-{number}", "session": f"session-{number}", "max_new_tokens": 12,
            "stop_token_ids": (), "seed": number,
        }  # fmt: skip
        return GenerateRequest(prompt_ids=prompt, **{**defaults, **fields})

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Serve the requests together."""

        async def together() -> list[Completion]:
            return list(await asyncio.gather(*(self.engine.generate(r) for r in requests)))

        return self.run(together())

    async def until(self, reached: Callable[[EngineStats], bool], what: str) -> None:
        """Wait for the engine's counters to say that something has happened."""
        end = time.monotonic() + DEADLINE_S
        while not reached(await self.engine.stats()):
            assert time.monotonic() < end, f"waited {DEADLINE_S} s for {what}"
            await asyncio.sleep(0.001)

    def stage(self, seed: int) -> Staged:
        """Write a differently seeded model as the next version, for `take`."""
        model = build_model(seed, tied=self.tied)
        return Staged(model, self.writer.write(self.version + 1, model.state_dict()))

    async def take(self, staged: Staged, on_update: OnUpdate = "continue") -> UpdateReport:
        """Publish what was staged and wait for the engine to take it."""
        report = await self.engine.update_weights(staged.manifest, on_update)
        self.version, self.model = staged.manifest.version, staged.model
        return report


def prompts(seed: int, lengths: Sequence[int]) -> list[np.ndarray]:
    """Random prompts of the given lengths, int32."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths]


class EngineConformance:
    """The suite. `tolerance` bounds the difference of logprobs from a plain forward pass in
    float32."""

    tolerance = 1e-4
    resumes_exactly = False  # whether a random stream can be entered in the middle

    def assert_parity(
        self, bench: EngineBench, request: GenerateRequest, completion: Completion
    ) -> None:
        """Every token's logprob is the current model's at the request's temperature."""
        expected = reference_logprobs(
            bench.model, request.prompt_ids, completion.token_ids, request.temperature or 1.0
        )
        np.testing.assert_allclose(completion.logprobs, expected, atol=self.tolerance, rtol=0)

    def test_tokens_in_tokens_out(self, bench: EngineBench) -> None:
        request = bench.request(prompts(1, [9])[0])
        (completion,) = bench.generate([request])
        assert completion.request_id == request.request_id
        assert completion.token_ids.dtype == np.int32
        assert completion.logprobs.dtype == np.float32
        assert completion.versions.dtype == np.int32
        assert completion.token_ids.shape == completion.logprobs.shape == completion.versions.shape
        assert completion.token_ids.min() >= 0 and completion.token_ids.max() < VOCAB
        assert (completion.versions == bench.version).all()

    @pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
    def test_logprobs_are_those_of_a_plain_forward_pass(
        self, bench: EngineBench, temperature: float
    ) -> None:
        requests = [
            bench.request(prompt, temperature=temperature, max_new_tokens=5 + 3 * i)
            for i, prompt in enumerate(prompts(2, [1, 2, 7, 30, 31, 64, 100, 3, 33]))
        ]
        for request, completion in zip(requests, bench.generate(requests), strict=True):
            assert len(completion.token_ids) == request.max_new_tokens
            self.assert_parity(bench, request, completion)

    def test_a_probe_scores_tokens_under_the_served_weights(self, bench: EngineBench) -> None:
        tokens = prompts(18, [70])[0]
        for seed in (27, 28):
            bench.run(bench.take(bench.stage(seed)))
            probed = bench.run(bench.engine.probe(tokens))
            expected = reference_logprobs(bench.model, tokens[:1], tokens[1:])
            assert probed.dtype == np.float32
            np.testing.assert_allclose(probed, expected, atol=self.tolerance, rtol=0)
        with pytest.raises(EngineError, match="probe"):
            bench.run(bench.engine.probe(tokens[:1]))

    def test_greedy_takes_the_likeliest_token(self, bench: EngineBench) -> None:
        request = bench.request(prompts(3, [12])[0], temperature=0.0)
        (completion,) = bench.generate([request])
        ids = np.concatenate((request.prompt_ids, completion.token_ids)).astype(np.int64)
        with torch.inference_mode():
            logits = bench.model(input_ids=torch.from_numpy(ids)[None]).logits[0]
        likeliest = logits[len(request.prompt_ids) - 1 : -1].argmax(-1).numpy()
        np.testing.assert_array_equal(completion.token_ids, likeliest)
        self.assert_parity(bench, request, completion)

    def test_a_stop_token_ends_the_turn_and_is_kept(self, bench: EngineBench) -> None:
        prompt = prompts(4, [10])[0]
        (free,) = bench.generate([bench.request(prompt, seed=5, max_new_tokens=20)])
        stop = int(free.token_ids[6])
        at = int(np.argmax(free.token_ids == stop))
        others = tuple(t for t in range(VOCAB) if t not in free.token_ids)[:2]
        request = bench.request(prompt, seed=5, max_new_tokens=20, stop_token_ids=(*others, stop))
        (stopped,) = bench.generate([request])
        assert stopped.finish_reason is FinishReason.STOP
        np.testing.assert_array_equal(stopped.token_ids, free.token_ids[: at + 1])
        assert free.finish_reason is FinishReason.LENGTH

    def test_a_full_context_ends_the_turn(self, bench: EngineBench) -> None:
        request = bench.request(prompts(5, [MAX_CONTEXT - 3])[0], max_new_tokens=50)
        (completion,) = bench.generate([request])
        assert completion.finish_reason is FinishReason.LENGTH
        assert len(completion.token_ids) == 3
        self.assert_parity(bench, request, completion)

    @pytest.mark.parametrize("length", [0, MAX_CONTEXT, MAX_CONTEXT + 40])
    def test_a_prompt_that_does_not_fit_is_refused(self, bench: EngineBench, length: int) -> None:
        with pytest.raises(EngineError, match=f"{length}"):
            bench.generate([bench.request(prompts(6, [length])[0])])

    def test_cancelling_keeps_the_tokens_so_far(self, bench: EngineBench) -> None:
        request = bench.request(prompts(7, [20])[0], max_new_tokens=MAX_CONTEXT - 20)

        async def cancel_midway() -> tuple[Completion, bool, bool]:
            before = (await bench.engine.stats()).generated_tokens
            turn = asyncio.create_task(bench.engine.generate(request))
            await bench.until(lambda s: s.generated_tokens >= before + 4, "four tokens")
            found = await bench.engine.cancel(request.request_id)
            return await turn, found, await bench.engine.cancel(request.request_id)

        completion, found, found_again = bench.run(cancel_midway())
        assert found and not found_again
        assert completion.finish_reason is FinishReason.CANCELLED
        assert 4 <= len(completion.token_ids) < request.max_new_tokens
        self.assert_parity(bench, request, completion)

    def test_the_same_seed_gives_the_same_tokens_in_any_company(self, bench: EngineBench) -> None:
        prompt = prompts(8, [25])[0]
        (alone,) = bench.generate([bench.request(prompt, seed=77)])
        crowd = [
            bench.request(p, max_new_tokens=4 + i)
            for i, p in enumerate(prompts(9, [40, 3, 18, 25]))
        ]
        *_, together, other = bench.generate(
            [*crowd, bench.request(prompt, seed=77), bench.request(prompt, seed=78)]
        )
        np.testing.assert_array_equal(alone.token_ids, together.token_ids)
        assert not np.array_equal(alone.token_ids, other.token_ids)

    def test_a_turn_goes_on_from_its_tokens(self, bench: EngineBench) -> None:
        """As on another engine, after the first one died: with `resumes_exactly`, the same turn."""
        prompt = prompts(21, [30])[0]
        (whole,) = bench.generate([bench.request(prompt, seed=5, max_new_tokens=20)])
        kept = whole.token_ids[:8]
        request = bench.request(
            np.concatenate((prompt, kept)), seed=5, sampled=len(kept), max_new_tokens=12
        )
        (rest,) = bench.generate([request])
        self.assert_parity(bench, request, rest)
        assert len(rest.token_ids) == 12
        if self.resumes_exactly:
            np.testing.assert_array_equal(np.concatenate((kept, rest.token_ids)), whole.token_ids)
            np.testing.assert_allclose(rest.logprobs, whole.logprobs[8:], atol=1e-4)

    def test_turns_of_a_session_continue_its_context(self, bench: EngineBench) -> None:
        context, session = prompts(10, [70])[0], "session-of-turns"
        for turn, reply in enumerate(prompts(11, [5, 1, 40])):
            request = bench.request(context, session=session, max_new_tokens=6 + turn)
            (completion,) = bench.generate([request])
            self.assert_parity(bench, request, completion)
            context = np.concatenate((context, completion.token_ids, reply))

    def test_a_publish_changes_what_is_served(self, bench: EngineBench) -> None:
        request = bench.request(prompts(12, [40])[0], session="published", seed=3)
        former = bench.model
        bench.generate([request])
        report = bench.run(bench.take(bench.stage(21)))
        again = bench.request(request.prompt_ids, session="published", seed=3)
        (completion,) = bench.generate([again])  # the very prompt that was served before
        assert report.version == bench.version == bench.run(bench.engine.stats()).version
        assert (completion.versions == bench.version).all()
        self.assert_parity(bench, again, completion)
        stale = reference_logprobs(former, again.prompt_ids, completion.token_ids)
        assert np.abs(stale - completion.logprobs).max() > 0.5

    def test_the_report_proves_what_the_engine_holds(self, bench: EngineBench) -> None:
        report = bench.run(bench.take(bench.stage(22)))
        tensors = bench.model.state_dict()
        second = SharedWeights.create("test-conformance", tensors)
        try:
            expected = manifest_checksums(second.write(1, tensors))
        finally:
            second.close()
        assert dict(report.checksums) == expected
        assert 0 <= report.pause_s <= report.seconds

    @pytest.mark.parametrize("on_update", ["continue", "recompute", "sleep"])
    def test_an_update_in_the_middle_of_a_sequence(
        self, bench: EngineBench, on_update: Literal["continue", "recompute", "sleep"]
    ) -> None:
        """Every token has the version that wrote it, and exactly the logprob that this version
        gives: on the keys and values that the former one left, or on its own."""
        former, version, staged = bench.model, bench.version, bench.stage(23 + bench.version % 2)
        prompt = prompts(13, [20])[0]
        request = bench.request(prompt, max_new_tokens=MAX_CONTEXT - 20)
        twin = bench.request(prompt)  # comes after the update, while the first still runs

        async def update_midway() -> tuple[Completion, Completion]:
            before = (await bench.engine.stats()).generated_tokens
            turn = asyncio.create_task(bench.engine.generate(request))
            await bench.until(lambda s: s.generated_tokens >= before + 3, "three tokens")
            if on_update == "sleep":
                await bench.engine.sleep()
                still = (await bench.engine.stats()).generated_tokens
                after = asyncio.create_task(bench.engine.generate(twin))
                await bench.take(staged, "continue")
                assert still < before + MAX_CONTEXT - 20, "it went on in its sleep"
                return await turn, await after
            await bench.take(staged, on_update)
            after_update = await bench.engine.generate(twin)
            return await turn, after_update

        completion, fresh = bench.run(update_midway())
        self.assert_parity(bench, twin, fresh)
        switched = int(np.argmax(completion.versions == version + 1))
        assert switched >= 3
        assert (completion.versions[:switched] == version).all()
        assert (completion.versions[switched:] == version + 1).all()
        generated = completion.token_ids
        np.testing.assert_allclose(
            completion.logprobs[:switched],
            reference_logprobs(former, prompt, generated)[:switched],
            atol=self.tolerance,
        )
        kept = continued_logprobs(former, bench.model, prompt, generated, switched)
        anew = reference_logprobs(bench.model, prompt, generated)[switched:]
        expected, other = (kept, anew) if on_update == "continue" else (anew, kept)
        found = completion.logprobs[switched:]
        np.testing.assert_allclose(found, expected, atol=self.tolerance)
        assert np.abs(found - other).max() > 10 * self.tolerance, "the two cannot be told apart"
        follow = bench.request(np.concatenate((prompt, generated[:100])), session=request.session)
        self.assert_parity(bench, follow, bench.generate([follow])[0])

    @pytest.mark.parametrize(
        ("name", "carrier"),
        [
            ("collective", "collective"),
            ("delta", "shared_memory"),
            ("delta", "collective"),
            ("lowrank_delta", "shared_memory"),
        ],
    )
    def test_every_channel_reaches_the_engine(
        self, bench: EngineBench, name: Any, carrier: Any
    ) -> None:
        """Whole, then changed, then damaged on the way."""
        chosen = ChannelSettings(channel=name, carrier=carrier, bucket_bytes=1 << 14)
        matrix = "model.layers.0.mlp.down_proj.weight"
        basis = Basis(torch.linalg.qr(torch.ones(64, 2).tril())[0], left=True)
        channel = open_channel(chosen, "test-conformance", lambda: {matrix: basis})
        model = build_model(40 + bench.version % 2, tied=bench.tied)
        tokens = prompts(19, [30])[0]
        try:
            for _ in range(2):
                source = ModelSource(model)
                staged = Staged(model, channel.publish(bench.version + 1, source, ("engine/0",)))
                report = bench.run(bench.take(staged, "recompute"))
                assert dict(report.checksums) == manifest_checksums(staged.manifest)
                probed = bench.run(bench.engine.probe(tokens))
                expected = reference_logprobs(model, tokens[:1], tokens[1:])
                np.testing.assert_allclose(probed, expected, atol=self.tolerance, rtol=0)
                model = nudged(model)
            if carrier == "shared_memory":
                manifest = channel.publish(bench.version + 1, ModelSource(model), ("engine/0",))
                assert manifest.kind == {"delta": "delta", "lowrank_delta": "lowrank"}[name]
                at = manifest.offsets[manifest.names.index(matrix)] + 25
                flip_bit(manifest.segment, at)
                with pytest.raises(EngineError, match=matrix):
                    bench.run(bench.engine.update_weights(manifest, "continue"))
                bench.run(self._serves_and_takes_the_next(bench))
        finally:
            channel.close()

    def test_finish_lets_sequences_end_under_their_version(self, bench: EngineBench) -> None:
        former, version, staged = bench.model, bench.version, bench.stage(23)
        first = bench.request(prompts(14, [20])[0], max_new_tokens=200)
        second = bench.request(prompts(15, [20])[0])

        async def update_midway() -> tuple[Completion, Completion]:
            before = (await bench.engine.stats()).generated_tokens
            turn = asyncio.create_task(bench.engine.generate(first))
            await bench.until(lambda s: s.generated_tokens >= before + 3, "three tokens")
            publish = asyncio.create_task(bench.take(staged, "finish"))
            completion = await turn
            await publish
            return completion, await bench.engine.generate(second)

        ended, later = bench.run(update_midway())
        assert (ended.versions == version).all() and len(ended.versions) == 200
        expected = reference_logprobs(former, first.prompt_ids, ended.token_ids)
        np.testing.assert_allclose(ended.logprobs, expected, atol=self.tolerance)
        assert (later.versions == version + 1).all()
        self.assert_parity(bench, second, later)

    def test_a_damaged_byte_is_refused_by_name(self, bench: EngineBench) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        manifest = bench.stage(25).manifest
        flip_bit(manifest.segment, manifest.offsets[manifest.names.index(name)] + 10)
        with pytest.raises(EngineError, match=name):
            bench.run(bench.engine.update_weights(manifest, "continue"))
        bench.run(self._serves_and_takes_the_next(bench))

    async def _serves_and_takes_the_next(self, bench: EngineBench) -> None:
        request, again = (bench.request(prompt) for prompt in prompts(16, [20, 20]))
        completion = await bench.engine.generate(request)
        assert (completion.versions == bench.version).all()
        self.assert_parity(bench, request, completion)
        await bench.take(bench.stage(26))
        self.assert_parity(bench, again, await bench.engine.generate(again))
