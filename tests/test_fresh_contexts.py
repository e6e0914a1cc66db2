"""Contexts that an environment rewrites: one training instance each, of one rollout."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from loopwright.actors.chat import ChatFormat
from loopwright.actors.demonstrations import demonstrate, tokenize
from loopwright.actors.episode import EpisodeLimits, play_episode
from loopwright.actors.tiny_model import train_tokenizer
from loopwright.algorithms.batching import build_batch
from loopwright.algorithms.records import EndReason, Group, Outcome, Rollout
from loopwright.envs.protocol import Message, Observation, Step, Verdict
from tests.scripted import TASK, ScriptedEngine, ScriptedEnv, reply


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(train_tokenizer(["office find Ana = 17 . ok done state"] * 3, vocab_size=320))


def _fresh(text: str) -> Step:
    return Step(observation=Observation(messages=[Message(role="user", content=text)], fresh=True))


SCRIPT = [reply("ok"), _fresh("find Ana state 17"), _fresh("find Ana state done")]
ACTIONS = ("find Ana", "17 ok", "state", "done")


def _play(
    chat: ChatFormat,
    actions: Sequence[str],
    reward: float = 1.0,
    script: Sequence[Step] = SCRIPT,
    **limits: Any,
) -> Rollout:
    stop = chat.stop_token_ids[-1]
    says: list[Any] = [[*chat.tokenizer.encode(a, add_special_tokens=False), stop] for a in actions]
    env = ScriptedEnv(
        steps=[*script, reply("", terminated=True)],
        verdict=Verdict(reward=reward, success=reward == 1.0),
    )
    chosen = {"max_turns": 4, "max_new_tokens": 8, "max_context": 200, **limits}
    budget = EpisodeLimits(timeout_s=30.0, temperature=1.0, **chosen)
    return asyncio.run(
        play_episode(env, TASK, 0, ScriptedEngine(says=says), chat, budget, seed=5, priority=0)
    )


def test_the_prefix_goes_on_or_a_new_instance_begins(chat: ChatFormat) -> None:
    rollout = _play(chat, ACTIONS)
    turns = [sorted({int(t) for t in c.turn_ids if t >= 0}) for c in rollout.contexts]
    assert turns == [[0, 1], [2], [3]] and rollout.turns == 4
    for context, opening in zip(
        rollout.contexts[1:], ("find Ana state 17", "find Ana state done"), strict=True
    ):
        opened = chat.open([Message(role="user", content=opening)])
        assert context.token_ids[: opened.size].tolist() == opened.tolist()
        assert not context.action_mask[: opened.size].any() and context.action_mask[-1]
    # what the engine said is in exactly one instance, whole
    assert rollout.generated_tokens == sum(
        len(chat.tokenizer.encode(a, add_special_tokens=False)) + 1 for a in ACTIONS
    )
    said = np.concatenate([c.behavior_logprobs[c.action_mask] for c in rollout.contexts])
    assert said[0] == 0 and said[-1] <= -3, "logprobs of the scripted engine, in order"


def test_turns_that_run_out_leave_no_instance_that_nobody_acted_in(chat: ChatFormat) -> None:
    rollout = _play(chat, ACTIONS, max_turns=3)
    assert rollout.end_reason is EndReason.MAX_TURNS
    assert len(rollout.contexts) == 2 and all(c.action_mask.any() for c in rollout.contexts)


def test_a_fresh_context_that_does_not_fit_is_the_policys_fault(chat: ChatFormat) -> None:
    room = _play(chat, ACTIONS).contexts[0].token_ids.size
    script = [reply("ok"), _fresh("find Ana state 17 " * room), reply("ok")]
    rollout = _play(chat, ACTIONS, script=script, max_context=room)
    assert (rollout.end_reason, rollout.outcome) == (EndReason.LENGTH, Outcome.POLICY_FAULT)
    assert rollout.turns == 2 and rollout.contexts[0].token_ids.size == room
    group = Group(ticket=0, task_id=TASK.id, rollouts=(rollout, _play(chat, ACTIONS, 0.0)))
    assert build_batch([group], 4, version=3)[1].sequences == 4, "what nobody acted in is left out"


def test_a_demonstration_makes_the_contexts_that_the_engine_would_have_seen(
    chat: ChatFormat,
) -> None:
    env = ScriptedEnv(steps=[*SCRIPT, reply("", terminated=True)], actions=ACTIONS)
    cloned = tokenize(asyncio.run(demonstrate(env, TASK)), chat)
    played = _play(chat, ACTIONS).contexts
    assert len(cloned) == len(played) == 3
    for mine, theirs in zip(cloned, played, strict=True):
        np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(mine.action_mask, theirs.action_mask)
        np.testing.assert_array_equal(mine.turn_ids, theirs.turn_ids)


def test_the_rollouts_advantage_is_on_all_its_instances(chat: ChatFormat) -> None:
    rollouts = (_play(chat, ACTIONS, 1.0), _play(chat, ACTIONS, 0.0))
    group = Group(ticket=0, task_id=TASK.id, rollouts=rollouts)
    batch, report = build_batch([group], 4, version=3)
    assert (report.rollouts, report.trained_rollouts, report.sequences) == (2, 2, 6)
    assert batch.rollout_count == 2, "a rollout counts once, however many instances it has"
    assert batch.rollout_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.advantages.tolist() == [1, 1, 1, -1, -1, -1]
