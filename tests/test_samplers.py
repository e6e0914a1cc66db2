"""Samplers: what they prefer, that facts alone decide, and mixes of environments."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from loopwright.algorithms.records import Context, EndReason, Outcome, Rollout
from loopwright.envs import registry
from loopwright.envs.conformance import check
from loopwright.envs.mix import Mix
from loopwright.envs.protocol import EnvError, Task, TaskError
from loopwright.orchestrator.environment_metrics import environment_metrics
from loopwright.orchestrator.faults import Refused, RunError
from loopwright.orchestrator.samplers import Draws
from loopwright.orchestrator.tasks import Played, TaskStream
from tests.scripted import ScriptedEnv

SEARCH = {"style": "compact", "entities": 120, "hops": [1]}
OFFICE = {"style": "compact", "scenarios": ["ask_phone"]}


class Source(ScriptedEnv):
    """A source of `count` tasks, or of endless ones; the scenario is the id's last digit."""

    count = 0

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """Tasks 0, 1, 2, …"""
        for n in range(self.count or 10**9):
            yield Task(
                environment="scripted",
                id=f"task {n}",
                seed=n,
                split=split,
                scenario=f"s{n % 10}",
                difficulty=n % 3 + 1,
            )


def _source(count: int = 0) -> Any:
    source = Source(steps=[])
    source.count = count
    return source


def _draws(
    source: Any, sampler: str, played: dict[int, tuple[Played, ...]], **changes: Any
) -> Draws:
    values: dict[str, Any] = {
        "seed": 3,
        "options": {},
        "steps": 40,
        "groups_per_step": 4,
        "max_lag": 1,
    }
    return Draws(source, sampler=sampler, played=played, **(values | changes))


def _simulate(
    draws: Draws, played: dict[int, tuple[Played, ...]], count: int, rate: Any
) -> list[Task]:
    """Draw and settle `count` tickets; a group's pass rate is rate(task)."""
    drawn = []
    for ticket in range(count):
        task = draws(ticket)
        drawn.append(task)
        passed = round(rate(task) * 8)
        played[ticket] = (
            Played(task_id=task.id, passed=(True,) * passed + (False,) * (8 - passed)),
        )
    return drawn


def test_uniform_is_the_streams_own_order_and_starts_over() -> None:
    draws = _draws(_source(3), "uniform", {})
    assert [draws(n).id for n in range(7)] == [f"task {n % 3}" for n in range(7)]


def test_the_pass_rate_sampler_prefers_what_succeeds_sometimes_and_retires_nothing() -> None:
    played: dict[int, tuple[Played, ...]] = {}
    rates = {0: 0.0, 1: 0.5, 2: 1.0}
    draws = _draws(_source(30), "pass_rate", played, options={"pool": 30, "floor": 0.1})
    drawn = _simulate(draws, played, 900, lambda task: rates[task.seed % 3])
    late = Counter(task.seed % 3 for task in drawn[300:])
    assert late[1] / 600 == pytest.approx(1 / 1.2, abs=0.06)
    assert late[0] > 15 and late[2] > 15, "the floor keeps them in the draw"


def test_a_forgotten_task_is_found_again() -> None:
    played: dict[int, tuple[Played, ...]] = {}
    draws = _draws(_source(10), "pass_rate", played, options={"recent": 1})
    before = _simulate(draws, played, 400, lambda task: 1.0)
    assert len({t.id for t in before[200:]}) == 10
    for ticket in range(400, 1000):  # task 7 is forgotten: now it succeeds half the time
        task = draws(ticket)
        passed = (True, False) if task.seed == 7 else (True, True)
        played[ticket] = (Played(task_id=task.id, passed=passed),)
    recent = Counter(p.task_id for t, (p,) in played.items() if t >= 600)
    assert recent["task 7"] > 3 * recent["task 1"]


@pytest.mark.parametrize("by", ["scenario", "difficulty"])
def test_pass_rates_may_be_of_scenarios_or_difficulties(by: str) -> None:
    played: dict[int, tuple[Played, ...]] = {}
    draws = _draws(_source(60), "pass_rate", played, options={"by": by, "pool": 60})
    drawn = _simulate(draws, played, 600, lambda task: 0.5 if getattr(task, by) in ("s4", 2) else 0)
    late = Counter(getattr(task, by) for task in drawn[300:])
    assert late.most_common(1)[0][0] in ("s4", 2)
    assert len({task.id for task in drawn[300:]}) > 6, "all tasks of the key come in turn"


