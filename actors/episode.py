"""One episode: the environment and the policy take turns until one of them is done, and a rollout
remains."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from loopwright.actors.engine import Completion, FinishReason, GenerateRequest
from loopwright.actors.episode_record import EpisodeRecord
from loopwright.algorithms.records import Context, EndReason, Outcome, Rollout
from loopwright.envs.protocol import Env, Step, Task, TaskError

if TYPE_CHECKING:  # the controller reads the limits and error types only, without transformers
    from loopwright.actors.chat import ChatFormat

T = TypeVar("T")
Generate = Callable[[GenerateRequest], Awaitable[Completion]]
Another = Callable[[str], Awaitable[Generate]]  # of (why the present engine is no good)
FIRST_REQUEST = "0.1"  # how the name of an episode's first request ends: turn 0, request 1
PIECE_TOKENS = 512  # of one request: what a dying engine can take with it, at most
_ABORTED_PAUSE_S = 0.05


class EngineLost(Exception):
    """The engine that served an episode died or does not answer: the episode goes on elsewhere."""


class TakenBack(Exception):
    """The episode was taken back while it was played: it has no rollout and no reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeLimits:
    """Budgets of one episode; a budget that runs out truncates it, and it is still graded."""

    max_turns: int  # 0: the environment's own budget
    max_new_tokens: int  # per turn
    max_context: int  # tokens, prompt and completions together
    timeout_s: float  # whole episode; beyond it the episode is an infrastructure fault
    temperature: float
    piece_tokens: int = PIECE_TOKENS  # a longer turn is asked for in pieces, each of them safe


@dataclass(slots=True)
class Progress:
    """What is known of an episode so far, kept outside its coroutine: for a timeout to report, and
    for whoever takes the episode back."""

    phase: str = "reset"
    turns: int = 0  # whole ones
    tokens: int = 0  # chosen by the policy
    saved_tokens: int = 0  # of those, sampled before an engine or a worker died
    requests: int = 0
    request_id: str = ""  # of the turn being generated
    generate_s: float = 0.0
    environment_s: float = 0.0
    taken_back: bool = False


class _Transcript:
    """One growing context of an episode: tokens are appended, never rewritten."""

    def __init__(self, prompt: np.ndarray) -> None:
        self.tokens = [prompt]
        self.masks = [np.zeros(prompt.size, np.bool_)]
        self.logprobs = [np.zeros(prompt.size, np.float32)]
        self.versions = [np.full(prompt.size, -1, np.int32)]
        self.turns = [np.full(prompt.size, -1, np.int16)]

    def add_completion(self, completion: Completion, turn: int) -> None:
        size = completion.token_ids.size
        self.tokens.append(completion.token_ids)
        self.masks.append(np.ones(size, np.bool_))
        self.logprobs.append(completion.logprobs)
        self.versions.append(completion.versions)
        self.turns.append(np.full(size, turn, np.int16))

    def add_observation(self, tokens: np.ndarray) -> None:
        self.tokens.append(tokens)
        self.masks.append(np.zeros(tokens.size, np.bool_))
        self.logprobs.append(np.zeros(tokens.size, np.float32))
        self.versions.append(np.full(tokens.size, -1, np.int32))
        self.turns.append(np.full(tokens.size, -1, np.int16))

    def prompt(self) -> np.ndarray:
        """Everything so far as one array; later calls start with exactly these tokens. [T] int32"""
        self.tokens = [np.concatenate(self.tokens)]
        return self.tokens[0]

    def freeze(self) -> Context:
        """The context up to its last chosen token: what follows was seen by nobody."""
        mask = np.concatenate(self.masks)
        end = int(mask.nonzero()[0][-1]) + 1 if mask.any() else 0
        return Context(
            token_ids=np.concatenate(self.tokens)[:end].astype(np.int32),
            action_mask=mask[:end],
            behavior_logprobs=np.concatenate(self.logprobs)[:end].astype(np.float32),
            policy_versions=np.concatenate(self.versions)[:end].astype(np.int32),
            turn_ids=np.concatenate(self.turns)[:end].astype(np.int16),
        )


