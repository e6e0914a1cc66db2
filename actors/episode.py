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
from loopwright.algorithms.records import Context, EndReason, Outcome, Rollout
from loopwright.envs.protocol import Env, Step, Task, TaskError

if TYPE_CHECKING:  # the controller reads the limits and error types only, without transformers
    from loopwright.actors.chat import ChatFormat

T = TypeVar("T")
ENGINE_FAULT = "engine lost"  # how the fault of a rollout whose engine died begins
Generate = Callable[[GenerateRequest], Awaitable[Completion]]


class EngineLost(Exception):
    """The engine that served an episode died or does not answer: an infrastructure fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeLimits:
    """Budgets of one episode; a budget that runs out truncates it, and it is still graded."""

    max_turns: int  # 0: the environment's own budget
    max_new_tokens: int  # per turn
    max_context: int  # tokens, prompt and completions together
    timeout_s: float  # whole episode; beyond it the episode is an infrastructure fault
    temperature: float


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


@dataclass(slots=True)
class _Progress:
    """What is known of an episode so far, kept outside the coroutine so that a timeout can still
    report it."""

    phase: str = "reset"
    turns: int = 0
    generate_s: float = 0.0
    environment_s: float = 0.0


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
) -> Rollout:
    """Play `task` once. Never raises for what the policy, the environment or the engine did: a
    fault of the infrastructure comes back as a rollout whose outcome is `infra_fault` and whose
    `fault` says what broke. Only `TaskError` goes through: the task is to be quarantined."""
    progress = _Progress()
    started = time.monotonic()
    session = f"{task.id}/{attempt}/{seed:x}"
    try:
        async with asyncio.timeout(limits.timeout_s) as deadline:
            rollout = await _play(
                env, task, attempt, generate, chat, limits, seed, priority, session, progress
            )
    except EngineLost as error:
        fault = f"{ENGINE_FAULT}: {error}"
    except TaskError:
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


async def _play(
    env: Env,
    task: Task,
    attempt: int,
    generate: Generate,
    chat: "ChatFormat",
    limits: EpisodeLimits,
    seed: int,
    priority: int,
    session: str,
    progress: _Progress,
) -> Rollout:
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
        progress.phase = "generate"
        before = time.monotonic()
        completion = await generate(
            GenerateRequest(
                request_id=f"{session}/{progress.turns}",
                session=session,
                prompt_ids=prompt,
                max_new_tokens=min(limits.max_new_tokens, room),
                stop_token_ids=chat.stop_token_ids,
                temperature=limits.temperature,
                seed=_turn_seed(seed, progress.turns),
                priority=priority,
            )
        )
        progress.generate_s += time.monotonic() - before
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
    )


def _reply(step: Step, completion: Completion, chat: "ChatFormat") -> np.ndarray:
    """The environment's reply as tokens; a turn cut off by its budget is closed by the template's
    own end."""
    cut = completion.finish_reason is not FinishReason.STOP
    last = None if cut or not completion.token_ids.size else int(completion.token_ids[-1])
    return chat.extend(step.observation.messages, last)


async def _timed(call: Awaitable[T], progress: _Progress, phase: str) -> T:
    progress.phase = phase
    before = time.monotonic()
    try:
        return await call
    finally:
        progress.environment_s += time.monotonic() - before


def _turn_seed(seed: int, turn: int) -> int:
    return (seed * 1_000_003 + turn) & 0x7FFF_FFFF_FFFF_FFFF
