"""The sequences a torch engine decodes together: their state as arrays, and one step over all of
them.

Running sequences fill rows 0 … A-1, which are also their KV slots. A new sequence prefills all of
its prompt but the last token, and that token is decoded like everybody else's: one path samples,
and the last layer of a prefill is never computed. What a prompt shares with its session's former
turn, or with the prompt of a running sequence (the rollouts of a group start alike), is copied
instead of computed. All KV reused is of the current policy version.
"""

from dataclasses import dataclass

import numpy as np
import torch

from loopwright.actors.engine import Completion, EngineError, FinishReason, GenerateRequest
from loopwright.actors.journal import Journal
from loopwright.actors.kv_slots import KeptPrefix, KVSlots, PrefixCache, shared_length
from loopwright.actors.torch_model import Adapter, LeanModel, Segment, StepInput

_KEY_TOKENS = 16  # prompts alike in their first tokens are looked at for a shared prefix
_WORTH_WAITING = 32  # shared tokens for which a prompt waits one step for a neighbour's KV


@dataclass(slots=True, eq=False)
class Sequence:
    """One running request."""

    request: GenerateRequest
    limit: int  # tokens it may generate
    row: int
    version: int  # policy version that its first KV was computed under
    ready: bool = False  # its prompt's KV has been computed


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence that left the batch, with its completion or what went wrong."""

    request: GenerateRequest
    result: Completion | EngineError


class DecodeBatch:
    """Up to `max_concurrency` sequences and everything a step needs to know of them."""

    def __init__(
        self, model: LeanModel, *, max_concurrency: int, max_context: int, kv_bytes: int
    ) -> None:
        """Reserve state and KV slots. `kv_bytes` bounds the KV of running and kept sequences."""
        self.version = 0
        self.generated_tokens = 0
        self.prefill_tokens = 0
        self.cached_prefix_tokens = 0
        self.running: dict[str, Sequence] = {}
        self.journal = Journal()
        self._model = model
        self._kv = KVSlots(model.kv_shape, max_concurrency, max_context)
        self._kv_limit_bytes = kv_bytes
        self._reserved_bytes = 0
        self._prefixes = PrefixCache()
        self._leaders: dict[bytes, Sequence] = {}
        self._rows: list[Sequence | None] = []
        self._segments: list[tuple[Segment, Sequence]] = []
        slots = max_concurrency
        self._lengths = np.zeros(slots, np.int64)  # tokens in the KV slot
        self._last = np.zeros(slots, np.int64)  # token to decode next
        self._generated = np.zeros(slots, np.int64)
        self._limits = np.zeros(slots, np.int64)
        self._temperatures = np.ones(slots, np.float32)
        self._greedy = np.zeros(slots, np.bool_)
        self._stops = np.full((slots, 1), -1, np.int64)
        self._uniforms = np.zeros((slots, max_context), np.float64)
        self._tokens = np.zeros((slots, max_context), np.int32)
        self._logprobs = np.zeros((slots, max_context), np.float32)
        self._versions = np.zeros((slots, max_context), np.int32)

    def kv_bytes_of(self, request: GenerateRequest, limit: int) -> int:
        """KV a request may come to need, in bytes."""
        return (len(request.prompt_ids) + limit) * self._model.kv_shape.token_bytes

    @property
    def kv_used_frac(self) -> float:
        """Share of the KV budget that running sequences may come to need."""
        return min(1.0, self._reserved_bytes / self._kv_limit_bytes)

    def has_room(self, request: GenerateRequest, limit: int) -> bool:
        """Whether a slot is free and the KV budget holds one more."""
        needed = self._reserved_bytes + self.kv_bytes_of(request, limit)
        fits = needed <= self._kv_limit_bytes or not self.running
        return self.has_slot and fits

    @property
    def has_slot(self) -> bool:
        """Whether one more sequence may run, if there is KV for it."""
        return len(self.running) < self._kv.slots

    def worth_waiting(self, request: GenerateRequest) -> bool:
        """Whether a sequence added since the last step will soon offer much of this prompt's KV."""
        prompt = request.prompt_ids
        shared = [
            shared_length(leader.request.prompt_ids, prompt)
            for leader in self._leaders_of(prompt)
            if not leader.ready
        ]
        if max(shared, default=0) < _WORTH_WAITING:
            return False
        return self._best_prefix(request)[0] + _WORTH_WAITING <= max(shared)

    def add(self, request: GenerateRequest, limit: int) -> int:
        """Take a request in; returns the prompt tokens that the next step has to prefill."""
        self.journal.note("add", request.request_id)
        row = next((i for i, held in enumerate(self._rows) if held is None), len(self._rows))
        if row == len(self._rows):
            self._rows.append(None)
        sequence = Sequence(request=request, limit=limit, row=row, version=self.version)
        cached = self._reuse(sequence)
        self._rows[row] = sequence
        self.running[request.request_id] = sequence
        self._reserved_bytes += self.kv_bytes_of(request, limit)
        self._prefixes.shrink(max(0, self._kv_limit_bytes - self._reserved_bytes))
        prompt = request.prompt_ids
        todo = len(prompt) - 1 - cached
        segment = Segment(slot=row, start=cached, length=todo)
        self._segments.append((segment, sequence))
        self._fill_row(sequence)
        for key in _keys(prompt):
            self._leaders[key] = sequence
        self.prefill_tokens += todo + 1
        self.cached_prefix_tokens += cached
        return todo

    def cancel(self, request_id: str) -> Ended | None:
        """Take a sequence out with the tokens it has."""
        sequence = self.running.get(request_id)
        if sequence is None:
            return None
        self.journal.note("cancel", request_id)
        return self._end(sequence, FinishReason.CANCELLED)

    def install(
        self,
        weights: dict[str, torch.Tensor],
        version: int,
        *,
        adapter: Adapter | None = None,
        recompute: bool = False,
    ) -> None:
        """Serve from other weights. Running sequences keep their KV, which nobody else ever sees;
        with `recompute` the next step computes it anew from their tokens."""
        self._model.install(weights, adapter)
        self.journal.note("adapter" if adapter else "install", version, recompute=recompute)
        self.version = version
        self._prefixes.clear()
        self._leaders.clear()
        if recompute:
            self._drop_kv()

    def release_kv(self) -> None:
        """Give back all memory of keys and values. Nothing may step before the next `install` with
        `recompute`."""
        kv = self._kv
        self.journal.note("release", 0)
        self._kv = KVSlots(kv.shape, kv.slots, kv.max_context)
        self._prefixes.clear()
        self._leaders.clear()

    def _drop_kv(self) -> None:
        """Prefill every running sequence again, all but the token that is decoded next."""
        self._segments = []
        for sequence in self.running.values():
            row = sequence.row
            sequence.version, sequence.ready = self.version, False
            todo = int(self._lengths[row])
            self._segments.append((Segment(slot=row, start=0, length=todo), sequence))
            self.prefill_tokens += todo
            for key in _keys(sequence.request.prompt_ids):
                self._leaders[key] = sequence

    def step(self) -> list[Ended]:
        """One forward pass and one token for every running sequence; returns those that ended."""
        self._close_holes()
        rows = len(self._rows)
        if rows == 0:
            return []
        self.journal.step()
        logits = self._model.forward(self._step_input(rows), self._kv)
        tokens, logprobs = sample(
            logits,
            temperatures=self._temperatures[:rows],
            greedy=self._greedy[:rows],
            uniforms=self._uniforms[np.arange(rows), self._generated[:rows]],
        )
        return self._record(tokens, logprobs)

    def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """Logprobs `[T-1]` float32 of given tokens `[T]` under the weights being served, on KV of
        their own."""
        n = len(token_ids)
        tokens = torch.from_numpy(token_ids.astype(np.int64)).to(self._model.kv_shape.device)
        step = StepInput(
            token_ids=np.roll(token_ids.astype(np.int64), 1),  # the last one is decoded, so first
            positions=np.roll(np.arange(n), 1),
            slots=np.zeros(n, np.int64),
            decoded=1,
            segments=[Segment(slot=0, start=0, length=n - 1)],
        )
        logits = self._model.forward(step, KVSlots(self._model.kv_shape, 1, n), every=True)[1:]
        picked = torch.log_softmax(logits, dim=-1).gather(1, tokens[1:, None])
        return picked[:, 0].cpu().numpy()

    def _step_input(self, rows: int) -> StepInput:
        segments = [(segment, sequence) for segment, sequence in self._segments if segment.length]
        for _, sequence in self._segments:
            sequence.ready = True
        self._segments = []
        tokens, positions = [self._last[:rows]], [self._lengths[:rows].copy()]
        slots = [np.arange(rows)]
        for segment, sequence in segments:
            end = segment.start + segment.length
            tokens.append(self._tokens_of(sequence)[segment.start : end].astype(np.int64))
            positions.append(np.arange(segment.start, end))
            slots.append(np.full(segment.length, segment.slot))
        return StepInput(
            token_ids=np.concatenate(tokens),
            positions=np.concatenate(positions),
            slots=np.concatenate(slots),
            decoded=rows,
            segments=[segment for segment, _ in segments],
        )

    def _tokens_of(self, sequence: Sequence) -> np.ndarray:
        """Prompt and what was generated so far [n] int32."""
        row = sequence.row
        generated = self._tokens[row, : self._generated[row]]
        return np.concatenate((sequence.request.prompt_ids, generated))

    def _record(self, tokens: np.ndarray, logprobs: np.ndarray) -> list[Ended]:
        """Book one token per row and take out the sequences that it ends."""
        rows = len(tokens)
        every, place = np.arange(rows), self._generated[:rows]
        self._tokens[every, place] = tokens
        self._logprobs[every, place] = logprobs
        self._versions[every, place] = self.version
        self._generated[:rows] += 1
        self._lengths[:rows] += 1
        self._last[:rows] = tokens
        self.generated_tokens += rows
        stopped = (tokens[:, None] == self._stops[:rows]).any(1)
        broken = ~np.isfinite(logprobs)
        ended = []
        full = self._generated[:rows] >= self._limits[:rows]
        for row in np.nonzero(stopped | broken | full)[0]:
            sequence = self._rows[row]
            assert sequence is not None  # rows are dense during a step
            if broken[row]:
                ended.append(self._fail(sequence))
            else:
                reason = FinishReason.STOP if stopped[row] else FinishReason.LENGTH
                ended.append(self._end(sequence, reason))
        return ended

    def _end(self, sequence: Sequence, reason: FinishReason) -> Ended:
        row, request = sequence.row, sequence.request
        n = int(self._generated[row])
        completion = Completion(
            request_id=request.request_id,
            token_ids=self._tokens[row, :n].copy(),
            logprobs=self._logprobs[row, :n].copy(),
            versions=self._versions[row, :n].copy(),
            finish_reason=reason,
        )
        self._release(sequence)
        if reason is not FinishReason.CANCELLED and sequence.version == self.version:
            self._keep(sequence, completion.token_ids)
        return Ended(request, completion)

    def _fail(self, sequence: Sequence) -> Ended:
        self._release(sequence)
        self._kv.clear(sequence.row)
        return Ended(
            sequence.request,
            EngineError(
                f"request {sequence.request.request_id}: the logits are not finite under policy "
                f"version {self.version}; the weights have diverged, go back to a checkpoint"
            ),
        )

    def _release(self, sequence: Sequence) -> None:
        self._rows[sequence.row] = None
        del self.running[sequence.request.request_id]
        self._segments = [pair for pair in self._segments if pair[1] is not sequence]
        self._reserved_bytes -= self.kv_bytes_of(sequence.request, sequence.limit)
        for key in _keys(sequence.request.prompt_ids):
            if self._leaders.get(key) is sequence:
                del self._leaders[key]

    def _keep(self, sequence: Sequence, generated: np.ndarray) -> None:
        """Keep a finished turn's KV for the session's next one. The last token has none yet."""
        length = int(self._lengths[sequence.row])
        room = self._kv_limit_bytes - self._reserved_bytes
        needed = length * self._model.kv_shape.token_bytes
        if needed > room:
            return
        self._prefixes.shrink(room - needed)
        tokens = np.concatenate((sequence.request.prompt_ids, generated))[:length]
        kv = self._kv.save(sequence.row, length)
        self._prefixes.keep(sequence.request.session, KeptPrefix(token_ids=tokens, kv=kv))

    def _reuse(self, sequence: Sequence) -> int:
        """Copy the longest known prefix into the sequence's slot; returns its length."""
        shared, source = self._best_prefix(sequence.request)
        if isinstance(source, Sequence):
            self._kv.copy(source.row, sequence.row, shared)
        elif source is not None:
            self._kv.restore(sequence.row, source.kv, shared)
        return shared

    def _best_prefix(self, request: GenerateRequest) -> tuple[int, Sequence | KeptPrefix | None]:
        """How many leading tokens have KV of this version, and where. The last is always
        decoded.

        A turn that is asked for again, of an episode that is played again, is computed as the first
        time: on its own KV it would round differently, and the run would not repeat bit for bit.
        """
        prompt = request.prompt_ids[:-1]
        best: tuple[int, Sequence | KeptPrefix | None] = (0, None)
        found = self._prefixes.find(request.session, prompt)
        if found is not None:
            kept, shared = found
            again = shared == len(prompt) < len(kept.token_ids)
            if shared > 0 and not again:
                best = (shared, kept)
        for leader in self._leaders_of(request.prompt_ids):
            if leader.ready:
                shared = shared_length(leader.request.prompt_ids, prompt)
                best = max(best, (shared, leader), key=lambda pair: pair[0])
        return best

    def _leaders_of(self, prompt: np.ndarray) -> list[Sequence]:
        return [self._leaders[key] for key in _keys(prompt) if key in self._leaders]

    def _fill_row(self, sequence: Sequence) -> None:
        row, request = sequence.row, sequence.request
        stops = np.asarray(request.stop_token_ids, np.int64)
        if len(stops) > self._stops.shape[1]:
            wider = len(stops) - self._stops.shape[1]
            self._stops = np.pad(self._stops, ((0, 0), (0, wider)), constant_values=-1)
        self._stops[row] = -1
        self._stops[row, : len(stops)] = stops
        self._lengths[row] = len(request.prompt_ids) - 1
        self._last[row] = request.prompt_ids[-1]
        self._generated[row] = 0
        self._limits[row] = sequence.limit
        self._greedy[row] = request.temperature == 0
        self._temperatures[row] = request.temperature or 1.0
        noise = np.random.Generator(np.random.Philox(key=request.seed & (2**64 - 1)))
        stream = noise.random(request.sampled + sequence.limit)
        self._uniforms[row, : sequence.limit] = stream[request.sampled :]

    def _close_holes(self) -> None:
        """Move the last rows into empty ones, so that rows 0 … A-1 are all running."""
        while None in self._rows:
            last = self._rows.pop()
            if last is None:
                continue
            source, target = len(self._rows), self._rows.index(None)
            self._move(last, source, target)

    def _move(self, sequence: Sequence, source: int, target: int) -> None:
        filled = int(self._lengths[source])
        self._kv.copy(source, target, filled)
        for table in (
            self._lengths, self._last, self._generated, self._limits, self._temperatures,
            self._greedy, self._stops, self._uniforms, self._tokens, self._logprobs, self._versions,
        ):  # fmt: skip
            table[target] = table[source]
        self._rows[target] = sequence
        sequence.row = target
        self._segments = [
            (Segment(slot=target, start=s.start, length=s.length) if q is sequence else s, q)
            for s, q in self._segments
        ]


