"""One episode against scripted engines and worlds: tokens kept, budgets, and who is blamed."""

import asyncio
from typing import Any

import numpy as np
import pytest

from loopwright.actors.chat import ChatFormat
from loopwright.actors.episode import (
    EngineLost,
    EpisodeLimits,
    Progress,
    TakenBack,
    play_episode,
)
from loopwright.actors.tiny_model import train_tokenizer
from loopwright.algorithms.records import EndReason, Outcome, Rollout
from loopwright.envs.protocol import TaskError, Verdict
from tests.scripted import TASK, Aborted, ScriptedEngine, ScriptedEnv, reply


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(train_tokenizer(["office find Ana = 17 . ok done"] * 3, vocab_size=300))


def _limits(**changes: Any) -> EpisodeLimits:
    limits: dict[str, Any] = {
        "max_turns": 4,
        "max_new_tokens": 8,
        "max_context": 200,
        "timeout_s": 30.0,
        "temperature": 1.0,
    }
    return EpisodeLimits(**(limits | changes))


def _play(env: ScriptedEnv, engine: ScriptedEngine, chat: ChatFormat, **limits: Any) -> Rollout:
    return asyncio.run(
        play_episode(env, TASK, 2, engine, chat, _limits(**limits), seed=5, priority=7)
    )


def _ids(chat: ChatFormat, text: str, *, stop: bool = True) -> list[int]:
    ids = chat.tokenizer.encode(text, add_special_tokens=False)
    return [*ids, chat.stop_token_ids[-1]] if stop else ids


def _tokens(rollout: Rollout) -> list[int]:
    (context,) = rollout.contexts
    return [int(t) for t in context.token_ids]


def test_every_prompt_begins_with_all_tokens_so_far(chat: ChatFormat) -> None:
    says = [_ids(chat, "find Ana"), _ids(chat, "17 ok"), _ids(chat, "done")]
    engine = ScriptedEngine(says=list(says))
    env = ScriptedEnv(steps=[reply("= 17"), reply("ok"), reply("", terminated=True)])
    rollout = _play(env, engine, chat)
    tokens, at = _tokens(rollout), 0
    for request, said in zip(engine.asked, says, strict=True):
        prompt = request.prompt_ids.tolist()
        assert tokens[: len(prompt)] == prompt and len(prompt) > at
        at = len(prompt) + len(said)
        assert tokens[len(prompt) : at] == said
    assert at == len(tokens), "nothing follows the last token the policy chose"
    assert env.heard == ["find Ana", "17 ok", "done"]
    assert (rollout.end_reason, rollout.outcome) == (EndReason.DONE, Outcome.SCORED)
    assert (rollout.turns, rollout.attempt, rollout.reward) == (3, 2, 1.0)
    assert rollout.tool_errors == {"policy_fault/parse": 3}


def test_what_the_engine_said_is_what_is_recorded(chat: ChatFormat) -> None:
    """Tokens, logprobs, versions and turns; also tokens the tokenizer would write otherwise."""
    word = "find"
    letters = [i for c in word for i in chat.tokenizer.encode(c, add_special_tokens=False)]
    assert letters != _ids(chat, word, stop=False)
    stop = chat.stop_token_ids[-1]
    engine = ScriptedEngine(says=[[*letters, stop], [stop]])
    env = ScriptedEnv(steps=[reply("ok"), reply("", terminated=True)])
    rollout = _play(env, engine, chat)
    (context,) = rollout.contexts
    assert env.heard == [word, ""]
    chosen = context.action_mask
    assert context.token_ids[chosen].tolist() == [*letters, stop, stop]
    expected = [-i / 10 for i in range(len(letters) + 1)] + [-1.0]
    np.testing.assert_allclose(context.behavior_logprobs[chosen], expected)
    assert context.policy_versions[chosen].tolist() == [0] * (len(letters) + 1) + [1]
    assert context.turn_ids[chosen].tolist() == [0] * (len(letters) + 1) + [1]
    assert set(context.policy_versions[~chosen]) == set(context.turn_ids[~chosen]) == {-1}
    assert not context.behavior_logprobs[~chosen].any()