async def play_episode(
    env: Env,
    task: Task,
    attempt: int,
    generate: Generate,
    chat: "ChatFormat",
    limits: EpisodeLimits,
    *,
    seed: int,
    priority: int,
    another: Another | None = None,
    progress: Progress | None = None,
    record: EpisodeRecord | None = None,
) -> Rollout:
    """Play `task` once. Never raises for what the policy, the environment or the engine did: a
    fault of the infrastructure comes back as a rollout whose outcome is `infra_fault` and whose
    `fault` says what broke. A lost engine is no fault where `another` finds one to go on with.
    What `record` has from a former life of the episode is said again, not asked for.

    Two things go through: `TaskError` (the task is to be quarantined), and `TakenBack`.
    """
    progress = Progress() if progress is None else progress
    started = time.monotonic()
    speaker = _Speaker(
        generate=generate,
        another=another,
        chat=chat,
        limits=limits,
        session=f"{task.id}/{attempt}/{seed:x}",
        seed=seed,
        priority=priority,
        progress=progress,
        record=record,
    )
    try:
        async with asyncio.timeout(limits.timeout_s) as deadline:
            speaker.deadline = deadline
            rollout = await _play(env, task, attempt, speaker)
    except (TaskError, TakenBack):
        raise
    except Exception as error:  # noqa: BLE001 a world may raise anything; the fault is data
        if isinstance(error, TimeoutError) and deadline.expired():  # not one that the world raised
            fault = f"timeout: {limits.timeout_s:g} s passed in {progress.phase}"
            fault += f", turn {progress.turns}"
        else:
            who = "engine" if progress.phase == "generate" else task.environment
            fault = f"{who} raised in {progress.phase}: {type(error).__name__}: {error}"
    else:
        return replace(rollout, seconds={**rollout.seconds, "total": time.monotonic() - started})
    return Rollout(
        task_id=task.id,
        environment=task.environment,
        environment_version=env.spec.version,
        scenario=task.scenario,
        attempt=attempt,
        contexts=(),
        reward=0.0,
        success=False,
        end_reason=EndReason.TIMEOUT if fault.startswith("timeout") else EndReason.ERROR,
        outcome=Outcome.INFRA_FAULT,
        turns=progress.turns,
        fault=fault,
        seconds={"total": time.monotonic() - started},
    )


async def _play(env: Env, task: Task, attempt: int, speaker: "_Speaker") -> Rollout:
    chat, limits, progress = speaker.chat, speaker.limits, speaker.progress
    observation = await _timed(env.reset(task), progress, "reset")
    transcript = _Transcript(chat.open(observation.messages, observation.tools))
    former: list[Context] = []  # contexts that the environment has replaced by fresh ones
    signals: Counter[str] = Counter()
    end_reason = EndReason.MAX_TURNS
    policy_fault = False
    max_turns = limits.max_turns or env.spec.max_turns
    while progress.turns < max_turns:
        prompt = transcript.prompt()
        room = limits.max_context - prompt.size
        if room < 1:
            end_reason, policy_fault = EndReason.LENGTH, True
            break
        completion = await speaker.turn(prompt, min(limits.max_new_tokens, room))
        transcript.add_completion(completion, progress.turns)
        progress.turns += 1
        step = await _timed(env.step(chat.decode(completion.token_ids)), progress, "step")
        signals.update(step.signals)
        if step.terminated:
            end_reason = EndReason.DONE
            break
        if progress.turns >= max_turns:
            break
        if step.observation.fresh:
            former.append(transcript.freeze())
            transcript = _Transcript(chat.open(step.observation.messages, step.observation.tools))
        else:
            transcript.add_observation(_reply(step, completion, chat))
    verdict = await _timed(env.evaluate(), progress, "evaluate")
    if not np.isfinite(verdict.reward):
        raise ValueError(f"evaluate() gave reward {verdict.reward}, expected a finite number")
    return Rollout(
        task_id=task.id,
        environment=task.environment,
        environment_version=env.spec.version,
        scenario=task.scenario,
        attempt=attempt,
        contexts=(*former, transcript.freeze()),
        reward=float(verdict.reward),
        success=bool(verdict.success),
        reward_parts={k: float(v) for k, v in verdict.parts.items()},
        end_reason=end_reason,
        outcome=Outcome.POLICY_FAULT if policy_fault else Outcome.SCORED,
        turns=progress.turns,
        seconds={"generate": progress.generate_s, "environment": progress.environment_s},
        tool_errors=dict(signals),
        saved_tokens=progress.saved_tokens,
    )