def test_variants_come_of_failing_seed_tasks_alone() -> None:
    played: dict[int, tuple[Played, ...]] = {}
    options = {"seeds": 20, "share": 0.5, "below": 0.5}
    draws = _draws(_source(), "failure_variants", played, options=options)
    drawn = _simulate(draws, played, 400, lambda task: 0.0 if task.scenario in ("s3", "s8") else 1)
    seeds = [t for t in drawn if t.seed < 20]
    variants = [t for t in drawn if t.seed >= 20]
    assert {t.scenario for t in variants} == {"s3", "s8"}, "variants of what fails, and no others"
    assert len({t.id for t in variants}) == len(variants), "each is new"
    assert len(variants) / 400 == pytest.approx(0.5, abs=0.12) and len({t.id for t in seeds}) == 20
    # a variant that fails breeds none: with seeds that succeed there is nothing to vary
    calm: dict[int, tuple[Played, ...]] = {}
    again = _draws(_source(), "failure_variants", calm, options=options)
    assert all(t.seed < 20 for t in _simulate(again, calm, 200, lambda t: float(t.seed < 20)))


@pytest.mark.parametrize("sampler", ["pass_rate", "failure_variants"])
def test_a_decision_is_a_function_of_the_facts_that_must_be_there(sampler: str) -> None:
    """A resumed run, and one whose groups finished in another order, draw the same tasks."""
    played: dict[int, tuple[Played, ...]] = {}
    options = {"pool": 40} if sampler == "pass_rate" else {"seeds": 30}
    rates = {n: (n * 37 % 9) / 8 for n in range(10**4)}
    made = _simulate(
        _draws(_source(50), sampler, played, options=options), played, 300, lambda t: rates[t.seed]
    )
    # all facts known at once, later ones too: they must not be looked at
    resumed = _draws(_source(50), sampler, played, options=options)
    assert [resumed(n).id for n in range(300)] == [t.id for t in made]
    # only the facts that are settled when a ticket is admitted
    lazy: dict[int, tuple[Played, ...]] = {}
    late = _draws(_source(50), sampler, lazy, options=options)
    for ticket in range(300):
        lazy.update({t: played[t] for t in range(max(0, ticket - 7)) if t not in lazy})
        assert late(ticket).id == made[ticket].id
    lost = {t: p for t, p in played.items() if t != 100}
    with pytest.raises(RunError, match="ticket 100"):
        gone = _draws(_source(50), sampler, lost, options=options)
        for n in range(300):
            gone(n)


def test_a_schedule_sets_the_value_by_the_step_of_the_ticket() -> None:
    env = registry.load("search", SEARCH)
    table = {"noise": {"start": 0.0, "end": 0.5, "steps": 200, "base": 4.0}}
    draws = _draws(env, "uniform", {}, options={"schedule": table}, groups_per_step=2)
    noise = [draws(n).payload["noise"] for n in range(402)]
    assert noise[100] == noise[101] == pytest.approx(0.06903559, abs=5e-9)
    assert noise[200] == pytest.approx(0.16666667, abs=5e-9) and noise[401] == 0.5
    whole = _draws(env, "uniform", {}, options={"schedule": {"noise": {"start": 0.0, "end": 1.0}}})
    assert [whole(n).payload["noise"] for n in range(161)][-1] == 1.0, "steps of the run"
    plain = _draws(env, "uniform", {})
    assert "noise" not in plain(0).payload


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("uniform", {"pool": 3}, "it takes none"),
        ("pass_rate", {"flor": 0.1}, "did you mean 'floor'"),
        ("pass_rate", {"floor": 0.0}, "floor 0"),
        ("pass_rate", {"by": "colour"}, "task, scenario, difficulty"),
        ("failure_variants", {"share": 1.0}, "between 0 and 1"),
        ("uniform", {"schedule": {"noize": {}}}, "it schedules noise"),
        ("uniform", {"schedule": {"noise": {"start": 0.0}}}, "start, end, steps and base"),
        ("uniform", {"schedule": {"noise": {"start": 0.0, "end": "x"}}}, "expected numbers"),
        ("uniform", {"schedule": 3}, "expected a table"),
    ],
)
def test_options_that_cannot_be_are_refused(
    sampler: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        _draws(registry.load("search", SEARCH), sampler, {}, options=options)


def _mix(**weights: float) -> Mix:
    return Mix(
        members={
            "errands": {
                "environment": "officeworld",
                "options": OFFICE,
                "weight": weights.get("errands", 1.0),
                "max_turns": 7,
            },
            "search": {"options": SEARCH, "weight": weights.get("search", 3.0)},
        }
    )


def test_members_are_drawn_with_their_weights_and_keep_their_own_streams() -> None:
    mix = _mix()
    draws = _draws(mix, "uniform", {}, options={"schedule": {"noise": {"start": 0.5, "end": 1.0}}})
    drawn = [draws(n) for n in range(600)]
    counts = Counter(task.environment for task in drawn)
    assert counts["search"] / 600 == pytest.approx(0.75, abs=0.05)
    for member in mix.members:
        own = [t for t in drawn if t.environment == member.label]
        stream = islice(member.tasks("train", 3), len(own))
        assert [t.id for t in own] == [t.id for t in stream]
        assert all(("noise" in t.payload) is (member.label == "search") for t in own)
    held_out = list(islice(mix.tasks("test", 0), 200))
    assert 0.6 < sum(t.environment == "search" for t in held_out) / 200 < 0.9


def test_a_mix_plays_each_task_in_its_member() -> None:
    assert asyncio.run(check(_mix)) == []
    mix = _mix()
    assert mix.spec.max_turns == 7 and mix.spec.scheduled == ("noise",)
    turns = {}
    for task in islice(mix.tasks("train", 0), 12):
        asyncio.run(mix.reset(task))
        turns[mix.spec.name] = mix.spec.max_turns
        assert mix.spec.name == task.environment
    assert turns == {"errands": 7, "search": 5}
    with pytest.raises(TaskError, match="no member 'chess'"):
        asyncio.run(mix.reset(replace(task, environment="chess")))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"search": {}}, "two or more"),
        ({"search": {}, "x": {}}, r"mix\.x: environment 'x': unknown"),
        ({"search": {"wieght": 1}, "officeworld": {}}, "did you mean 'weight'"),
        ({"search": {"weight": 0}, "officeworld": {}}, "above 0"),
        ({"search": {"max_turns": 1.5}, "officeworld": {}}, "number of turns"),
        ({"search": {"options": {"hop": [1]}}, "officeworld": {}}, "did you mean 'hops'"),
        ({"search": {}, "inner": {"environment": "mix"}}, "cannot be a member"),
    ],
)
def test_members_that_cannot_be_are_refused(members: dict[str, Any], message: str) -> None:
    with pytest.raises(EnvError, match=message):
        registry.load("mix", {"members": members})