def test_turns_that_run_out_truncate_and_are_graded(chat: ChatFormat) -> None:
    engine = ScriptedEngine(says=[_ids(chat, "find Ana")] * 2)
    verdict = Verdict(reward=0.25, success=False, parts={"a": 0.5})
    rollout = _play(
        ScriptedEnv(steps=[reply("ok")] * 2, verdict=verdict), engine, chat, max_turns=2
    )
    assert (rollout.end_reason, rollout.outcome) == (EndReason.MAX_TURNS, Outcome.SCORED)
    assert (rollout.reward, rollout.reward_parts, rollout.turns) == (0.25, {"a": 0.5}, 2)
    assert _tokens(rollout)[-1] == chat.stop_token_ids[-1]


def test_a_full_context_ends_the_episode_as_the_policys_fault(chat: ChatFormat) -> None:
    engine = ScriptedEngine(says=[_ids(chat, "find Ana = 17 . ok", stop=False)] * 4)
    rollout = _play(ScriptedEnv(steps=[reply("ok")] * 4), engine, chat, max_context=34)
    assert (rollout.end_reason, rollout.outcome) == (EndReason.LENGTH, Outcome.POLICY_FAULT)
    assert rollout.turns >= 2 and len(_tokens(rollout)) <= 34
    assert engine.asked[0].max_new_tokens == 8
    last = engine.asked[-1]
    assert last.prompt_ids.size + last.max_new_tokens == 34


def test_a_completion_cut_off_is_closed_by_the_templates_own_end(chat: ChatFormat) -> None:
    whole = _ids(chat, "find Ana = 17 .", stop=False)
    engine = ScriptedEngine(says=[whole, _ids(chat, "done")])
    env = ScriptedEnv(steps=[reply("ok"), reply("", terminated=True)])
    rollout = _play(env, engine, chat, max_new_tokens=3)
    (context,) = rollout.contexts
    first, second = engine.asked
    cut = first.prompt_ids.size + 3
    tail = second.prompt_ids[cut:]
    stop = chat.stop_token_ids[-1]
    assert int(tail[0]) == stop and tail.tolist().count(stop) == 2  # the turn's, and the reply's
    assert not context.action_mask[cut], "the policy did not choose that token"
    assert context.token_ids[cut - 3 : cut].tolist() == whole[:3]


PHASES = [
    ("reset", ScriptedEnv(steps=[], opening=KeyError("gone"))),
    ("step", ScriptedEnv(steps=[KeyError("gone")])),
    ("evaluate", ScriptedEnv(steps=[reply("", terminated=True)], verdict=KeyError("gone"))),
]


@pytest.mark.parametrize(("phase", "env"), PHASES, ids=[p for p, _ in PHASES])
def test_a_world_that_raises_is_an_infra_fault(
    phase: str, env: ScriptedEnv, chat: ChatFormat
) -> None:
    rollout = _play(env, ScriptedEngine(says=[_ids(chat, "done")]), chat)
    assert (rollout.outcome, rollout.end_reason) == (Outcome.INFRA_FAULT, EndReason.ERROR)
    assert f"scripted raised in {phase}: KeyError" in rollout.fault
    assert rollout.contexts == () and rollout.reward == 0


def test_a_world_that_hangs_runs_into_the_timeout(chat: ChatFormat) -> None:
    env = ScriptedEnv(steps=[reply("ok"), asyncio.Event()])
    engine = ScriptedEngine(says=[_ids(chat, "find Ana"), _ids(chat, "done")])
    rollout = _play(env, engine, chat, timeout_s=0.2)
    assert (rollout.outcome, rollout.end_reason) == (Outcome.INFRA_FAULT, EndReason.TIMEOUT)
    assert rollout.fault == "timeout: 0.2 s passed in step, turn 2"


def test_an_engine_that_hangs_runs_into_the_timeout(chat: ChatFormat) -> None:
    rollout = _play(
        ScriptedEnv(steps=[]), ScriptedEngine(says=[asyncio.Event()]), chat, timeout_s=0.2
    )
    assert rollout.fault == "timeout: 0.2 s passed in generate, turn 0"


