"""A simulated engine: it sleeps as a larger model would, and says nothing that means anything.

For benchmarks of scheduling and for tests of the loop, on machines that hold no larger model. It
keeps every promise of `Engine` that the loop lives on (slots, priorities, cancelling, versions by
token, updates that `continue` or `finish`), but its tokens are one and the same, its logprobs are
zero, and its "weights" are the manifest's checksums echoed. Nothing measured with it says anything
about a real engine's speed, and no configuration can name it.
"""

import asyncio
import heapq
import math
import random
from dataclasses import dataclass, field

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
from loopwright.actors.weights import WeightManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Delays:
    """What takes how long; `EngineSettings.options` of the engine."""

    token_s: float = 0.02  # one decoding step, whatever the number of sequences
    prefill_token_s: float = 0.0
    mean_tokens: float = 64.0  # a turn ends after so many on average,
    cv: float = 0.0  # log-normally spread with this coefficient of variation
    token_id: int = 5
    update_s: float = 0.0

    def turn_tokens(self, request: GenerateRequest) -> int:
        """How many tokens are still to come: a turn's length is of the request's seed alone."""
        return max(1, self.length(request.seed) - request.sampled)

    def length(self, seed: int) -> int:
        """Tokens of the turn with this seed, if nothing ends it before."""
        if not self.cv:
            return max(1, round(self.mean_tokens))
        sigma = math.sqrt(math.log1p(self.cv**2))
        mu = math.log(self.mean_tokens) - sigma**2 / 2
        return max(1, round(random.Random(seed).lognormvariate(mu, sigma)))


@dataclass(slots=True, eq=False)
class _Speaking:
    """A request with a slot."""

    request: GenerateRequest
    tokens: int
    began: float  # of the present version's share
    versions: list[int] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # cancelled


class DelayEngine:
    """Implements `Engine`."""

    def __init__(self, settings: EngineSettings) -> None:
        self._delays = Delays(**settings.options)
        self._slots = settings.max_concurrency
        self._max_context = settings.max_context
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._running: dict[str, _Speaking] = {}
        self._asleep = asyncio.Event()  # set: awake
        self._asleep.set()
        self._version = 0
        self._serial = 0
        self._generated = 0
        self._prefilled = 0
        self._busy_s = 0.0
        self._busy_since = 0.0
        self._began = 0.0

    async def start(self) -> None:
        """Nothing to load."""
        self._began = asyncio.get_running_loop().time()

    async def generate(self, request: GenerateRequest) -> Completion:
        """Sleep for the turn's tokens, in a slot, the lowest priority number first."""
        if len(request.prompt_ids) >= self._max_context:
            raise EngineError(
                f"request {request.request_id}: {len(request.prompt_ids)} tokens given, "
                f"max_context is {self._max_context}"
            )
        await self._slot(request.priority)
        room = self._max_context - len(request.prompt_ids)
        wanted = self._delays.turn_tokens(request)
        limit = min(request.max_new_tokens, room)
        speaking = _Speaking(request, min(wanted, limit), self._now())
        self._running[request.request_id] = speaking
        try:
            await self._speak(speaking)
        finally:
            del self._running[request.request_id]
            self._give_slot()
        return self._completion(speaking, stopped=wanted <= limit)

    async def cancel(self, request_id: str) -> bool:
        """End a request early: its `generate` returns what it has. False if it is not running."""
        speaking = self._running.get(request_id)
        if speaking is None:
            return False
        speaking.ended.set()
        return True

    async def update_weights(self, manifest: WeightManifest, on_update: OnUpdate) -> UpdateReport:
        """Take another version number; running sequences have it from their next token on."""
        began = self._now()
        while on_update == "finish" and self._running:
            await asyncio.sleep(self._delays.token_s)
        await asyncio.sleep(self._delays.update_s)
        for speaking in self._running.values():
            self._say(speaking)
        self._version = manifest.version
        self._asleep.set()
        checksums = dict(zip(manifest.names, manifest.checksums, strict=True))
        seconds = self._now() - began
        return UpdateReport(
            version=self._version, checksums=checksums, pause_s=0.0, seconds=seconds
        )

    async def sleep(self) -> None:
        """New requests wait until the next update."""
        self._asleep.clear()

    async def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """Zeros: every token is certain here."""
        return np.zeros(len(token_ids) - 1, np.float32)

    async def stats(self) -> EngineStats:
        """Counters and gauges."""
        busy = self._now() - self._busy_since if self._running else 0.0
        return EngineStats(
            version=self._version,
            running=len(self._running),
            waiting=len(self._waiting),
            generated_tokens=self._generated,
            prefill_tokens=self._prefilled,
            cached_prefix_tokens=0,
            busy_s=self._busy_s + busy,
            uptime_s=self._now() - self._began,
        )

    async def close(self) -> None:
        """Nothing to free."""

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _slot(self, priority: int) -> None:
        await self._asleep.wait()
        if self._slots and not self._waiting:
            self._take_slot()
            return
        self._serial += 1
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, self._serial, turn))
        await turn

    def _take_slot(self) -> None:
        if not self._running:
            self._busy_since = self._now()
        self._slots -= 1

    def _give_slot(self) -> None:
        self._slots += 1
        if not self._running:
            self._busy_s += self._now() - self._busy_since
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():  # its caller still waits
                self._take_slot()
                turn.set_result(None)
                return

    async def _speak(self, speaking: _Speaking) -> None:
        prompt = len(speaking.request.prompt_ids)
        self._prefilled += prompt
        speaking.began += prompt * self._delays.prefill_token_s
        ends = speaking.began + speaking.tokens * self._delays.token_s
        cancelled = asyncio.ensure_future(speaking.ended.wait())
        try:
            await asyncio.wait([cancelled], timeout=ends - self._now())
        finally:
            cancelled.cancel()
        self._say(speaking, whole=not speaking.ended.is_set())

    def _say(self, speaking: _Speaking, *, whole: bool = False) -> None:
        """Give the tokens since the last publish their version."""
        now, spoken = self._now(), len(speaking.versions)
        more = speaking.tokens - spoken
        if not whole:
            more = min(more, int((now - speaking.began) / self._delays.token_s))
        speaking.versions += [self._version] * max(more, 0)
        speaking.began += max(more, 0) * self._delays.token_s
        self._generated += max(more, 0)

    def _completion(self, speaking: _Speaking, *, stopped: bool) -> Completion:
        size = len(speaking.versions)
        tokens = np.full(size, self._delays.token_id, np.int32)
        reason = FinishReason.CANCELLED if speaking.ended.is_set() else FinishReason.LENGTH
        if stopped and reason is FinishReason.LENGTH:
            reason = FinishReason.STOP
            tokens[-1] = speaking.request.stop_token_ids[0]
        return Completion(
            request_id=speaking.request.request_id,
            token_ids=tokens,
            logprobs=np.zeros(size, np.float32),
            versions=np.array(speaking.versions, np.int32),
            finish_reason=reason,
        )
