"""The engine that serves with vLLM, on GPUs and on plain CPUs, by vLLM's public interfaces alone.

    this process (asyncio)                      vLLM's engine core process
    VllmEngine -> AsyncLLM.generate  ------->   scheduler, model, sampler
               -> verify, pause, update ---->   actors/vllm_transfer.py: channel -> layers
               <- tokens, logprobs, spans of weight versions

How it takes weights is in `actors/vllm_update.py`.

vLLM is imported when `start` runs. `VLLM_CPU_ENVIRONMENT` belongs in the environment of the process
before anything imports torch; whoever launches the process passes it. Pinned to vLLM 0.32: 0.33
renames parts of its weight-transfer interface. The code for `device="cuda"` is the same without the
CPU settings; it was not run on a GPU.
"""

import asyncio
import time
from typing import TYPE_CHECKING

import numpy as np

from loopwright.actors.engine import (
    Completion,
    EngineError,
    EngineSettings,
    EngineStats,
    FinishReason,
    GenerateRequest,
    OnUpdate,
    UpdateReport,
)
from loopwright.actors.vllm_setup import (
    StepMeter,
    engine_arguments,
    prepare_environment,
    require_vllm,
)
from loopwright.actors.vllm_update import Updates
from loopwright.actors.weights import WeightManifest

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.CANCELLED,
}