def test_a_worlds_own_timeout_is_the_worlds_fault(chat: ChatFormat) -> None:
    env = ScriptedEnv(steps=[TimeoutError("socket")])
    rollout = _play(env, ScriptedEngine(says=[_ids(chat, "done")]), chat)
    assert rollout.end_reason is EndReason.ERROR
    assert "scripted raised in step: TimeoutError: socket" in rollout.fault


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_an_infra_fault(reward: float, chat: ChatFormat) -> None:
    env = ScriptedEnv(
        steps=[reply("", terminated=True)], verdict=Verdict(reward=reward, success=True)
    )
    rollout = _play(env, ScriptedEngine(says=[_ids(chat, "done")]), chat)
    assert rollout.outcome is Outcome.INFRA_FAULT
    assert "expected a finite number" in rollout.fault and rollout.reward == 0


def test_a_broken_task_goes_through(chat: ChatFormat) -> None:
    with pytest.raises(TaskError, match="no such world"):
        _play(
            ScriptedEnv(steps=[], opening=TaskError("no such world")),
            ScriptedEngine(says=[]),
            chat,
        )


class TestPartialRollouts:
    """An engine dies, aborts or is told to stop: the tokens that were handed out stay."""

    @staticmethod
    def _resume(
        chat: ChatFormat,
        first: ScriptedEngine,
        second: ScriptedEngine,
        env: ScriptedEnv,
        **limits: Any,
    ) -> tuple[Rollout, list[str]]:
        reasons: list[str] = []

        async def another(why: str) -> ScriptedEngine:
            reasons.append(why)
            return second

        playing = play_episode(
            env, TASK, 2, first, chat, _limits(**limits), seed=5, priority=7, another=another
        )
        return asyncio.run(playing), reasons

    def test_an_episode_goes_on_elsewhere_from_its_tokens(self, chat: ChatFormat) -> None:
        said = [_ids(chat, "find Ana"), _ids(chat, "17 ok"), _ids(chat, "done")]
        steps = [reply("ok"), reply("ok"), reply("", terminated=True)]
        whole = _play(ScriptedEnv(steps=steps), ScriptedEngine(says=said), chat)
        dying = ScriptedEngine(says=[said[0], EngineLost("rollout 0: ActorDied")])
        heir = ScriptedEngine(says=said[1:])
        env = ScriptedEnv(steps=steps)
        rollout, reasons = self._resume(chat, dying, heir, env)
        assert _tokens(rollout) == _tokens(whole) and rollout.reward == whole.reward
        assert reasons == ["rollout 0: ActorDied"]
        assert env.heard == ["find Ana", "17 ok", "done"], "no turn is played twice"
        lost, again = dying.asked[1], heir.asked[0]
        assert again.prompt_ids.tolist() == lost.prompt_ids.tolist()
        assert (again.seed, again.sampled) == (lost.seed, 0) and again.session == lost.session
        assert rollout.saved_tokens == len(said[0])
        (context,) = rollout.contexts
        versions = context.policy_versions[context.action_mask].tolist()
        assert versions == [0] * len(said[0]) + [0] * len(said[1]) + [1] * len(said[2])

    def test_what_a_long_turn_has_so_far_outlives_the_engine(self, chat: ChatFormat) -> None:
        """It was asked for in pieces; the last one alone is sampled again."""
        text = _ids(chat, "find Ana = 17 . ok", stop=False)[:7]
        stop = chat.stop_token_ids[-1]
        dying = ScriptedEngine(says=[text[:3], text[3:6], EngineLost("gone")])
        heir = ScriptedEngine(says=[[text[6], stop]])
        env = ScriptedEnv(steps=[reply("", terminated=True)])
        rollout, _ = self._resume(chat, dying, heir, env, max_new_tokens=20, piece_tokens=3)
        (context,) = rollout.contexts
        assert context.token_ids[context.action_mask].tolist() == [*text, stop]
        assert env.heard == [chat.decode(np.array([*text, stop], np.int32))]
        assert [r.sampled for r in (*dying.asked, *heir.asked)] == [0, 3, 6, 6]
        assert {r.seed for r in (*dying.asked, *heir.asked)} == {dying.asked[0].seed}
        prompt = dying.asked[0].prompt_ids.tolist()
        assert heir.asked[0].prompt_ids.tolist() == prompt + text[:6]
        assert context.policy_versions[context.action_mask].tolist() == [0] * 3 + [1] * 3 + [0] * 2
        assert set(context.turn_ids[context.action_mask].tolist()) == {0}, "one turn all the same"
        assert (rollout.turns, rollout.saved_tokens) == (1, 6)

    def test_a_turn_in_pieces_keeps_its_budget(self, chat: ChatFormat) -> None:
        text = _ids(chat, "find Ana = 17 . ok", stop=False)[:7]
        engine = ScriptedEngine(says=[text[:3], text[3:6], text[6:]])
        env = ScriptedEnv(steps=[reply("", terminated=True)])
        rollout = _play(env, engine, chat, max_new_tokens=7, piece_tokens=3)
        assert [r.max_new_tokens for r in engine.asked] == [3, 3, 1]
        (context,) = rollout.contexts
        assert context.token_ids[context.action_mask].tolist() == text

    def test_an_aborted_sequence_goes_on_from_its_tokens(self, chat: ChatFormat) -> None:
        said = _ids(chat, "find Ana")
        engine = ScriptedEngine(says=[Aborted(said[:2]), Aborted([]), said[2:]])
        env = ScriptedEnv(steps=[reply("", terminated=True)])
        rollout = _play(env, engine, chat)
        (context,) = rollout.contexts
        assert context.token_ids[context.action_mask].tolist() == said
        assert [r.sampled for r in engine.asked] == [0, 2, 2]
        assert engine.asked[1].max_new_tokens == 8 - 2
        assert len({r.request_id for r in engine.asked}) == 3

    def test_the_clock_stands_still_while_no_engine_is_there(self, chat: ChatFormat) -> None:
        said = _ids(chat, "done")

        async def scenario() -> Rollout:
            async def another(_why: str) -> ScriptedEngine:
                await asyncio.sleep(0.4)
                return ScriptedEngine(says=[said])

            return await play_episode(
                ScriptedEnv(steps=[reply("", terminated=True)]),
                TASK,
                0,
                ScriptedEngine(says=[EngineLost("gone")]),
                chat,
                _limits(timeout_s=0.3),
                seed=0,
                priority=0,
                another=another,
            )

        assert asyncio.run(scenario()).outcome is Outcome.SCORED

    def test_without_another_engine_it_is_a_fault(self, chat: ChatFormat) -> None:
        engine = ScriptedEngine(says=[EngineLost("rollout 0: ActorDied")])
        rollout = _play(ScriptedEnv(steps=[]), engine, chat)
        assert rollout.outcome is Outcome.INFRA_FAULT
        assert rollout.fault == "engine raised in generate: EngineLost: rollout 0: ActorDied"

    def test_taken_back_it_has_no_rollout(self, chat: ChatFormat) -> None:
        progress = Progress(taken_back=True)
        said = _ids(chat, "find Ana")
        with pytest.raises(TakenBack):
            asyncio.run(
                play_episode(
                    ScriptedEnv(steps=[]),
                    TASK,
                    0,
                    ScriptedEngine(says=[Aborted(said[:2])]),
                    chat,
                    _limits(),
                    seed=0,
                    priority=0,
                    progress=progress,
                )
            )
        assert (progress.tokens, progress.turns) == (2, 0)


def test_an_engine_that_refuses_is_not_blamed_on_the_world(chat: ChatFormat) -> None:
    engine = ScriptedEngine(says=[ValueError("too long")])
    rollout = _play(ScriptedEnv(steps=[]), engine, chat)
    assert rollout.fault == "engine raised in generate: ValueError: too long"


def test_requests_carry_session_seed_and_priority(chat: ChatFormat) -> None:
    engine = ScriptedEngine(says=[_ids(chat, "find Ana"), _ids(chat, "done")])
    env = ScriptedEnv(steps=[reply("ok"), reply("", terminated=True)])
    _play(env, engine, chat)
    first, second = engine.asked
    assert first.session == second.session and first.request_id != second.request_id
    assert first.seed != second.seed and first.priority == second.priority == 7
    again = ScriptedEngine(says=[_ids(chat, "find Ana"), _ids(chat, "done")])
    _play(env, again, chat)
    assert [r.seed for r in again.asked] == [first.seed, second.seed]
