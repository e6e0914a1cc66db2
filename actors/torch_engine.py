"""The embedded engine: continuous batching over a lean forward pass, in the actor's own process.

    event loop                                   engine thread
    generate() -- request, future --> inbox ---> waiting (priority, then arrival)
                                                   | admit while slots and KV last
                                                   v
                                                 DecodeBatch.step(): prefill + one token for all
    futures    <-- completions, once a step ---    |
    update_weights(): map and verify first, then   v
    the thread points at them between two steps  (next step)

The thread never waits for the event loop, and everything it holds is failed if it dies: no call
hangs. Runs on the CPU; `device = "cuda"` goes through the same code, untested on a GPU so far.
"""

import asyncio
import heapq
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from loopwright.actors.decode_batch import DecodeBatch, Ended
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
from loopwright.actors.torch_model import LeanModel, load_model
from loopwright.actors.weights import (
    WeightError,
    WeightManifest,
    attach,
    manifest_checksums,
    verify,
)

_PREFILL_TOKENS = 2048  # prompt tokens a step takes in at most, unless one prompt alone is longer


@dataclass(order=True, slots=True)
class _Waiting:
    """A request not yet running; ordered by priority, then arrival."""

    priority: int
    arrival: int
    request: GenerateRequest = field(compare=False)
    limit: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class _Submit:
    request: GenerateRequest
    limit: int
    future: "asyncio.Future[Completion]"


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str
    future: "asyncio.Future[bool] | None"


@dataclass(frozen=True, slots=True)
class _Update:
    weights: dict[str, torch.Tensor]
    version: int
    on_update: OnUpdate
    future: "asyncio.Future[float]"  # the pause in seconds


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Command = _Submit | _Cancel | _Update | _Stop


class TorchEngine:
    """Implements `Engine` for Llama, Mistral, Qwen2 and Qwen3 causal language models."""

    def __init__(self, settings: EngineSettings) -> None:
        """Nothing is loaded before `start`."""
        self._settings = settings
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._thread: _EngineThread | None = None
        self._model: LeanModel | None = None

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
        self._thread = _EngineThread(batch, self._inbox, loop, settings.threads)
        self._thread.start()

    async def generate(self, request: GenerateRequest) -> Completion:
        """Serve one request. Raises `EngineError` for a request that cannot be served."""
        thread = self._running_thread()
        limit = self._check(request, thread)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._put(_Submit(request, limit, future))
        try:
            return await future
        except asyncio.CancelledError:
            self._put(_Cancel(request.request_id, None))
            raise

    async def cancel(self, request_id: str) -> bool:
        """End a request early: its `generate` returns what it has. False if it is not running."""
        self._running_thread()
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._put(_Cancel(request_id, future))
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
        weights, checksums = await asyncio.to_thread(self._prepare, manifest)
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._put(_Update(weights, manifest.version, on_update, future))
        pause_s = await future
        return UpdateReport(
            version=manifest.version,
            checksums=checksums,
            pause_s=pause_s,
            seconds=time.perf_counter() - began,
        )

    async def stats(self) -> EngineStats:
        """Counters and gauges; never waits for generation."""
        if self._thread is None:
            raise EngineError("the torch engine is not started; await start() first")
        return self._thread.stats()

    async def close(self) -> None:
        """End the thread and free the model; what is still running fails with `EngineError`."""
        thread, self._thread, self._model = self._thread, None, None
        if thread is not None:
            self._inbox.put(_Stop())
            await asyncio.to_thread(thread.join)

    def _put(self, command: _Command) -> None:
        """Hand a command to the thread; if it ended meanwhile, fail what it will no longer read."""
        self._inbox.put(command)
        thread = self._thread
        if thread is None or thread.failure is not None:
            reason = EngineError("the torch engine was closed") if thread is None else thread.failure
            assert reason is not None
            for future in _drain(self._inbox):
                _deliver([(future, reason)])

    def _running_thread(self) -> "_EngineThread":
        if self._thread is None:
            raise EngineError("the torch engine is not started, or closed; await start() first")
        if self._thread.failure is not None:
            raise self._thread.failure
        return self._thread

    def _check(self, request: GenerateRequest, thread: "_EngineThread") -> int:
        """How many tokens the request may generate, after refusing what cannot be served."""
        settings, prompt = self._settings, request.prompt_ids
        name = f"request {request.request_id}"
        if not 1 <= len(prompt) < settings.max_context:
            raise EngineError(
                f"{name}: a prompt of {len(prompt)} tokens; max_context {settings.max_context} admits 1 to "
                f"{settings.max_context - 1}. Shorten the prompt or raise max_context"
            )
        assert self._model is not None  # _running_thread has seen it
        if int(prompt.min()) < 0 or int(prompt.max()) >= self._model.vocab:
            raise EngineError(
                f"{name}: token ids {int(prompt.min())} to {int(prompt.max())} in the prompt, the model's "
                f"vocabulary is 0 to {self._model.vocab - 1}. Is this the model's own tokenizer?"
            )
        if request.max_new_tokens < 1 or not 0 <= request.temperature < float("inf"):
            raise EngineError(
                f"{name}: max_new_tokens {request.max_new_tokens} and temperature {request.temperature}, "
                f"expected at least 1 and at least 0"
            )
        limit = min(request.max_new_tokens, settings.max_context - len(prompt))
        needed = thread.batch.kv_bytes_of(request, limit)
        if needed > settings.kv_bytes:
            raise EngineError(
                f"{name}: up to {len(prompt) + limit} tokens take {needed:,} bytes of KV, kv_bytes is "
                f"{settings.kv_bytes:,}. Raise kv_bytes or lower max_new_tokens"
            )
        return limit

    def _prepare(self, manifest: WeightManifest) -> tuple[dict[str, torch.Tensor], Mapping[str, int]]:
        """Tensors to serve from, and their checksums."""
        assert self._model is not None  # _running_thread has seen it
        if manifest.kind != "full":
            raise EngineError(
                f"version {manifest.version}: the torch engine takes full weights, not an {manifest.kind}; "
                f"merge the adapter before publishing"
            )
        try:
            tensors = attach(manifest)
            checksums = verify(tensors, manifest_checksums(manifest))
        except WeightError as error:
            raise EngineError(f"version {manifest.version} refused: {error}") from error
        return self._model.prepare(tensors), checksums


