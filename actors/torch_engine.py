"""The embedded engine: continuous batching over a lean forward pass, in the actor's own process.

    event loop                                   engine thread (`EngineThread`)
    generate() -- request, future --> inbox ---> waiting (priority, then arrival)
                                                   | admit while slots and KV last
                                                   v
                                                 DecodeBatch.step(): prefill + one token for all
    futures    <-- completions, once a step ---    |
    update_weights(): map and verify first, then   v
    the thread points at them between two steps  (next step)

Runs on the CPU; `device = "cuda"` goes through the same code, untested on a GPU so far.
"""

import asyncio
import gc
import queue
import time

import numpy as np
import torch

from loopwright.actors.allocator import release_freed_memory
from loopwright.actors.channels.receiver import Received, Receiver
from loopwright.actors.decode_batch import DecodeBatch
from loopwright.actors.engine import (
    Completion,
    EngineError,
    EngineSettings,
    EngineStats,
    GenerateRequest,
    OnUpdate,
    UpdateReport,
)
from loopwright.actors.engine_thread import (
    Cancel,
    Command,
    EngineThread,
    Probe,
    Sleep,
    Stop,
    Submit,
    Update,
    deliver,
    drain,
)
from loopwright.actors.torch_model import Adapter, LeanModel, load_model
from loopwright.actors.weights import ChannelLost, WeightError, WeightManifest, wrong_dtypes


