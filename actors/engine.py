"""What generates: the protocol both engines implement, and the records that pass through it.

Token in, token out. Logprobs are those of the sampled tokens at the sampling temperature, with no
top-p, top-k or penalties, so that they equal the trainer's by construction. Every generated token
carries the policy version that produced it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

import numpy as np

from loopwright.actors.weights import WeightManifest

OnUpdate = Literal["continue", "recompute", "finish"]


class EngineError(Exception):
    """An engine cannot do what it was asked; the text says what, which value, the limit and the
    remedy."""


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # a stop token was sampled; it is the last of `token_ids`
    LENGTH = "length"  # max_new_tokens reached, or the context is full
    CANCELLED = "cancelled"  # the caller took it back; the tokens so far are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One turn to generate."""

    request_id: str
    # the episode: an engine may keep its KV between turns and prefill only what is new
    session: str
    prompt_ids: np.ndarray  # [P] int32
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0  # 0 is greedy (evaluation only)
    # of this request alone: the same seed and logits give the same tokens whatever else runs
    seed: int
    # tokens of this turn that the prompt already ends with: the random stream goes on after them
    sampled: int = 0
    priority: int = 0  # lower is served first (the ticket: the oldest group unblocks the trainer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What came back, n tokens."""

    request_id: str
    token_ids: np.ndarray  # [n] int32
    logprobs: np.ndarray  # [n] float32
    versions: np.ndarray  # [n] int32
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """The engine's answer to a publish: what it now holds."""

    version: int
    checksums: Mapping[str, int]  # tensor name -> xxh3_64 of the bytes the engine serves from
    pause_s: float  # how long generation stood still
    seconds: float  # the whole update
    # what the engine did under the former weights, so that it can be done again; empty where an
    # engine does not say
    journal: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since start, and gauges now."""

    version: int
    running: int
    waiting: int
    generated_tokens: int
    prefill_tokens: int
    cached_prefix_tokens: int
    busy_s: float  # seconds spent inside forward and sampling
    uptime_s: float
    kv_used_frac: float = 0.0  # of the KV cache, by running sequences
    kv_waits: int = 0  # requests that had to wait for room in it, or lost theirs to others


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How to build an engine; both engines read all of it."""

    model_path: str  # Hugging Face folder or hub id
    dtype: str = "float32"
    device: str = "cpu"  # "cpu" or "cuda"
    max_concurrency: int = 64  # sequences decoded together
    max_context: int = 1024  # prompt + completion
    kv_bytes: int = 64 << 20
    threads: int = 1
    lora_rank: int = 0  # of the adapters that will be published; 0: whole weights are
    options: Mapping[str, Any] = field(default_factory=dict)  # of the one engine, passed through


class Engine(Protocol):
    """Asynchronous; one event loop; any number of concurrent `generate` calls."""

    async def start(self) -> None:
        """Load the model. Version 0 is what `model_path` holds."""
        ...

    async def generate(self, request: GenerateRequest) -> Completion:
        """Serve one request. Raises `EngineError` for a prompt that does not fit."""
        ...

    async def cancel(self, request_id: str) -> bool:
        """End a request early: its `generate` returns what it has. False if it is not running."""
        ...

    async def update_weights(self, manifest: WeightManifest, on_update: OnUpdate) -> UpdateReport:
        """Take the published weights. `continue`: running sequences go on under them, their KV
        kept; `recompute`: they go on, their KV computed anew under them; `finish`: they finish
        under the old ones first. Whichever, no later request is served from KV of an older version.
        Raises `EngineError` naming the tensors whose checksum does not match, and `ChannelLost`
        where the weights did not arrive; the former version then goes on being served."""
        ...

    async def sleep(self) -> None:
        """Stand still, and give back the memory of the KV cache, until the next `update_weights`.
        Requests wait; running sequences go on after it as `recompute` has it, whatever its
        `on_update`."""
        ...

    async def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """Logprobs [T-1] float32 of the given tokens [T] int32 under the weights being served,
        computed by the engine itself, bypassing caches."""
        ...

    async def stats(self) -> EngineStats:
        """Counters and gauges; never waits for generation."""
        ...

    async def close(self) -> None:
        """Free the model, threads and shared memory mappings."""
        ...