class _EngineThread(threading.Thread):
    """Runs the steps. All state is its own; others only read counters and put commands into the
    inbox."""

    def __init__(
        self,
        batch: DecodeBatch,
        inbox: "queue.SimpleQueue[_Command]",
        loop: asyncio.AbstractEventLoop,
        threads: int,
    ) -> None:
        super().__init__(name="loopwright-torch-engine", daemon=True)
        self.batch = batch
        self.failure: EngineError | None = None
        self._inbox = inbox
        self._loop = loop
        self._threads = threads
        self._began = time.perf_counter()
        self._busy_s = 0.0
        self._arrivals = 0
        self._waiting: list[_Waiting] = []
        self._futures: dict[str, asyncio.Future[Completion]] = {}
        self._updates: list[_Update] = []
        self._outbox: list[tuple[asyncio.Future[Any], Any]] = []

    def stats(self) -> EngineStats:
        """Read by the event loop while the thread works: each value is consistent, the set nearly
        so."""
        batch = self.batch
        return EngineStats(
            version=batch.version,
            running=len(batch.running),
            waiting=len(self._waiting),
            generated_tokens=batch.generated_tokens,
            prefill_tokens=batch.prefill_tokens,
            cached_prefix_tokens=batch.cached_prefix_tokens,
            busy_s=self._busy_s,
            uptime_s=time.perf_counter() - self._began,
        )

    def run(self) -> None:
        """Until told to stop, or until a step fails; either way nothing is left pending."""
        torch.set_num_threads(self._threads)
        reason = EngineError("the torch engine was closed")
        try:
            with torch.inference_mode():
                while self._take_commands():
                    self._turn()
        except Exception as error:  # the boundary: recorded once, told to every caller
            reason = EngineError(f"the torch engine's thread failed: {type(error).__name__}: {error}")
            reason.__cause__ = error
        self.failure = reason
        self._fail_all(reason)

    def _turn(self) -> None:
        """Apply updates that are due, admit, step, deliver."""
        began = time.perf_counter()
        self._apply_updates()
        self._admit()
        for ended in self.batch.step():
            self._finish(ended)
        self._busy_s += time.perf_counter() - began
        self._flush()

    def _take_commands(self) -> bool:
        """Read the inbox, waiting if there is nothing to do; False when told to stop."""
        idle = not (self._waiting or self.batch.running or self._updates)
        while True:
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            if isinstance(command, _Stop):
                return False
            if isinstance(command, _Submit):
                self._submit(command)
            elif isinstance(command, _Cancel):
                self._cancel(command)
            else:
                self._updates.append(command)

    def _submit(self, command: _Submit) -> None:
        request = command.request
        if request.request_id in self._futures:
            error = EngineError(f"request {request.request_id} is already being served; ids are unique")
            self._outbox.append((command.future, error))
            return
        self._futures[request.request_id] = command.future
        self._arrivals += 1
        entry = _Waiting(request.priority, self._arrivals, request, command.limit)
        heapq.heappush(self._waiting, entry)

    def _cancel(self, command: _Cancel) -> None:
        ended = self.batch.cancel(command.request_id)
        if ended is None:
            ended = self._cancel_waiting(command.request_id)
        if ended is not None:
            self._finish(ended)
        if command.future is not None:
            self._outbox.append((command.future, ended is not None))
        self._flush()

    def _cancel_waiting(self, request_id: str) -> Ended | None:
        for entry in self._waiting:
            if entry.request.request_id == request_id:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
                return Ended(entry.request, _empty(request_id))
        return None

    def _apply_updates(self) -> None:
        while self._updates:
            update = self._updates[0]
            if update.on_update == "finish" and self.batch.running:
                return  # nothing is admitted until they are done
            began = time.perf_counter()
            self.batch.install(update.weights, update.version)
            self._outbox.append((update.future, time.perf_counter() - began))
            self._updates.pop(0)

    def _admit(self) -> None:
        """Waiting requests in order, while slots, KV and the step's share of prefill last."""
        prefill, later = 0, []
        while self._waiting and not self._updates and prefill < _PREFILL_TOKENS:
            entry = self._waiting[0]
            if not self.batch.has_room(entry.request, entry.limit):
                break
            heapq.heappop(self._waiting)
            if self.batch.worth_waiting(entry.request):
                later.append(entry)
                continue
            prefill += self.batch.add(entry.request, entry.limit)
        for entry in later:
            heapq.heappush(self._waiting, entry)

    def _finish(self, ended: Ended) -> None:
        future = self._futures.pop(ended.request.request_id)
        self._outbox.append((future, ended.result))

    def _fail_all(self, reason: EngineError) -> None:
        self._outbox += [(future, reason) for future in self._futures.values()]
        self._outbox += [(update.future, reason) for update in self._updates]
        self._outbox += [(future, reason) for future in _drain(self._inbox)]
        self._flush()

    def _flush(self) -> None:
        """Hand results to the event loop, one wake-up for all of them."""
        if self._outbox and not self._loop.is_closed():
            results, self._outbox = self._outbox, []
            self._loop.call_soon_threadsafe(_deliver, results)


def _drain(inbox: "queue.SimpleQueue[_Command]") -> list["asyncio.Future[Any]"]:
    """The futures of all commands that nobody will read any more."""
    futures: list[asyncio.Future[Any]] = []
    while True:
        try:
            command = inbox.get_nowait()
        except queue.Empty:
            return futures
        if not isinstance(command, _Stop) and command.future is not None:
            futures.append(command.future)


def _deliver(results: list[tuple["asyncio.Future[Any]", Any]]) -> None:
    for future, result in results:
        if future.done():  # its caller went away
            continue
        if isinstance(result, EngineError):
            future.set_exception(result)
        else:
            future.set_result(result)


def _empty(request_id: str) -> Completion:
    return Completion(
        request_id=request_id,
        token_ids=np.empty(0, np.int32),
        logprobs=np.empty(0, np.float32),
        versions=np.empty(0, np.int32),
        finish_reason=FinishReason.CANCELLED,
    )
