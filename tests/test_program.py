"""Agents that own their loop, played as environments: contexts, ends, faults, the kit."""

import asyncio
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopwright.actors.chat import ChatFormat
from loopwright.actors.demonstrations import demonstrate
from loopwright.actors.engine import Completion, FinishReason, GenerateRequest
from loopwright.actors.episode import EpisodeLimits, play_episode
from loopwright.actors.tiny_model import train_tokenizer
from loopwright.algorithms.records import EndReason, Outcome, Rollout
from loopwright.envs.conformance import RULES, Kit, check
from loopwright.envs.program import ProgramEnv
from loopwright.envs.protocol import EnvError
from loopwright.envs.registry import load

WORLDS = Path(__file__).parent / "program_worlds.py"
LIMITS = EpisodeLimits(
    max_turns=0, max_new_tokens=16, max_context=400, timeout_s=20, temperature=1.0
)
CHAT = ChatFormat(
    train_tokenizer(["plan shorter help now say it: n0 n2 a b c ok 0 1"] * 3, vocab_size=320)
)


class Says:
    """An engine that says these texts in turn, and keeps what it was asked."""

    def __init__(self, *said: str) -> None:
        self._said = said
        self.asked: list[list[int]] = []

    async def __call__(self, request: GenerateRequest) -> Completion:
        text = self._said[len(self.asked)]
        self.asked.append(request.prompt_ids.tolist())
        ids = CHAT.tokenizer.encode(text, add_special_tokens=False)
        tokens = np.asarray([*ids, CHAT.stop_token_ids[0]], np.int32)
        return Completion(
            request_id=request.request_id,
            token_ids=tokens,
            logprobs=np.zeros(tokens.size, np.float32),
            versions=np.zeros(tokens.size, np.int32),
            finish_reason=FinishReason.STOP,
        )


def relay(**options: Any) -> ProgramEnv:
    """The program, loaded as a user's is."""
    env = load(f"{WORLDS}:Relay", options)
    assert isinstance(env, ProgramEnv)
    return env


def played(env: ProgramEnv, engine: Says, **limits: Any) -> Rollout:
    """Its first episode."""

    async def play() -> Rollout:
        from dataclasses import replace

        task = next(env.tasks("train", 0))
        chosen = replace(LIMITS, **limits)
        rollout = await play_episode(env, task, 0, engine, CHAT, chosen, seed=1, priority=0)
        await env.close()
        return rollout

    return asyncio.run(play())


def test_a_conversation_that_goes_on_is_one_context_and_others_are_fresh() -> None:
    engine = Says("a b", "c", "ok 0", "ok 1", "n0")
    rollout = played(relay(), engine)
    assert rollout.outcome is Outcome.SCORED and rollout.reward == 1.0 and rollout.turns == 5
    assert rollout.end_reason is EndReason.DONE
    turns = [sorted({int(t) for t in c.turn_ids if t >= 0}) for c in rollout.contexts]
    assert turns == [[0, 1], [2], [3], [4]]
    said = CHAT.tokenizer.encode("a b", add_special_tokens=False)
    first, second = engine.asked[:2]
    assert second[: len(first) + len(said)] == [*first, *said], "not one token was made anew"
    chosen = sum(int(c.action_mask.sum()) for c in rollout.contexts)
    assert chosen == rollout.generated_tokens > 10


def test_a_budget_that_runs_out_ends_the_program_and_is_graded() -> None:
    rollout = played(relay(), Says("a", "b"), max_turns=2)
    assert rollout.end_reason is EndReason.MAX_TURNS and rollout.outcome is Outcome.SCORED
    assert rollout.reward == 0.0


def test_what_a_program_raises_is_a_fault_and_names_it() -> None:
    rollout = played(relay(fails=True), Says("a"))
    assert rollout.outcome is Outcome.INFRA_FAULT
    assert rollout.fault == "relay raised in step: ConnectionError: the tool is away"


def test_a_program_that_never_asks_is_refused() -> None:
    env = load(f"{WORLDS}:Silent")
    with pytest.raises(EnvError, match="ended without asking"):
        asyncio.run(env.reset(next(env.tasks("train", 0))))


def test_a_program_keeps_every_rule_of_the_kit() -> None:
    assert asyncio.run(check(relay)) == []


def test_a_harness_that_speaks_http_is_one_context_token_by_token() -> None:
    env = load(f"{WORLDS}:Harness")
    assert isinstance(env, ProgramEnv)
    call = ' {"name":"look", "arguments": {"shelf": 1}}'  # not as a client would write it again
    engine = Says(call, "n0")
    rollout = played(env, engine, max_new_tokens=60)
    assert rollout.reward == 1.0, rollout.fault
    assert len(rollout.contexts) == 1 and rollout.turns == 2
    said = CHAT.tokenizer.encode(call, add_special_tokens=False)
    first, second = engine.asked
    assert second[: len(first) + len(said)] == [*first, *said]
    assert "'messages' is empty" in env.program.refusal["error"]["message"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", ["survives_text", "starts_over", "cancel_leaks"])
def test_the_harness_keeps_the_rule(rule: str) -> None:
    """A cancelled episode leaves no server behind."""

    async def findings() -> list[tuple[str, str]]:
        tasks = list(islice(load(f"{WORLDS}:Harness").tasks("train", 0), 1))
        kit = Kit(factory=lambda: load(f"{WORLDS}:Harness"), tasks=tasks, seed=0)
        found = [one async for one in RULES[rule](kit)]
        await kit.close()
        return found

    assert asyncio.run(findings()) == []


def test_it_has_nothing_to_clone_from() -> None:
    async def scene() -> None:
        env = relay()
        (task,) = islice(env.tasks("train", 0), 1)
        with pytest.raises(EnvError, match="no oracle"):
            await demonstrate(env, task)
        await env.close()

    asyncio.run(scene())
