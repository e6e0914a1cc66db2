"""Goal completion and behaviour counts, against the numbers of their definitions."""

import asyncio

import pytest

from loopwright.algorithms.records import EndReason, Outcome, Rollout
from loopwright.envs.metrics import (
    CallLog,
    behavior,
    give_up_rate,
    mentions,
    scenario_goal_completion,
    task_goal_completion,
)
from loopwright.envs.officeworld import OfficeWorld
from loopwright.envs.protocol import Task
from loopwright.orchestrator.evaluation import scenario_groups, summarise


def test_goal_completion_of_four_scenarios() -> None:
    scenarios = {"a": (1, 1, 1), "b": (1, 0, 1), "c": (0, 0, 0), "d": (1, 1, 1)}
    played = [(name, bool(s)) for name, successes in scenarios.items() for s in successes]
    assert task_goal_completion([s for _, s in played]) == pytest.approx(66.66666667)
    assert scenario_goal_completion(played) == 50.0
    assert scenario_goal_completion(played[::-1]) == 50.0
    with pytest.raises(ValueError, match="no task was played"):
        task_goal_completion([])


def test_mentions_are_words_not_letters() -> None:
    text = "I ASSUME it. Assuming that, the assumption... reassume; a dummy value, Dummy! dummyish"
    assert mentions(text) == {"assume": 3, "dummy": 2}
    assert mentions("") == {"assume": 0, "dummy": 0}


def test_give_up_rate() -> None:
    assert give_up_rate(4, 1) == 0.75
    assert give_up_rate(0, 0) == 0.0 and give_up_rate(2, 2) == 0.0
    with pytest.raises(ValueError, match="3 of 2"):
        give_up_rate(2, 3)


def test_an_api_is_recovered_by_a_later_success_only() -> None:
    log = CallLog()
    for api, ok in (
        ("a.x", True), ("a.x", False), ("a.x", False), ("a.y", False), ("a.x", True),
        ("a.x", False),
        ("docs.show", True), ("docs.show", False), ("a.z", True),
    ):  # fmt: skip
        log.note(api, ok=ok)
    assert (log.failed, log.recovered) == ({"a.x", "a.y", "docs.show"}, {"a.x"})
    assert log.news() == {"doc_lookups": 1, "failed_apis": 3, "recovered_apis": 1}
    assert log.news() == {}


def test_behavior_of_episodes() -> None:
    signals = [
        {"behavior/code_cells": 4, "behavior/doc_lookups": 3, "behavior/failed_apis": 3, "x": 9},
        {"behavior/assume": 1, "behavior/dummy": 2, "behavior/recovered_apis": 1},
    ]
    assert behavior(signals, [2, 6]) == {
        "code_cells_per_turn": 0.5,
        "doc_lookups_mean": 1.5,
        "assume_mean": 0.5,
        "dummy_mean": 1.0,
        "give_up_rate": pytest.approx(2 / 3),
    }
    assert behavior([{"tool_error/parse": 1}], [1]) == {}


def test_the_office_counts_behavior() -> None:
    async def scene() -> dict[str, int]:
        env = OfficeWorld(style="full", action_format="code")
        await env.reset(next(env.tasks("train", 0)))
        total: dict[str, int] = {}
        for action in (
            "I assume this works.\n```python\nprint(apis.docs.show_app_descriptions())\n```\n"
            "```python\nx = 'dummy'\n```",
            "```python\napis.docs.show_api_descriptions(app='nothing')\n```",
            "```python\napis.docs.show_api_descriptions(app='mail')\napis.mail.nothing()\n```",
        ):
            for name, count in (await env.step(action)).signals.items():
                total[name] = total.get(name, 0) + count
        await env.close()
        return total

    found = asyncio.run(scene())
    assert {k: v for k, v in found.items() if k.startswith("behavior/")} == {
        "behavior/code_cells": 4,
        "behavior/doc_lookups": 2,
        "behavior/assume": 1,
        "behavior/dummy": 1,
        "behavior/failed_apis": 2,
        "behavior/recovered_apis": 1,
    }
    assert found["tool_error/not_found"] == 1 and found["tool_error/unknown_api"] == 1


def rollout(task_id: str, success: bool, signals: dict[str, int] | None = None) -> Rollout:
    return Rollout(
        task_id=task_id, environment="e", environment_version="1", scenario=task_id[0], attempt=0,
        contexts=(), reward=float(success), success=success, end_reason=EndReason.DONE,
        outcome=Outcome.SCORED, turns=2, tool_errors=signals or {},
    )  # fmt: skip


def grouped(task_id: str, group: str) -> Task:
    return Task(
        environment="e", id=task_id, seed=0, split="test", scenario=group[0],
        payload={"group": group} if group else {},
    )  # fmt: skip


def test_evaluations_report_scenario_success_and_behavior() -> None:
    successes = {"a": (1, 1, 1), "b": (1, 0, 1), "c": (0, 0, 0), "d": (1, 1, 1)}
    tasks = [grouped(f"{name}{i}", f"{name}-0") for name in successes for i in range(3)]
    rollouts = [rollout(t.id, bool(successes[t.id[0]][int(t.id[1])])) for t in tasks]
    metrics = summarise(rollouts, faults=0, groups=scenario_groups(tasks))
    assert metrics["eval/success"] == pytest.approx(2 / 3)
    assert metrics["eval/scenario_success"] == 0.5
    assert not [name for name in metrics if name.startswith("eval_behavior/")]
    cut = [*tasks, grouped("e0", "e-0")]  # an instance that the number of tasks cut off
    with_cut = [*rollouts, rollout("e0", True, {"behavior/code_cells": 3})]
    metrics = summarise(with_cut, faults=0, groups=scenario_groups(cut))
    assert metrics["eval/scenario_success"] == 0.5
    assert metrics["eval_behavior/code_cells_per_turn"] == pytest.approx(3 / 26)
    lost = summarise(rollouts[1:], faults=1, groups=scenario_groups(tasks))
    assert lost["eval/scenario_success"] == pytest.approx(1 / 3)
    assert "eval/scenario_success" not in summarise(rollouts, faults=0, groups={})
