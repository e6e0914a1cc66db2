"""Demonstrations as tokens: exactly what an engine that did the same would have left behind."""

import asyncio
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopwright.actors.chat import ChatFormat
from loopwright.actors.demonstrations import demonstrate, key_tokens, texts, tokenize
from loopwright.actors.episode import EpisodeLimits, play_episode
from loopwright.actors.tiny_model import train_tokenizer
from loopwright.actors.warm_start import WarmStarter
from loopwright.algorithms.records import Context, EndReason
from loopwright.envs import registry
from loopwright.envs.actions import tool_name_span
from loopwright.envs.protocol import EnvError
from tests.scripted import TASK, ScriptedEngine, ScriptedEnv, reply
from tests.tiny_run import WORLD, recorded

LIMITS = EpisodeLimits(
    max_turns=20, max_new_tokens=64, max_context=1024, timeout_s=60, temperature=1.0
)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(train_tokenizer(texts(asyncio.run(recorded(20))), vocab_size=400))


async def _played(env: Any, task: Any, actions: list[str], chat: ChatFormat) -> Context:
    """The context of an episode whose engine says these actions, each with its stop token."""
    stop = chat.tokenizer.eos_token_id
    says = [[*chat.tokenizer.encode(a, add_special_tokens=False), stop] for a in actions]
    engine = ScriptedEngine(says=says)
    rollout = await play_episode(env, task, 0, engine, chat, LIMITS, seed=0, priority=0)
    assert (rollout.fault, rollout.end_reason, rollout.success) == ("", EndReason.DONE, True)
    return rollout.contexts[0]


def test_a_demonstration_is_the_episode_an_engine_would_have_played(chat: ChatFormat) -> None:
    env: Any = registry.load("officeworld", {**WORLD, "scenarios": None, "difficulty": [1, 2]})

    async def compare() -> int:
        turns = 0
        for task in islice(env.tasks("train", 3), 12):
            demonstration = await demonstrate(env, task)
            actions = [action for action, _ in demonstration.turns]
            played = await _played(env, task, actions, chat)
            (cloned,) = tokenize(demonstration, chat)
            np.testing.assert_array_equal(cloned.token_ids, played.token_ids)
            np.testing.assert_array_equal(cloned.action_mask, played.action_mask)
            np.testing.assert_array_equal(cloned.turn_ids, played.turn_ids)
            turns += len(actions)
        return turns

    assert asyncio.run(compare()) > 24


def test_every_action_is_learned_with_its_end(chat: ChatFormat) -> None:
    (demonstration,) = asyncio.run(recorded(1))
    (context,) = tokenize(demonstration, chat)
    for turn, (action, _) in enumerate(demonstration.turns):
        ids = context.token_ids[context.turn_ids == turn]
        assert chat.decode(ids) == action
        assert int(ids[-1]) == chat.tokenizer.eos_token_id
    assert context.action_mask[-1], "what follows the last action was seen by nobody"


def test_a_world_without_an_oracle_is_named() -> None:
    env = ScriptedEnv(steps=[reply("ok")])
    with pytest.raises(EnvError, match="scripted has no oracle for task task 0"):
        asyncio.run(demonstrate(env, TASK))


def test_key_tokens_are_those_that_name_the_tool(chat: ChatFormat) -> None:
    for demonstration in asyncio.run(recorded(4)):
        contexts = tokenize(demonstration, chat)
        (context,), (mask,) = contexts, key_tokens(demonstration, contexts, chat)
        for turn, (action, _) in enumerate(demonstration.turns):
            named = context.token_ids[mask & (context.turn_ids == turn)]
            assert chat.decode(named) == action.partition("(")[0]
        assert not mask[~context.action_mask].any()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("payments.send(to=17)", "payments.send"),
        ('<think>send</think>{"name": "send", "arguments": {}}', "send"),
        ("nothing", None),
    ],
)
def test_the_span_of_a_tools_name(text: str, name: str | None) -> None:
    span = tool_name_span(text)
    assert (None if span is None else text[slice(*span)]) == name
    assert span is None or span[0] > text.rfind("</think>")


def test_weights_are_those_of_the_loss_and_off_by_default(tmp_path: Path) -> None:
    """One step of cloning: with key tokens weighed the first loss is the weighted mean."""
    found = asyncio.run(recorded(2))
    shape = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16}
    starter = WarmStarter(1)
    base = starter.build_tiny(found, str(tmp_path / "base"), {**shape, "vocab_size": 400})
    options = {"steps": 1, "batch": 2, "lr": 1e-9}
    plain, off, full = (
        starter.clone(found, base, str(tmp_path / name), {**options, **more}).loss_first
        for name, more in (
            ("plain", {}),
            ("off", {"key_token_weight": 0.0}),
            ("full", {"key_token_weight": 1.0}),
        )
    )
    assert plain == off and full > 1.2 * plain