def _rollout(environment: str, lengths: list[int], **changes: Any) -> Rollout:
    contexts = tuple(
        Context(
            token_ids=np.zeros(n, np.int32),
            action_mask=np.ones(n, np.bool_),
            behavior_logprobs=np.zeros(n, np.float32),
            policy_versions=np.zeros(n, np.int32),
            turn_ids=np.zeros(n, np.int16),
        )
        for n in lengths
    )
    values: dict[str, Any] = {"reward": 0.5, "success": False, "turns": 2, "attempt": 0}
    return Rollout(
        task_id="t",
        environment=environment,
        environment_version="1",
        scenario="s",
        contexts=contexts,
        end_reason=EndReason.DONE,
        outcome=Outcome.SCORED,
        **(values | changes),
    )


def test_metrics_are_told_apart_by_environment() -> None:
    rollouts = [
        _rollout(
            "search",
            [10, 30, 20],
            reward_parts={"f1": 0.5, "searches": 3.0},
            tool_errors={"search/noisy": 1, "search/useful": 2},
        ),
        _rollout("search", [25], reward=1.0, success=True, reward_parts={"f1": 1.0}, turns=4),
        _rollout("office", [500], tool_errors={"tool_error/unknown_api": 2}),
    ]
    found = environment_metrics(rollouts, "eval_environment")
    expected = {
        "episodes": 2,
        "success_mean": 0.5,
        "reward_mean": 0.75,
        "turns_mean": 3,
        "context_peak_tokens_max": 30,
        "context_peak_tokens_mean": 27.5,
        "contexts_mean": 2,
        "part/f1_mean": 0.75,
        "part/searches_mean": 1.5,
        "signal/search/noisy_mean": 0.5,
        "signal/search/noisy_share": 1 / 3,
        "signal/search/useful_mean": 1,
        "signal/search/useful_share": 2 / 3,
    }
    mine = {k: v for k, v in found.items() if k.startswith("eval_environment/search/")}
    assert mine == pytest.approx({f"eval_environment/search/{k}": v for k, v in expected.items()})
    assert found["eval_environment/office/context_peak_tokens_max"] == 500
    assert found["eval_environment/office/signal/tool_error/unknown_api_share"] == 1


def test_the_first_tasks_are_each_counted_once() -> None:
    """A stream that repeats itself has more to give: the held-out set must not end at a repeat."""

    class Repeating(Source):
        def tasks(self, split: str, seed: int) -> Iterator[Task]:
            for task in super().tasks(split, seed):
                yield from (task, task)

    assert [t.seed for t in TaskStream(Repeating(steps=[]), "test", 0).first(5)] == [0, 1, 2, 3, 4]
    assert len(TaskStream(_source(3), "test", 0).first(5)) == 3