def sample(
    logits: torch.Tensor, *, temperatures: np.ndarray, greedy: np.ndarray, uniforms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One token `[A]` int64 and its logprob `[A]` float32 per row of `logits` `[A, vocab]` float32.

    Inverse transform sampling: the token where the cumulative distribution passes the row's own
    uniform number, so a row's token depends on its logits and number alone. Greedy rows take the
    largest logit.
    """
    device = logits.device
    scale = torch.from_numpy(temperatures).to(device)[:, None]
    logprobs = torch.log_softmax(logits / scale, dim=-1)
    cumulative = logprobs.double().exp_().cumsum_(-1)
    marks = torch.from_numpy(uniforms).to(device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, marks, right=True).clamp_(max=logits.shape[1] - 1)
    if greedy.any():
        chosen = torch.from_numpy(greedy).to(device)[:, None]
        tokens = torch.where(chosen, logits.argmax(-1, keepdim=True), tokens)
    picked = logprobs.gather(1, tokens)
    return tokens[:, 0].cpu().numpy(), picked[:, 0].cpu().numpy()


def _keys(prompt: np.ndarray) -> tuple[bytes, bytes]:
    """What a prompt is looked up by: all of it, and how it begins."""
    return prompt.tobytes(), b"begins " + prompt[:_KEY_TOKENS].tobytes()
