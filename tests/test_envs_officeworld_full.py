"""The full office: every task can be solved, only by solving it; nothing breaks it."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from loopwright.envs.actions import Call, parse_action, render_action
from loopwright.envs.officeworld import OfficeWorld
from loopwright.envs.officeworld.dialect import VERBS
from loopwright.envs.officeworld.full.apps import APIS, APPS, DECLARED, TRAINING_APPS
from loopwright.envs.officeworld.full.office import FIXED, FullOffice, dialect_of, generate
from loopwright.envs.officeworld.full.scenarios import SCENARIOS
from loopwright.envs.protocol import Task, Verdict
from loopwright.envs.sandbox import SandboxUnavailable, Zygote

ROUNDS = 2  # each plays all variants of a scenario once
EDITION = FullOffice()


def tasks_of(name: str, rounds: int = ROUNDS) -> list[Task]:
    """Tasks of one scenario, in its split, all variants."""
    env = OfficeWorld(style="full", scenarios=[name])
    split = "test" if SCENARIOS[name].held_out else "train"
    return list(itertools.islice(env.tasks(split, 11), 3 * rounds))


async def played(env: OfficeWorld, task: Task, actions: list[str]) -> tuple[Verdict, list[str]]:
    """The verdict after the actions, and every message."""
    said = [m.content for m in (await env.reset(task)).messages]
    for action in actions:
        step = await env.step(action)
        said += [m.content for m in step.observation.messages]
    return await env.evaluate(), said


def run(env: OfficeWorld, task: Task, actions: list[str]) -> Verdict:
    return asyncio.run(played(env, task, actions))[0]


def oracle_calls(env: OfficeWorld, task: Task) -> list[Call]:
    """The oracle's calls in the dialect of the task's world."""
    asyncio.run(env.reset(task))
    calls = [parse_action(action, "json") for action in env.oracle()]
    assert all(isinstance(call, Call) for call in calls)
    return [call for call in calls if isinstance(call, Call)]


def texts(calls: list[Call]) -> list[str]:
    return [render_action(call, "json") for call in calls]


def writes(env: OfficeWorld, call: Call) -> bool:
    """Whether a call in the dialect of the live task changes the world."""
    office = env._live().office
    return call.name == "done" or office.apis[office.dialect.routes[call.name]].writes


def mutants(env: OfficeWorld, calls: list[Call]) -> Iterator[list[Call]]:
    """Wrong ways to play: a change left out, or made with another argument."""
    for index, call in enumerate(calls):
        if not writes(env, call):
            continue
        yield calls[:index] + calls[index + 1 :]
        for name, value in call.arguments.items():
            wrong = other_value(value)
            if wrong is not None:
                changed = Call(name=call.name, arguments={**call.arguments, name: wrong})
                yield [*calls[:index], changed, *calls[index + 1 :]]


def other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return value[:-1] if isinstance(value, list) and value else None


def test_sizes() -> None:
    assert len(APPS) >= 12 and len(APIS) >= 300 and len(SCENARIOS) >= 60
    assert sum(app.held_out for app in DECLARED.values()) == 2
    for held_out in (True, False):
        some = [s for s in SCENARIOS.values() if s.held_out == held_out]
        assert {s.difficulty for s in some} == {1, 2, 3} and len(some) >= 20
    base = generate(0, 120)
    assert len(base["contacts"]) == 120 and sum(map(len, base.values())) > 1500
    relations = {str(row["relation"]) for row in base["contacts"].values()}
    assert {"sister", "manager", "colleague", "friend"} <= relations
    assert "15 apps" in OfficeWorld(style="full").spec.description


@pytest.mark.parametrize("name", SCENARIOS)
def test_oracle_solves_and_mutants_do_not(name: str) -> None:
    env = OfficeWorld(style="full", action_format="json")
    scenario = SCENARIOS[name]
    assert len(set(scenario.texts)) == 3
    for task in tasks_of(name):
        calls = oracle_calls(env, task)
        wrong = list(mutants(env, calls))
        assert len(calls) <= 40 and any(writes(env, call) for call in calls)
        verdict, said = asyncio.run(played(env, task, texts(calls)))
        assert (verdict.reward, verdict.success) == (1.0, True), said[1]
        assert len(env.unit_tests()) >= 4 and "{" not in said[1]
        for idle in ([], ['{"name": "done"}'], ["nonsense"]):
            graded = run(env, task, idle)
            assert graded.reward < 1 and not graded.success
        for mutant in Random(task.seed).sample(wrong, min(8, len(wrong))):
            graded = run(env, task, texts(mutant))
            assert graded.reward < 1 and not graded.success, (said[1], texts(mutant)[-4:])


@pytest.mark.parametrize("action_format", ["call", "code"])
def test_oracle_in_the_other_formats(action_format: Any) -> None:
    env = OfficeWorld(style="full", action_format=action_format)

    async def scene() -> None:
        for name in SCENARIOS:
            for task in tasks_of(name, rounds=1):
                await env.reset(task)
                for action in env.oracle():
                    await env.step(action)
                assert (await env.evaluate()).success, task
        await env.close()

    asyncio.run(scene())


@pytest.mark.parametrize("name", ["pay_person", "plan_event", "delete_draft", "count_events"])
def test_collateral_damage_fails(name: str) -> None:
    env = OfficeWorld(style="full", action_format="json")
    for task in tasks_of(name, rounds=1):
        calls = oracle_calls(env, task)
        names = env._live().office.dialect
        extra = {"name": names.shown["vault.create_address"], "arguments": {
            "kind": "other", "street": "Somewhere 1", "city": "Elmsgate", "zip_code": "12345",
        }}  # fmt: skip
        verdict = run(env, task, [json.dumps(extra), *texts(calls)])
        assert (
            not verdict.success
            and verdict.parts["collateral"] < 1
            and verdict.parts["goal" if "goal" in verdict.parts else "answer"] == 1
        )


def test_splits_are_disjoint() -> None:
    env = OfficeWorld(style="full")
    streams = {s: list(itertools.islice(env.tasks(s, 0), 400)) for s in ("train", "test")}
    scenarios = {split: {t.scenario for t in tasks} for split, tasks in streams.items()}
    assert not scenarios["train"] & scenarios["test"]
    assert scenarios["train"] | scenarios["test"] == set(SCENARIOS)
    assert {t.seed % 2 for t in streams["train"]} == {0}
    assert {t.seed % 2 for t in streams["test"]} == {1}
    names = [
        {str(r["name"]) for s in seeds for r in generate(s, 120)["contacts"].values()}
        for seeds in ([0], [1])
    ]
    assert names[0] != names[1]
    held_out = {app.name for app in DECLARED.values() if app.held_out}
    for name, scenario in SCENARIOS.items():
        for task in tasks_of(name, rounds=1):
            plan, office = EDITION.open(task, task.payload["variant"], 120)
            used = {call.name.partition(".")[0] for call in plan.calls}
            assert scenario.held_out or not used & held_out
            assert scenario.held_out or not held_out & set(office.apps)
            assert office.apps.keys() >= used
    assert set(TRAINING_APPS) == set(APPS) - held_out
    with pytest.raises(
        ValueError, match="none of the chosen scenarios is in the test split: pay_person"
    ):
        OfficeWorld(style="full", scenarios=["pay_person"]).tasks("test", 0)


def test_streams_group_the_variants_of_a_scenario() -> None:
    tasks = list(itertools.islice(OfficeWorld(style="full").tasks("test", 0), 90))
    for first in range(0, 90, 3):
        three = tasks[first : first + 3]
        assert [t.payload["variant"] for t in three] == [1, 2, 3]
        assert len({t.payload["group"] for t in three}) == len({t.scenario for t in three}) == 1
    assert len({t.payload["group"] for t in tasks}) == len({t.scenario for t in tasks}) == 30


def test_worlds_do_not_depend_on_hash_seeds() -> None:
    code = (
        "import hashlib, itertools\n"
        "from loopwright.envs.officeworld import OfficeWorld\n"
        "from loopwright.envs.officeworld.full.office import dialect_of, generate\n"
        "tasks = list(itertools.islice(OfficeWorld(style='full').tasks('test', 0), 9))\n"
        "text = repr((generate(3, 120), dict(dialect_of(3, False).routes), tasks))\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    root = Path(__file__).resolve().parent.parent
    found = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


def test_the_same_actions_give_the_same_episode() -> None:
    env = OfficeWorld(style="full", action_format="code")
    for task in itertools.islice(env.tasks("train", 2), 3):

        async def once(task: Task = task) -> tuple[Any, ...]:
            await env.reset(task)
            actions = list(env.oracle())
            verdict, said = await played(env, task, actions)
            return actions, verdict, said

        assert asyncio.run(once()) == asyncio.run(once())
    asyncio.run(env.close())


def test_dialects_differ_and_stay_unambiguous() -> None:
    seen: dict[str, set[str]] = {}
    for seed in range(0, 40, 2):
        dialect = dialect_of(seed, True)
        assert len(dialect.routes) == len(dialect.shown)
        for name, shown in dialect.shown.items():
            seen.setdefault(name, set()).add(shown)
            labels = dialect.params[name]
            assert len({p.name for p in labels.values()}) == len(labels)
    assert len(seen["mail.list_emails"]) == len(VERBS["list"])
    assert all(len(seen[name]) == 1 for name in seen if name.partition(".")[0] in FIXED)
    assert {dialect_of(s, True).paging["mail"].style for s in range(0, 40, 2)} == {
        "page",
        "offset",
        "cursor",
    }


def test_guessing_instead_of_looking_up_fails() -> None:
    """A policy that knows the canonical names by heart, from one office, fails in the others."""
    env = OfficeWorld(style="full", action_format="json")
    solved = 0
    tasks = list(itertools.islice(env.tasks("train", 0), 60))
    for task in tasks:
        calls = oracle_calls(env, task)
        dialect = env._live().office.dialect
        known = []
        for call in calls:
            name = dialect.routes.get(call.name, call.name)
            params = dialect.params.get(name, {})
            arguments = {params[k].name if k in params else k: v for k, v in call.arguments.items()}
            known.append(Call(name=name, arguments=arguments))
        solved += unaided(env, task, texts(known))
    assert solved <= len(tasks) // 20


def unaided(env: OfficeWorld, task: Task, actions: list[str]) -> bool:
    """Whether the actions solve the task without an error: what an error hides, no policy knows."""

    async def scene() -> bool:
        await env.reset(task)
        signals = [set((await env.step(action)).signals) for action in actions]
        errors = [s for found in signals for s in found if s.startswith("tool_error/")]
        return not errors and (await env.evaluate()).success

    return asyncio.run(scene())


def test_everything_is_documented() -> None:
    for name, api in APIS.items():
        assert api.doc and all(p.doc for p in api.params), name
    size = 0

    async def scene() -> int:
        env = OfficeWorld(style="full", action_format="json")
        await env.reset(next(env.tasks("test", 0)))
        office = env._live().office
        size = 0
        for shown in office.dialect.routes:
            app, _, api = shown.partition(".")
            call = {"name": "docs.show_api_doc", "arguments": {"app": app, "api": api}}
            step = await env.step(json.dumps(call))
            text = step.observation.messages[0].content
            assert not step.signals.keys() - {"behavior/doc_lookups"}
            assert json.loads(text)["api"] == shown
            size += len(text)
        return size

    size = asyncio.run(scene())
    assert size > 150_000  # characters: far more than a policy can hold in its context


def test_errors_are_categorised_with_status() -> None:
    async def scene() -> None:
        env = OfficeWorld(style="full", action_format="json", scenarios=["pay_person"])
        await env.reset(next(env.tasks("train", 3)))
        calls = [parse_action(text, "json") for text in env.oracle()]
        send = next(
            c
            for c in calls
            if isinstance(c, Call) and c.name.startswith("payments.") and "login" not in c.name
        )
        office = env._live().office
        names = office.dialect.names("payments.send_money")
        login = next(c for c in calls if isinstance(c, Call) and c.name == "payments.login")
        for call, status, code in (
            (Call(name="payments.nothing"), 404, "unknown_api"),
            (send, 401, "unauthorized"),
            (
                Call(name="payments.login", arguments={**login.arguments, "password": "x"}),
                401,
                "unauthorized",
            ),
            (login, 0, ""),
            (
                Call(name=send.name, arguments={**send.arguments, "color": 1}),
                400,
                "unknown_argument",
            ),
            (Call(name=send.name), 400, "missing_argument"),
            (
                Call(name=send.name, arguments={**send.arguments, names["amount"]: "3"}),
                400,
                "wrong_type",
            ),
            (
                Call(name=send.name, arguments={**send.arguments, names["amount"]: True}),
                400,
                "wrong_type",
            ),
            (
                Call(name=send.name, arguments={**send.arguments, names["amount"]: 0}),
                422,
                "invalid_value",
            ),
            (
                Call(name=send.name, arguments={**send.arguments, names["amount"]: 9**8}),
                402,
                "insufficient_funds",
            ),
            (
                Call(name=send.name, arguments={**send.arguments, names["email"]: "no@body"}),
                404,
                "not_found",
            ),
        ):
            step = await env.step(render_action(call, "json"))
            error = json.loads(step.observation.messages[0].content).get("error", {})
            assert (error.get("status", 0), error.get("code", "")) == (status, code), call
            if code:
                assert step.signals[f"tool_error/{code}"] == 1 and error["message"]
        assert env.unit_tests()["collateral/none"]

    asyncio.run(scene())


def test_a_token_opens_its_own_app_only() -> None:
    async def scene() -> None:
        env = OfficeWorld(style="full", action_format="json", scenarios=["split_cost"])
        await env.reset(next(env.tasks("train", 0)))
        office = env._live().office
        for text in env.oracle():
            if '"payments.login"' in text:
                await env.step(text)
        token = next(iter(office.tokens))
        show = office.dialect.shown["calendar.count_events"]
        label = office.dialect.names("calendar.count_events")["access_token"]
        step = await env.step(json.dumps({"name": show, "arguments": {label: token}}))
        assert step.signals["tool_error/unauthorized"] == 1

    asyncio.run(scene())


def test_bad_options_are_refused() -> None:
    for options, told in (
        ({"world_size": 20}, "must be 100 to 400"),
        ({"action_format": "xml"}, "must be 'call' or 'json' or 'code'"),
        ({"scenarios": ["text_id"]}, "unknown"),
        ({"max_turns": 0}, "at least 1"),
        ({"cell_timeout_s": 0}, "above 0 s"),
    ):
        with pytest.raises(ValueError, match=told):
            OfficeWorld(style="full", **options)


def test_without_a_filter_code_actions_are_refused_at_once() -> None:
    with pytest.raises(SandboxUnavailable, match="no filter for 'sparc'"):
        OfficeWorld(style="full", action_format="code", zygote=Zygote(machine="sparc"))


def test_code_cells_keep_variables_and_end_with_done() -> None:
    async def scene() -> None:
        env = OfficeWorld(style="full", action_format="code", cell_timeout_s=1.0)
        await env.reset(next(env.tasks("train", 0)))

        async def cell(code: str) -> tuple[str, set[str]]:
            step = await env.step(f"I look.\n```python\n{code}\n```")
            kinds = {name for name in step.signals if not name.startswith("behavior/")}
            return "".join(m.content for m in step.observation.messages), kinds

        assert await cell("x = apis.vault.show_profile()['name']") == ("[no output]", set())
        assert (await cell("x"))[0].strip().strip("'\"") == env._live().office.profile["name"]
        assert (await cell("class Mine(Exception): pass\nraise Mine('no')"))[1] == {
            "cell_error/other"
        }
        assert (await cell("open('/etc/passwd')"))[1] == {"cell_error/PermissionError"}
        told, kinds = await cell("while True: pass")
        assert "variables are lost" in told and kinds == {"cell_error/timeout"}
        assert (await cell("x"))[1] == {"cell_error/NameError"}
        session = env._live().session
        step = await env.step("```python\napis.done()\napis.vault.show_profile()\n```")
        assert step.terminated and step.signals["tool_error/conflict"] == 1
        assert session is not None and not session.alive
        assert 0 < (await env.evaluate()).reward < 1
        await env.close()

    asyncio.run(scene())


def test_a_person_plays_in_the_terminal() -> None:
    typed = "```python\nx = 6\nprint(x * 7)\n```\napis.done()\n"
    options = ("--option", "style=full", "--option", "action_format=code")
    command = [sys.executable, "-m", "loopwright.orchestrator", "envs", "play", "officeworld"]
    done = subprocess.run(
        [*command, *options], input=typed, capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).resolve().parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[tool] 42" in done.stdout and "after 2 turns: not solved" in done.stdout
