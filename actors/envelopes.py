"""Many turns in few calls: what an environment worker and a rollout actor say to each other.

A call between two processes costs more than a turn of a small model. A decoding step ends several
turns at once, and their episodes ask for the next ones at about the same time; so both sides put
what they have into one envelope:

    worker   Mailbox: requests since the last envelope   ──▶  exchange(...)
    engine   PostOffice: completions since the last one  ◀──  its answer, as soon as there is one

One envelope is always waiting at the engine while anything is being generated; a newer one sends it
home. Nothing waits for an envelope to fill up.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from loopwright.actors.engine import Completion, EngineError, FinishReason, GenerateRequest
from loopwright.actors.episode import EngineLost

_GATHER_S = 0.002  # requests of episodes that were answered together go out together
_POLL_S = 10.0  # an envelope is not kept for longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What a worker sends: its name, what it wants, and what it does not want any more."""

    sender: str
    requests: tuple[GenerateRequest, ...]
    withdrawn: tuple[str, ...] = ()  # request ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A request that the engine cannot serve, and why."""

    request_id: str
    why: str


Answer = Completion | Refusal
Exchange = Callable[[Envelope], Awaitable[list[Answer]]]


class Mailbox:
    """The worker's end. One per rollout actor; lives on one event loop."""

    def __init__(self, exchange: Exchange) -> None:
        """`exchange` carries an envelope to the actor; it raises `EngineLost` if that is gone."""
        self._exchange = exchange
        self._sender = uuid.uuid4().hex
        self._open: dict[str, asyncio.Future[Completion]] = {}
        self._outbox: list[GenerateRequest] = []
        self._withdrawn: list[str] = []
        self._under_way: set[asyncio.Task[None]] = set()
        self._at_engine = 0  # envelopes not yet answered, of this life
        self._timer: asyncio.TimerHandle | None = None
        self._life = 0  # of the actor: an envelope to a former one is no news about this one

    async def generate(self, request: GenerateRequest) -> Completion:
        """One completion. Raises `EngineError` for a request that is refused, `EngineLost` when the
        actor is lost with it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Completion] = loop.create_future()
        self._open[request.request_id] = answer
        self._outbox.append(request)
        self._send_soon(loop)
        try:
            return await answer
        except asyncio.CancelledError:
            self._withdrawn.append(request.request_id)
            self._send_soon(loop)
            raise
        finally:
            self._open.pop(request.request_id, None)

    def _send_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is None:
            self._timer = loop.call_later(_GATHER_S, self._send)

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        envelope = Envelope(
            sender=self._sender,
            requests=tuple(self._outbox),
            withdrawn=tuple(self._withdrawn),
        )
        self._outbox, self._withdrawn = [], []
        self._at_engine += 1
        task = asyncio.get_running_loop().create_task(self._converse(envelope, self._life))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _converse(self, envelope: Envelope, life: int) -> None:
        """Deliver what comes back; keep one envelope at the engine while anything is open."""
        try:
            answers = await self._exchange(envelope)
        except EngineLost as error:
            return self._fail(error, life)
        except Exception as error:  # noqa: BLE001 - the boundary: told to every caller
            why = f"the exchange failed: {type(error).__name__}: {error}"
            return self._fail(EngineError(why), life)
        # counted here and not by the tasks: two that come home at once would each see the other
        self._at_engine -= life == self._life
        for answer in answers:
            waiting = self._open.get(answer.request_id)
            if waiting is None or waiting.done():
                continue  # its caller went away
            if isinstance(answer, Refusal):
                waiting.set_exception(EngineError(answer.why))
            else:
                waiting.set_result(answer)
        if not self._at_engine and any(not future.done() for future in self._open.values()):
            self._send_soon(asyncio.get_running_loop())

    def _fail(self, error: Exception, life: int) -> None:
        if life != self._life:
            return
        self._life += 1
        self._at_engine = 0
        for waiting in self._open.values():
            if not waiting.done():
                waiting.set_exception(error)
        self._outbox, self._withdrawn = [], []


class PostOffice:
    """The rollout actor's end: serves requests, and hands out what is done in the next envelope."""

    def __init__(
        self,
        serve: Callable[[GenerateRequest], Awaitable[Completion]],
        cancel: Callable[[str], Awaitable[bool]],
    ) -> None:
        self._serve = serve
        self._cancel = cancel
        self._boxes: dict[str, _Box] = {}
        self._serving: set[asyncio.Task[None]] = set()

    async def exchange(self, envelope: Envelope) -> list[Answer]:
        """Take in the requests; what is done for this sender, as soon as there is anything."""
        box = self._boxes.setdefault(envelope.sender, _Box())
        for request in envelope.requests:
            self._start(self._answer(request, box))
        for request_id in envelope.withdrawn:
            self._start(self._withdraw(request_id))
        return await box.collect()

    def owes(self, sender: str) -> bool:
        """Whether there is, or will be, an answer for this sender to fetch."""
        box = self._boxes.get(sender)
        return bool(self._serving) or (box is not None and box.full)

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _answer(self, request: GenerateRequest, box: "_Box") -> None:
        try:
            answer: Answer = await self._serve(request)
        except EngineLost:  # it began to leave with this request on the way: to be asked again
            answer = _nothing_of(request)
        except Exception as error:  # noqa: BLE001 - the boundary: told to its caller
            answer = Refusal(request_id=request.request_id, why=str(error))
        box.put(answer)

    async def _withdraw(self, request_id: str) -> None:
        try:
            await self._cancel(request_id)
        except EngineError:
            return  # whoever waits for anything else is told


class _Box:
    """What is done for one sender."""

    def __init__(self) -> None:
        self._done: list[Answer] = []
        self._changed = asyncio.Event()
        self._newest = 0

    @property
    def full(self) -> bool:
        """Whether something waits to be collected."""
        return bool(self._done)

    def put(self, answer: Answer) -> None:
        self._done.append(answer)
        self._changed.set()

    async def collect(self) -> list[Answer]:
        """Wait for something; a newer envelope takes over."""
        self._newest += 1
        mine = self._newest
        self._changed.set()  # the one before goes home
        loop = asyncio.get_running_loop()
        ends = loop.time() + _POLL_S
        while mine == self._newest and not self._done and loop.time() < ends:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), ends - loop.time())
            except TimeoutError:
                break
        if mine != self._newest and not self._done:
            return []
        await asyncio.sleep(0)  # all turns that the same step ended
        done, self._done = self._done, []
        return done


def _nothing_of(request: GenerateRequest) -> Completion:
    """A completion that was cut off before its first token."""
    return Completion(
        request_id=request.request_id,
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        versions=np.zeros(0, np.int32),
        finish_reason=FinishReason.CANCELLED,
    )