class TorchEngine:
    """Implements `Engine` for Llama, Mistral, Qwen2 and Qwen3 causal language models."""

    def __init__(self, settings: EngineSettings) -> None:
        """Nothing is loaded before `start`."""
        self._settings = settings
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread: EngineThread | None = None
        self._model: LeanModel | None = None
        self._receiver = Receiver(settings.device)
        self._updating = asyncio.Lock()
        self._served = False  # weights that were published

    async def start(self) -> None:
        """Load the model and start the engine thread. Raises `EngineError` for what it cannot
        serve."""
        settings = self._settings
        if self._thread is not None:
            raise EngineError("the torch engine is started already")
        if settings.options:
            raise EngineError(
                f"the torch engine takes no options, got {sorted(settings.options)}; remove them"
            )
        self._model = await asyncio.to_thread(
            load_model,
            settings.model_path,
            dtype=settings.dtype,
            device=settings.device,
            max_context=settings.max_context,
        )
        batch = DecodeBatch(
            self._model,
            max_concurrency=settings.max_concurrency,
            max_context=settings.max_context,
            kv_bytes=settings.kv_bytes,
        )
        loop = asyncio.get_running_loop()
        self._thread = EngineThread(batch, self._inbox, loop, settings.threads)
        self._thread.start()

    async def generate(self, request: GenerateRequest) -> Completion:
        """Serve one request. Raises `EngineError` for a request that cannot be served."""
        thread = self._running_thread()
        limit = self._check(request, thread)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._put(Submit(request, limit, future))
        try:
            return await future
        except asyncio.CancelledError:
            self._put(Cancel(request.request_id, None))
            raise

    async def cancel(self, request_id: str) -> bool:
        """End a request early: its `generate` returns what it has. False if it is not running."""
        self._running_thread()
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._put(Cancel(request_id, future))
        return await future

    async def update_weights(self, manifest: WeightManifest, on_update: OnUpdate) -> UpdateReport:
        """Map and verify the published tensors beside generation, then point at them between two
        steps.

        Where dtype and device fit, the engine serves from the shared memory itself. Raises
        `EngineError` naming tensors that are missing or damaged, and goes on serving the version it
        had.
        """
        began = time.perf_counter()
        self._running_thread()
        async with self._updating:
            received, weights, adapter = await asyncio.to_thread(self._prepare, manifest)
            future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
            self._put(Update(weights, manifest.version, on_update, future, adapter))
            pause_s = await future
            self._receiver.serving(received)
            if not self._served:  # what `start` loaded is free now
                gc.collect()
                release_freed_memory()
                self._served = True
        return UpdateReport(
            version=manifest.version,
            checksums=received.checksums,
            pause_s=pause_s,
            seconds=time.perf_counter() - began,
            journal=self._running_thread().batch.journal.take(),
        )

    async def sleep(self) -> None:
        """Stand still and free the KV cache, until the next `update_weights`."""
        self._running_thread()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._put(Sleep(future))
        await future

    async def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """Logprobs `[T-1]` float32 of given tokens `[T]` int32 under the weights being served.

        A forward pass of its own, on no cache. Raises `EngineError` unless 2 <= T <= max_context.
        """
        self._running_thread()
        self._check_tokens("probe", token_ids, 2, self._settings.max_context)
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._put(Probe(token_ids, future))
        return await future

    async def stats(self) -> EngineStats:
        """Counters and gauges; never waits for generation."""
        if self._thread is None:
            raise EngineError("the torch engine is not started; await start() first")
        return self._thread.stats()

    async def close(self) -> None:
        """End the thread and free the model; what is still running fails with `EngineError`."""
        thread, self._thread, self._model = self._thread, None, None
        if thread is not None:
            self._inbox.put(Stop())
            await asyncio.to_thread(thread.join)
        self._receiver.close()

    def _put(self, command: Command) -> None:
        """Hand a command to the thread; if it ended meanwhile, fail what it will no longer read."""
        self._inbox.put(command)
        thread = self._thread
        if thread is None or thread.failure is not None:
            reason = (
                EngineError("the torch engine was closed") if thread is None else thread.failure
            )
            assert reason is not None
            for future in drain(self._inbox):
                deliver([(future, reason)])

    def _running_thread(self) -> "EngineThread":
        if self._thread is None:
            raise EngineError("the torch engine is not started, or closed; await start() first")
        if self._thread.failure is not None:
            raise self._thread.failure
        return self._thread

    def _check(self, request: GenerateRequest, thread: "EngineThread") -> int:
        """How many tokens the request may generate, after refusing what cannot be served."""
        settings, prompt = self._settings, request.prompt_ids
        name = f"request {request.request_id}"
        self._check_tokens(name, prompt, 1, settings.max_context - 1)
        if request.max_new_tokens < 1 or not 0 <= request.temperature < float("inf"):
            raise EngineError(
                f"{name}: max_new_tokens {request.max_new_tokens} and temperature "
                f"{request.temperature}, expected at least 1 and at least 0"
            )
        limit = min(request.max_new_tokens, settings.max_context - len(prompt))
        needed = thread.batch.kv_bytes_of(request, limit)
        if needed > settings.kv_bytes:
            raise EngineError(
                f"{name}: up to {len(prompt) + limit} tokens take {needed:,} bytes of KV, kv_bytes "
                f"is {settings.kv_bytes:,}. Raise kv_bytes or lower max_new_tokens"
            )
        return limit

    def _check_tokens(self, name: str, token_ids: np.ndarray, least: int, most: int) -> None:
        if not least <= len(token_ids) <= most:
            raise EngineError(
                f"{name}: {len(token_ids)} tokens given; max_context {self._settings.max_context} "
                f"admits {least} to {most}. Shorten the prompt or raise max_context"
            )
        assert self._model is not None  # _running_thread has seen it
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= self._model.vocab:
            raise EngineError(
                f"{name}: token ids {low} to {high} given, the vocabulary is 0 to "
                f"{self._model.vocab - 1}. Use the model's own tokenizer"
            )

    def _prepare(
        self, manifest: WeightManifest
    ) -> tuple[Received, dict[str, torch.Tensor], Adapter | None]:
        """What was received, and the tensors to serve from."""
        model = self._model
        assert model is not None  # _running_thread has seen it
        if wrong := wrong_dtypes(manifest, self._settings.dtype):
            raise EngineError(f"version {manifest.version} refused: {'; '.join(wrong)}")
        refused = ""
        try:
            received = self._receiver.receive(manifest)
        except ChannelLost:
            raise
        except WeightError as error:
            refused = str(error)
        if refused:  # outside the handler: an error must not keep a slot mapped
            raise EngineError(f"version {manifest.version} refused: {refused}")
        weights = model.prepare(received.weights)
        adapter = model.prepare_adapter(received.adapter, received.scale, weights)
        return received, weights, adapter
