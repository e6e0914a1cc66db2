"""The torch engine's thread: waiting requests, the running batch, and results handed back in one
wake-up a step.

The thread never waits for the event loop, and everything it holds is failed if it dies: no call
hangs.
"""

import asyncio
import heapq
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from loopwright.actors.decode_batch import DecodeBatch, Ended
from loopwright.actors.engine import (
    Completion,
    EngineError,
    EngineStats,
    FinishReason,
    GenerateRequest,
    OnUpdate,
)
from loopwright.actors.torch_model import Adapter

_PREFILL_TOKENS = 2048  # prompt tokens a step takes in at most, unless one prompt alone is longer


@dataclass(order=True, slots=True)
class _Waiting:
    """A request not yet running; ordered by priority, then arrival."""

    priority: int
    arrival: int
    request: GenerateRequest = field(compare=False)
    limit: int = field(compare=False)
    counted: bool = field(default=False, compare=False)  # as one that waited for KV


@dataclass(frozen=True, slots=True)
class Submit:
    """Serve a request; `limit` tokens at most."""

    request: GenerateRequest
    limit: int
    future: "asyncio.Future[Completion]"


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a request early; nobody may be waiting for the answer."""

    request_id: str
    future: "asyncio.Future[bool] | None"


@dataclass(frozen=True, slots=True)
class Update:
    """Serve from other weights, verified already; answered with the pause in seconds."""

    weights: dict[str, torch.Tensor]
    version: int
    on_update: OnUpdate
    future: "asyncio.Future[float]"
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """Logprobs of given tokens `[T]` under the weights being served."""

    token_ids: np.ndarray
    future: "asyncio.Future[np.ndarray]"


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Stand still until the next update."""

    future: "asyncio.Future[None]"


Command = Submit | Cancel | Update | Probe | Sleep | Stop


class EngineThread(threading.Thread):
    """Runs the steps. All state is its own; others only read counters and put commands into the
    inbox."""

    def __init__(
        self,
        batch: DecodeBatch,
        inbox: "queue.SimpleQueue[Command]",
        loop: asyncio.AbstractEventLoop,
        threads: int,
    ) -> None:
        """Nothing runs before `start`. Results are delivered on `loop`; `threads` is torch's."""
        super().__init__(name="loopwright-torch-engine", daemon=True)
        self.batch = batch
        self.failure: EngineError | None = None
        self._inbox = inbox
        self._loop = loop
        self._threads = threads
        self._began = time.perf_counter()
        self._busy_s = 0.0
        self._arrivals = 0
        self._kv_waits = 0
        self._waiting: list[_Waiting] = []
        self._futures: dict[str, asyncio.Future[Completion]] = {}
        self._updates: list[Update] = []
        self._asleep = False
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
            kv_used_frac=batch.kv_used_frac,
            kv_waits=self._kv_waits,
        )

    def run(self) -> None:
        """Until told to stop, or until a step fails; either way nothing is left pending."""
        torch.set_num_threads(self._threads)
        reason = EngineError("the torch engine was closed")
        try:
            with torch.inference_mode():
                while self._take_commands():
                    self._turn()
        except Exception as error:  # noqa: BLE001 - the boundary: told to every caller
            reason = EngineError(f"the torch engine failed: {type(error).__name__}: {error}")
            reason.__cause__ = error
        self.failure = reason
        self._fail_all(reason)

    def _turn(self) -> None:
        """Apply updates that are due, admit, step, deliver."""
        began = time.perf_counter()
        self._apply_updates()
        if not self._asleep:
            self._admit()
            for ended in self.batch.step():
                self._finish(ended)
        self._busy_s += time.perf_counter() - began
        self._flush()

    def _take_commands(self) -> bool:
        """Read the inbox, waiting if there is nothing to do; False when told to stop."""
        idle = not self._updates and (self._asleep or not (self._waiting or self.batch.running))
        while True:
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            if isinstance(command, Stop):
                return False
            if isinstance(command, Submit):
                self._submit(command)
            elif isinstance(command, Cancel):
                self._cancel(command)
            elif isinstance(command, Sleep):
                self._asleep = True
                self.batch.release_kv()
                self._outbox.append((command.future, None))
                self._flush()
            elif isinstance(command, Probe):
                self._outbox.append((command.future, self.batch.probe(command.token_ids)))
            else:
                self._updates.append(command)

    def _submit(self, command: Submit) -> None:
        request = command.request
        if request.request_id in self._futures:
            error = EngineError(f"request {request.request_id} is already served; ids are unique")
            self._outbox.append((command.future, error))
            return
        self._futures[request.request_id] = command.future
        self._arrivals += 1
        entry = _Waiting(request.priority, self._arrivals, request, command.limit)
        heapq.heappush(self._waiting, entry)

    def _cancel(self, command: Cancel) -> None:
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
            if update.on_update == "finish" and self.batch.running and not self._asleep:
                return  # nothing is admitted until they are done
            began = time.perf_counter()
            self.batch.install(
                update.weights,
                update.version,
                adapter=update.adapter,
                recompute=self._asleep or update.on_update == "recompute",
            )
            self._asleep = False
            self._outbox.append((update.future, time.perf_counter() - began))
            self._updates.pop(0)

    def _admit(self) -> None:
        """Waiting requests in order, while slots, KV and the step's share of prefill last."""
        prefill, later = 0, []
        while self._waiting and not self._updates and prefill < _PREFILL_TOKENS:
            entry = self._waiting[0]
            if not self.batch.has_room(entry.request, entry.limit):
                self._kv_waits += self.batch.has_slot and not entry.counted
                entry.counted |= self.batch.has_slot
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
        self._outbox += [(future, reason) for future in drain(self._inbox)]
        self._flush()

    def _flush(self) -> None:
        """Hand results to the event loop, one wake-up for all of them."""
        if self._outbox and not self._loop.is_closed():
            results, self._outbox = self._outbox, []
            self._loop.call_soon_threadsafe(deliver, results)


def drain(inbox: "queue.SimpleQueue[Command]") -> list["asyncio.Future[Any]"]:
    """The futures of all commands that nobody will read any more."""
    futures: list[asyncio.Future[Any]] = []
    while True:
        try:
            command = inbox.get_nowait()
        except queue.Empty:
            return futures
        if not isinstance(command, Stop) and command.future is not None:
            futures.append(command.future)


def deliver(results: list[tuple["asyncio.Future[Any]", Any]]) -> None:
    """Resolve futures, on their own event loop, with a value or an `EngineError`."""
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
