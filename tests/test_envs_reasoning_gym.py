"""The adapter to the real reasoning-gym package."""

import asyncio
import itertools
import sys

import pytest

from loopwright.envs.conformance import check
from loopwright.envs.protocol import EnvError, Step, TaskError, Verdict
from loopwright.envs.reasoning_gym import ReasoningGym

pytest.importorskip("reasoning_gym")


async def answer(env: ReasoningGym, *texts: str) -> tuple[list[Step], Verdict]:
    await env.reset(next(env.tasks("train", 0)))
    steps = [await env.step(text) for text in texts]
    return steps, await env.evaluate()


@pytest.mark.parametrize("dataset", ["chain_sum", "prime_factorization", "letter_counting"])
def test_conforms(dataset: str) -> None:
    assert asyncio.run(check(lambda: ReasoningGym(dataset=dataset, size=2000))) == []


def test_questions_of_the_splits_are_disjoint() -> None:
    async def questions(split: str) -> set[str]:
        env = ReasoningGym(dataset="basic_arithmetic", size=500, min_terms=2, max_terms=2)
        drawn = itertools.islice(env.tasks(split, 1), 200)
        return {(await env.reset(task)).messages[1].content for task in drawn}

    train, test = asyncio.run(questions("train")), asyncio.run(questions("test"))
    assert train and test and not train & test


def test_config_reaches_the_data_set() -> None:
    env = ReasoningGym(min_terms=3, max_terms=3, min_digits=1, max_digits=1)
    question = asyncio.run(env.reset(next(env.tasks("test", 0)))).messages[1].content
    assert question.count("+") + question.count("-") == 2


def test_scorer_that_raises_on_text_gives_nothing() -> None:
    env = ReasoningGym(dataset="prime_factorization")
    steps, verdict = asyncio.run(answer(env, "<answer>a × b</answer>"))
    assert steps[0].signals == {"policy_fault/scorer_error": 1}
    assert (verdict.reward, verdict.success) == (0.0, False)


def test_tries_and_missing_tags() -> None:
    env = ReasoningGym(tries=3)
    asyncio.run(env.reset(next(env.tasks("train", 0))))
    right = next(env.oracle())
    steps, verdict = asyncio.run(answer(env, "I think so", "<answer>x</answer>", right, right))
    assert [s.terminated for s in steps] == [False, False, True, True]
    assert steps[0].signals == {"policy_fault/parse": 1}
    assert verdict.success and verdict.reward == 1.0
    steps, verdict = asyncio.run(answer(ReasoningGym(), "nothing tagged"))
    assert steps[0].terminated and verdict.reward == 0.0


def test_bad_options_name_the_nearest() -> None:
    with pytest.raises(EnvError, match="chain_sum"):
        ReasoningGym(dataset="chain_sun")
    with pytest.raises(EnvError, match="min_terms"):
        ReasoningGym(min_term=3)
    with pytest.raises(EnvError, match="refuses"):
        ReasoningGym(min_terms=5, max_terms=2)
    with pytest.raises(EnvError, match="at least 1"):
        ReasoningGym(tries=0)


def test_a_question_that_does_not_repeat_is_a_task_error() -> None:
    task = next(ReasoningGym(data_seed=1).tasks("train", 0))
    with pytest.raises(TaskError, match="another question"):
        asyncio.run(ReasoningGym(data_seed=2).reset(task))


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # what an absent package looks like
    with pytest.raises(ImportError, match=r"loopwright\[reasoning-gym\]"):
        ReasoningGym()