@dataclass(slots=True, kw_only=True)
class _Speaker:
    """Gets the policy's turns from an engine, and from another one when that is lost."""

    generate: Generate
    another: Another | None
    chat: "ChatFormat"
    limits: EpisodeLimits
    session: str
    seed: int
    priority: int
    progress: Progress
    record: EpisodeRecord | None = None
    deadline: asyncio.Timeout | None = None

    async def turn(self, prompt: np.ndarray, budget: int) -> Completion:
        """One turn after `prompt` [T] int32, of at most `budget` tokens.

        What an engine has handed out stays: the next one, or the same one after an abort, is asked
        to go on from exactly these tokens, at the place of the random stream where it stopped.
        """
        progress = self.progress
        pieces = self._recorded(prompt)
        progress.phase = "generate"
        seed = turn_seed(self.seed, progress.turns)
        sampled = sum(p.token_ids.size for p in pieces)
        before = time.monotonic()
        while not self._ended(pieces, budget):
            progress.requests += 1
            progress.request_id = f"{self.session}/{progress.turns}.{progress.requests}"
            request = GenerateRequest(
                request_id=progress.request_id,
                session=self.session,
                prompt_ids=np.concatenate([prompt, *(p.token_ids for p in pieces)]),
                max_new_tokens=min(budget - sampled, self.limits.piece_tokens),
                stop_token_ids=self.chat.stop_token_ids,
                temperature=self.limits.temperature,
                seed=seed,
                sampled=sampled,
                priority=self.priority,
            )
            try:
                piece = await self.generate(request)
            except EngineLost as error:
                await self._go_elsewhere(error)
                continue
            finally:
                progress.request_id = ""
            pieces.append(piece)
            sampled += piece.token_ids.size
            progress.tokens += piece.token_ids.size
            if progress.taken_back:
                raise TakenBack
            if self.record is not None:
                self.record.add(progress.turns, prompt, piece)
            if piece.finish_reason is FinishReason.CANCELLED and sampled < budget:
                await asyncio.sleep(0 if piece.token_ids.size else _ABORTED_PAUSE_S)
        progress.generate_s += time.monotonic() - before
        return _joined(pieces)

    def _recorded(self, prompt: np.ndarray) -> list[Completion]:
        """What a former life of the episode has of this turn."""
        if self.record is None:
            return []
        progress = self.progress
        progress.phase = "resume"
        pieces = self.record.pieces(progress.turns, prompt)
        if pieces:
            progress.tokens += sum(p.token_ids.size for p in pieces)
            progress.saved_tokens = progress.tokens
        return pieces

    def _ended(self, pieces: list[Completion], budget: int) -> bool:
        """Whether a turn of these pieces is whole: the last was not cut short by its own length, or
        by the engine."""
        if not pieces:
            return False
        last, sampled = pieces[-1], sum(p.token_ids.size for p in pieces)
        if last.finish_reason is FinishReason.STOP or sampled >= budget:
            return True
        asked = min(budget - sampled + last.token_ids.size, self.limits.piece_tokens)
        # a shorter one has filled the engine's context
        return last.finish_reason is FinishReason.LENGTH and last.token_ids.size != asked

    async def _go_elsewhere(self, error: EngineLost) -> None:
        """Wait for another engine; the clock of the episode stands still meanwhile."""
        if self.another is None:
            raise error
        self.progress.request_id = ""  # nothing is being generated
        loop, deadline = asyncio.get_running_loop(), self.deadline
        ends = deadline.when() if deadline is not None else None
        before = loop.time()
        if deadline is not None:
            deadline.reschedule(None)
        self.generate = await self.another(str(error))
        if deadline is not None and ends is not None:
            deadline.reschedule(ends + loop.time() - before)
        if self.progress.taken_back:
            raise TakenBack
        self.progress.saved_tokens = self.progress.tokens


def _joined(pieces: list[Completion]) -> Completion:
    """The pieces of a turn as one completion, which ended as the last of them did."""
    if len(pieces) == 1 and pieces[0].finish_reason is not FinishReason.CANCELLED:
        return pieces[0]
    ended = pieces[-1].finish_reason
    return Completion(
        request_id=pieces[0].request_id,
        token_ids=np.concatenate([p.token_ids for p in pieces]),
        logprobs=np.concatenate([p.logprobs for p in pieces]),
        versions=np.concatenate([p.versions for p in pieces]),
        finish_reason=FinishReason.LENGTH if ended is FinishReason.CANCELLED else ended,
    )


def _reply(step: Step, completion: Completion, chat: "ChatFormat") -> np.ndarray:
    """The environment's reply as tokens; a turn cut off by its budget is closed by the template's
    own end."""
    cut = completion.finish_reason is not FinishReason.STOP
    last = None if cut or not completion.token_ids.size else int(completion.token_ids[-1])
    return chat.extend(step.observation.messages, last)


async def _timed(call: Awaitable[T], progress: Progress, phase: str) -> T:
    progress.phase = phase
    before = time.monotonic()
    try:
        return await call
    finally:
        progress.environment_s += time.monotonic() - before


def turn_seed(seed: int, turn: int) -> int:
    """The seed of one turn of an episode with this seed."""
    return (seed * 1_000_003 + turn) & 0x7FFF_FFFF_FFFF_FFFF