class VllmEngine:
    """`Engine` on vLLM's `AsyncLLM`."""

    def __init__(self, settings: EngineSettings) -> None:
        """Nothing starts before `start`. `settings.options` are further `AsyncEngineArgs`."""
        self._settings = settings
        self._llm: AsyncLLM | None = None
        self._meter = StepMeter()
        self._in_flight: set[str] = set()
        self._updating = asyncio.Lock()
        self._updates = Updates(settings)
        self._probes = 0
        self._out_of_service = "it is not started; call start()"  # empty: serving
        self._started_at = time.monotonic()

    async def start(self) -> None:
        """Load the model in a new engine core process; blocks this event loop for its 5 to 25 s.

        vLLM may seed this process's global random state on the way. Raises `EngineError` if vLLM is
        missing, of another release, or cannot start.
        """
        if self._llm is not None:
            raise EngineError("VllmEngine.start: it runs already; one start per engine")
        prepare_environment(self._settings)
        require_vllm(self._settings.device)
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        try:
            self._llm = self._launch()
        except (RuntimeError, ValueError, TypeError, OSError, AssertionError) as error:
            raise EngineError(
                f"vLLM cannot start {self._settings.model_path!r} on {self._settings.device} in "
                f"{self._settings.dtype}, max_context {self._settings.max_context}, kv_bytes "
                f"{self._settings.kv_bytes:,}: {error}"
            ) from error
        # Asked once here, so that `generate` registers a request without waiting and `cancel`
        # finds it.
        await self._llm.get_supported_tasks()
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest())
        await self._llm.update_weight_version("0")
        self._started_at = time.monotonic()
        self._out_of_service = ""

    async def generate(self, request: GenerateRequest) -> Completion:
        """Serve one request. Raises `EngineError` if it does not fit, runs already, or fails."""
        llm = self._serving(f"request {request.request_id!r}")
        prompt_ids = request.prompt_ids.tolist()
        self._check_fits(request.request_id, len(prompt_ids), request.max_new_tokens)
        if request.request_id in self._in_flight:
            raise EngineError(
                f"request {request.request_id!r} is running already; give every request its own "
                f"request_id"
            )
        room = self._settings.max_context - len(prompt_ids)
        output = await self._last_output(
            llm,
            request.request_id,
            prompt_ids,
            _sampling_params(request, max_tokens=min(request.max_new_tokens, room)),
            request.priority,
        )
        return _completion(request.request_id, output)

    async def cancel(self, request_id: str) -> bool:
        """End a request early: its `generate` returns what it has. False if it is not running."""
        if self._llm is None or request_id not in self._in_flight:
            return False
        await self._llm.abort(request_id)
        return True

    async def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """Logprobs [T-1] float32 of the given tokens [T] int32 under the weights being served,
        computed by the engine itself, bypassing caches.

        Raises `EngineError` unless 2 <= T < max_context.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        llm = self._serving("probe")
        tokens = token_ids.tolist()
        if len(tokens) < 2:
            raise EngineError(
                f"probe of {len(tokens)} tokens: at least 2 are needed for one logprob"
            )
        self._check_fits("probe", len(tokens), 1)
        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, skip_reading_prefix_cache=True,
            ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        self._probes += 1
        output = await self._last_output(
            llm, f"loopwright-probe-{self._probes}", tokens, params, -1
        )
        rows = output.prompt_logprobs[1:]
        return np.array(
            [row[token].logprob for row, token in zip(rows, tokens[1:], strict=True)],
            dtype=np.float32,
        )

    async def update_weights(self, manifest: WeightManifest, on_update: OnUpdate) -> UpdateReport:
        """Take the published weights.

        `checksums` are those of the bytes the worker received, compared before any layer is
        touched: served layers are re-packed and cannot be compared; `probe` tells what they
        compute. Raises `EngineError` naming the tensors that are wrong, missing or of another
        shape, and `ChannelLost`; the former version then goes on being served. If loading itself
        fails the engine refuses everything from then on.
        """
        from vllm.exceptions import VLLMError

        async with self._updating:
            llm = self._serving(f"update to version {manifest.version}")
            began = time.monotonic()
            self._updates.check(llm, manifest)
            try:
                checksums, folder = await self._updates.receive(llm, manifest)
                still_from = await self._updates.swap(llm, manifest, folder, on_update)
            except VLLMError as error:
                raise EngineError(
                    f"vLLM failed the update to version {manifest.version}: {error}"
                ) from error
            finally:
                if self._updates.broken:  # nothing may be sampled from what was half loaded
                    self._out_of_service = self._updates.broken
                    await llm.abort(list(self._in_flight))
            ended = time.monotonic()
            return UpdateReport(
                version=self._updates.version,
                checksums=checksums,
                pause_s=ended - still_from,
                seconds=ended - began,
            )

    async def sleep(self) -> None:
        """Stand still, without KV, until the next `update_weights`."""
        from vllm.exceptions import VLLMError

        async with self._updating:
            try:
                await self._updates.sleep(self._serving("sleep"))
            except VLLMError as error:
                raise EngineError(f"vLLM cannot go to sleep: {error}") from error

    async def stats(self) -> EngineStats:
        """Counters and gauges, at once. `busy_s` is wall time with sequences running."""
        running = min(self._meter.running, len(self._in_flight))
        return EngineStats(
            version=self._updates.version,
            running=running,
            waiting=len(self._in_flight) - running,
            generated_tokens=self._meter.generated_tokens,
            prefill_tokens=self._meter.prefill_tokens,
            cached_prefix_tokens=self._meter.cached_prefix_tokens,
            busy_s=self._meter.busy_s,
            uptime_s=time.monotonic() - self._started_at,
            kv_used_frac=self._meter.kv_used_frac,
            kv_waits=self._meter.preempted,
        )

    async def close(self) -> None:
        """Cancel what runs, end the engine core process. Idempotent."""
        llm, self._llm = self._llm, None
        self._out_of_service = "it is closed; start another engine"
        if llm is None:
            return
        await llm.abort(list(self._in_flight))
        handler = llm.output_handler
        if handler is not None:  # first, for it takes the end of the engine core for a failure
            handler.cancel()
            await asyncio.wait({handler})
        await asyncio.to_thread(llm.shutdown)

    def _launch(self) -> "AsyncLLM":
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        config = AsyncEngineArgs(**engine_arguments(self._settings)).create_engine_config()
        if self._settings.device == "cpu":
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            head_size = config.model_config.get_head_size()
            sizes = CPUAttentionBackend.get_supported_head_sizes()
            if head_size not in sizes:  # vLLM itself dies of it at the first request
                raise ValueError(
                    f"head size {head_size}; vLLM on a CPU has {sizes}, use the torch engine"
                )
        return AsyncLLM.from_vllm_config(
            config, disable_log_stats=True, stat_loggers=[lambda _config, _index=0: self._meter]
        )

    def _serving(self, purpose: str) -> "AsyncLLM":
        if self._llm is None or self._out_of_service:
            raise EngineError(f"VllmEngine cannot serve {purpose}: {self._out_of_service}")
        return self._llm

    def _check_fits(self, request_id: str, prompt_length: int, max_new_tokens: int) -> None:
        limit = self._settings.max_context
        if not 1 <= prompt_length < limit:
            raise EngineError(
                f"request {request_id!r}: a prompt of {prompt_length} tokens does not fit; it must "
                f"hold 1 to {limit - 1} (max_context {limit}, one token to generate)"
            )
        if max_new_tokens < 1:
            raise EngineError(
                f"request {request_id!r}: max_new_tokens {max_new_tokens}, at least 1 is needed"
            )

    async def _last_output(
        self,
        llm: "AsyncLLM",
        request_id: str,
        prompt_ids: list[int],
        params: "SamplingParams",
        priority: int,
    ) -> "RequestOutput":
        from vllm.exceptions import VLLMError
        from vllm.inputs import tokens_input

        last: RequestOutput | None = None
        self._in_flight.add(request_id)
        try:
            async for output in llm.generate(
                tokens_input(prompt_ids, cache_salt=self._updates.salt),
                params,
                request_id,
                priority=priority,
                lora_request=self._updates.adapter,
            ):
                last = output
        except (VLLMError, ValueError) as error:
            cause = error.__cause__ or error
            raise EngineError(
                f"vLLM failed request {request_id!r}: {type(cause).__name__}: {cause}"
            ) from error
        finally:
            self._in_flight.discard(request_id)
        if last is None or last.outputs[0].finish_reason not in _FINISH_REASONS:
            ended = "with nothing" if last is None else f"with {last.outputs[0].finish_reason!r}"
            raise EngineError(f"vLLM ended request {request_id!r} {ended}; its log says why")
        return last


def _sampling_params(request: GenerateRequest, *, max_tokens: int) -> "SamplingParams":
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=request.temperature,
        # vLLM cannot go on inside a random stream: a resumed turn gets another one
        seed=(request.seed + request.sampled) & 0x7FFF_FFFF_FFFF_FFFF,
        stop_token_ids=list(request.stop_token_ids),
        ignore_eos=True,  # the request names every stop token
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(request_id: str, output: "RequestOutput") -> Completion:
    answer = output.outputs[0]
    versions = np.empty(len(answer.token_ids), dtype=np.int32)
    for span in answer.weight_versions or ():
        versions[span.start : span.end] = int(span.version)
    return Completion(
        request_id=request_id,
        token_ids=np.array(answer.token_ids, dtype=np.int32),
        logprobs=np.array(answer.logprobs.logprobs if len(versions) else (), dtype=np.float32),
        versions=versions,
        finish_reason=_FINISH_REASONS[answer.finish_reason],
    )
