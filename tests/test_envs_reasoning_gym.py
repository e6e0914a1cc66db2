"""The adapter to the real reasoning-gym package."""

import asyncio
import dataclasses
import itertools
import sys
from collections import Counter

import pytest

from loopwright.envs.adapters.reasoning_gym import ReasoningGym
from loopwright.envs.conformance import check
from loopwright.envs.protocol import EnvError, Step, TaskError, Verdict

pytest.importorskip("reasoning_gym")


async def answer(env: ReasoningGym, *texts: str) -> tuple[list[Step], Verdict]:
    await env.reset(next(env.tasks("train", 0)))
    steps = [await env.step(text) for text in texts]
    return steps, await env.evaluate()


@pytest.mark.parametrize("dataset", ["chain_sum", "prime_factorization", "letter_counting"])
def test_conforms(dataset: str) -> None:
    assert asyncio.run(check(lambda: ReasoningGym(dataset=dataset, size=2000))) == []


def _all_datasets() -> list[str]:
    from reasoning_gym.factory import DATASETS

    # knight_swap takes 3 CPU-s for each item
    return sorted(set(DATASETS) - {"composite", "knight_swap"})


def test_every_data_set_plays_and_its_oracle_solves_it() -> None:
    """One task each: the oracle is right wherever there is an answer, hostile text is a step."""
    hostile = ["", "<answer></answer>", "<answer>x</answer>", "<answer>{[(\x00ÿ</answer>"]
    without_answer, problems = set(), []

    async def play(name: str) -> None:
        env = ReasoningGym(dataset=name, size=40, tries=len(hostile) + 1)
        await env.reset(next(env.tasks("train", 0)))
        actions = list(env.oracle())
        if not actions:
            without_answer.add(name)
        for action in [*hostile, *actions]:
            await env.step(action)
        verdict = await env.evaluate()
        if actions and not verdict.success:
            problems.append((name, verdict))

    for name in _all_datasets():
        asyncio.run(play(name))
    assert problems == []
    # The package gives no answer for these (0.1.25): they can be trained on, not cloned from.
    none = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
    assert without_answer <= none


def test_levels_are_the_curriculum_of_the_package() -> None:
    from reasoning_gym.factory import create_curriculum, create_dataset

    curriculum = create_curriculum("chain_sum")
    curriculum.set_global_level(2)
    config = dataclasses.asdict(curriculum.generate_configuration())
    levels = max(len(attribute.levels) for attribute in curriculum.attributes.values())
    theirs = create_dataset("chain_sum", **{**config, "size": 50, "seed": 0})
    env = ReasoningGym(dataset="chain_sum", size=50, level=2)
    for task in itertools.islice(env.tasks("train", 0), 5):
        question = asyncio.run(env.reset(task)).messages[1].content
        assert question == theirs[task.payload["index"]]["question"]
        assert (task.scenario, task.difficulty) == ("chain_sum/level-2", 1 + 3 * 2 // levels)


def test_several_levels_and_an_option_that_wins_over_them() -> None:
    env = ReasoningGym(dataset="chain_sum", level=[0, 9], min_terms=2, max_terms=2)
    tasks = list(itertools.islice(env.tasks("train", 0), 200))
    assert {t.scenario: t.difficulty for t in tasks} == {
        "chain_sum/level-0": 1,
        "chain_sum/level-9": 3,
    }
    for task in tasks[:20]:
        question = asyncio.run(env.reset(task)).messages[1].content
        assert question.count("+") + question.count(" - ") == 1


def test_a_mix_conforms_draws_by_weight_and_scores_by_its_own_data_set() -> None:
    datasets = [
        {"name": "letter_counting", "weight": 3},
        {"name": "chain_sum", "level": [0, 1], "config": {"allow_negation": False}},
    ]
    env = ReasoningGym(datasets=datasets, size=300)
    counts = Counter(t.scenario for t in itertools.islice(env.tasks("train", 0), 2000))
    shares = {"letter_counting": 0.75, "chain_sum/level-0": 0.125, "chain_sum/level-1": 0.125}
    assert counts == pytest.approx({k: 2000 * v for k, v in shares.items()}, rel=0.2)
    factory = lambda: ReasoningGym(datasets=datasets, size=300)  # noqa: E731
    assert asyncio.run(check(factory, tasks_per_split=2)) == []


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
    with pytest.raises(EnvError, match="level 99, must be 0 to"):
        ReasoningGym(level=99)
    with pytest.raises(EnvError, match="has no curriculum"):
        ReasoningGym(dataset="acre", level=0)
    with pytest.raises(EnvError, match="belong into its entries"):
        ReasoningGym(dataset="chain_sum", datasets=[{"name": "ab"}])
    with pytest.raises(EnvError, match="expected name"):
        ReasoningGym(datasets=[{"name": "ab", "wieght": 2}])
    with pytest.raises(EnvError, match="weight -1"):
        ReasoningGym(datasets=[{"name": "ab", "weight": -1}])
    with pytest.raises(EnvError, match="occurs twice"):
        ReasoningGym(datasets=[{"name": "ab"}, {"name": "ab"}])
    with pytest.raises(EnvError, match="write datasets"):
        ReasoningGym(dataset="composite")


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
