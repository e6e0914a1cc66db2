"""The small office: tasks can be solved, only by solving them, and no text breaks it."""

import asyncio
import hashlib
import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwright.envs.actions import Call, Fault, parse_action, render_action
from loopwright.envs.officeworld import OfficeWorld
from loopwright.envs.officeworld.dialect import draw_parameters
from loopwright.envs.officeworld.small import SYNONYMS
from loopwright.envs.officeworld.small.apps import APIS, APPS
from loopwright.envs.officeworld.small.population import FIRST_NAMES, generate
from loopwright.envs.officeworld.small.scenarios import SCENARIOS
from loopwright.envs.officeworld.state import World
from loopwright.envs.protocol import Env, Task, TaskError, TaskSource, Verdict

TASKS_EACH = 12  # per scenario and split; variants 1 and 2 both occur in the first twelve


def some_tasks(env: OfficeWorld, split: str, count: int) -> list[Task]:
    return list(itertools.islice(env.tasks(split, 7), count))


async def play(env: OfficeWorld, task: Task, actions: list[str]) -> tuple[Verdict, list[str]]:
    """Reset, play the actions, grade; the verdict and what the world said."""
    opening = await env.reset(task)
    said = [m.content for m in opening.messages]
    for action in actions:
        step = await env.step(action)
        said += [m.content for m in step.observation.messages]
    return await env.evaluate(), said


async def oracle_actions(env: OfficeWorld, task: Task) -> list[str]:
    await env.reset(task)
    return list(env.oracle())


def run(env: OfficeWorld, task: Task, actions: list[str]) -> Verdict:
    return asyncio.run(play(env, task, actions))[0]


def as_call(action: str) -> Call:
    call = parse_action(action, "call")
    assert isinstance(call, Call)
    return call


def writes(action: str) -> bool:
    name = as_call(action).name
    return name in APIS and APIS[name].writes


def mutants(actions: list[str]) -> Iterator[list[str]]:
    """Wrong ways to play: a change left out or done twice wrong, an argument off by one, no end."""
    for index, action in enumerate(actions):
        call = as_call(action)
        if not writes(action) and call.name != "done":
            continue
        yield actions[:index] + actions[index + 1 :]
        if call.name in ("payments.charge", "messages.send", "calendar.add"):  # never refused
            yield [*actions[:index], action, *actions[index:]]
        for name, value in call.arguments.items():
            wrong = value + 1 if isinstance(value, int) else value + "x"
            other = render_action(
                Call(name=call.name, arguments={**call.arguments, name: wrong}), "call"
            )
            yield [*actions[:index], other, *actions[index + 1 :]]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_oracle_solves_and_others_do_not(name: str, split: str) -> None:
    env = OfficeWorld(scenarios=[name])
    variants = set()
    for task in some_tasks(env, split, TASKS_EACH):
        variants.add(task.payload["variant"])
        actions = asyncio.run(oracle_actions(env, task))
        solved = run(env, task, actions)
        assert (solved.reward, solved.success) == (1.0, True), (task, actions)
        assert len(env.unit_tests()) >= 4
        for idle in ([], ["done()"], ["nonsense", "done()"]):
            verdict = run(env, task, idle)
            assert verdict.reward < 1 and not verdict.success
        for mutant in mutants(actions):
            verdict = run(env, task, mutant)
            assert verdict.reward < 1 and not verdict.success, (task, mutant)
    assert variants == ({1, 2} if split == "train" else {3})


@pytest.mark.parametrize("name", SCENARIOS)
def test_collateral_damage_fails(name: str) -> None:
    env = OfficeWorld(scenarios=[name])
    for task in some_tasks(env, "train", 6):
        actions = asyncio.run(oracle_actions(env, task))
        for label in SYNONYMS["title"]:
            for day, hour in itertools.product(SYNONYMS["day"], SYNONYMS["hour"]):
                actions.insert(0, f'calendar.add({day}="mon", {hour}=20, {label}="party")')
        verdict = run(env, task, actions)
        assert not verdict.success
        assert verdict.parts["collateral"] < 1


@pytest.mark.parametrize("action_format", ["call", "json"])
def test_oracle_in_every_format(action_format: str) -> None:
    env = OfficeWorld(action_format=action_format)  # type: ignore[arg-type]
    assert isinstance(env, Env) and isinstance(env, TaskSource)
    for split in ("train", "test"):
        for task in some_tasks(env, split, 60):
            assert run(env, task, asyncio.run(oracle_actions(env, task))).success, task


def test_splits_are_disjoint_and_streams_repeat() -> None:
    env = OfficeWorld()
    train, test = some_tasks(env, "train", 1000), some_tasks(env, "test", 1000)
    assert train == some_tasks(OfficeWorld(), "train", 1000)
    assert not {t.id for t in train} & {t.id for t in test}
    assert len({t.id for t in train}) == 1000
    assert {t.seed % 2 for t in train} == {0} and {t.seed % 2 for t in test} == {1}
    assert {t.difficulty for t in train} == {1, 2, 3}
    other = list(itertools.islice(env.tasks("train", 8), 1000))
    assert not {t.id for t in train} & {t.id for t in other}
    with pytest.raises(ValueError, match="must be 'train' or 'test'"):
        next(env.tasks("valid", 0))


def test_held_out_templates_have_no_new_word() -> None:
    known = {w for s in SCENARIOS.values() for text in s.texts[:2] for w in text.split()}
    held_out = {w for s in SCENARIOS.values() for w in s.texts[2].split()}
    assert held_out <= known
    for scenario in SCENARIOS.values():
        assert len(set(scenario.texts)) == 3


@pytest.mark.parametrize(
    ("options", "digest"),
    [
        ({"scenarios": ["ask_phone", "text_id", "text_person", "pay_person"]}, "e4d7b9004f1ba9f9"),
        ({}, "439067686f876731"),
        ({"action_format": "json"}, "57609376faab57ad"),
    ],
)
def test_episodes_are_what_they_always_were(options: dict[str, Any], digest: str) -> None:
    """The quickstart's published numbers hold for exactly these texts: a change of any is meant, or
    is a mistake."""

    async def scene() -> str:
        env, seen = OfficeWorld(**options), hashlib.sha256()
        for split in ("train", "test"):
            for task in itertools.islice(env.tasks(split, 7), 150):
                first = [(m.role, m.content) for m in (await env.reset(task)).messages]
                about = (task.id, task.seed, split, task.scenario, task.difficulty)
                seen.update(repr((*about, dict(task.payload), first)).encode())
                for action in env.oracle():
                    step = await env.step(action)
                    told = [(m.role, m.content) for m in step.observation.messages]
                    whole = (action, told, step.terminated, dict(step.signals))
                    seen.update(repr(whole).encode())
                verdict = await env.evaluate()
                graded = (verdict.reward, verdict.success, dict(verdict.parts))
                seen.update(repr(graded).encode())
        return seen.hexdigest()[:16]

    assert asyncio.run(scene()) == digest


def test_compact_episodes_are_small() -> None:
    env = OfficeWorld()
    words: set[str] = set()
    for task in some_tasks(env, "train", 300):
        actions = asyncio.run(oracle_actions(env, task))
        _, said = asyncio.run(play(env, task, actions))
        pieces = [re.findall(r"\w+|[^\w\s]", text) for text in (*said, *actions)]
        assert sum(map(len, pieces)) <= 170
        assert all(len(p) <= 24 for p in pieces)
        assert len(actions) <= {1: 4, 2: 5, 3: 7}[task.difficulty]
        words |= {w for p in pieces for w in p}
    assert len(words) < 300


def test_the_dialect_must_be_looked_up() -> None:
    shown = {
        draw_parameters(seed, APIS, SYNONYMS).names("payments.send")["to"] for seed in range(50)
    }
    assert shown == set(SYNONYMS["to"])
    env = OfficeWorld(scenarios=["pay_person"])
    solved = 0
    for task in some_tasks(env, "train", 60):
        actions = asyncio.run(oracle_actions(env, task))
        guess = re.sub(r"\(\w+=(\d+), \w+=(\d+)\)", r"(to=\1, amount=\2)", actions[2])
        solved += run(env, task, [actions[0], guess, "done()"]).success
    assert solved < 20  # one in nine by chance


def test_parameter_names_never_collide() -> None:
    for name, api in APIS.items():
        if api.writes:
            options = [set(SYNONYMS[p.name]) for p in api.params]
            for first, second in itertools.combinations(options, 2):
                assert not first & second, name


def test_errors_are_categorised_and_recoverable() -> None:
    async def scene() -> None:
        env = OfficeWorld(scenarios=["pay_person"], style="compact")
        await env.reset(next(env.tasks("train", 0)))
        actions = list(env.oracle())
        send = as_call(actions[2])
        to, amount = send.arguments
        person = send.arguments[to]
        cases = {
            "payments.pay()": "tool_error/unknown_api",
            "contacts.find(who=1)": "tool_error/unknown_argument",
            "contacts.find()": "tool_error/missing_argument",
            "contacts.find(name=3)": "tool_error/wrong_type",
            "contacts.show(id=True)": "tool_error/wrong_type",
            "contacts.show(id=1)": "tool_error/not_found",
            "messages.list(page=0)": "tool_error/invalid_value",
            f"payments.send({to}={person}, {amount}=99)": "tool_error/insufficient_funds",
            f"payments.send({to}={person}, {amount}=0)": "tool_error/invalid_value",
            "done(result=3)": "tool_error/unknown_argument",
            "": "policy_fault/empty",
            "docs.apps": "policy_fault/parse",
            "docs.apps() docs.apps()": "policy_fault/parse",
            "contacts.find('Ada')": "policy_fault/parse",
            "contacts.find(name=open('x'))": "policy_fault/parse",
            "x" * 5000: "policy_fault/too_long",
            f"contacts.show(id={'9' * 1900})": "tool_error/invalid_value",
            r'contacts.find(name="\ud800")': "tool_error/invalid_value",
            f'contacts.find(name="{"x" * 300}")': "tool_error/invalid_value",
        }
        for action, category in cases.items():
            step = await env.step(action)
            assert step.signals == {category: 1}, action
            assert not step.terminated and step.observation.messages[0].content
        assert not env.unit_tests()["finished/done"]
        assert env.unit_tests()["collateral/none"]
        for action in actions:
            step = await env.step(action)
        assert step.terminated and (await env.evaluate()).success
        after = await env.step(actions[2])
        assert after.terminated and (await env.evaluate()).success

    asyncio.run(scene())


def test_pages_cover_the_list() -> None:
    async def scene() -> None:
        env = OfficeWorld(style="compact")
        await env.reset(next(env.tasks("train", 0)))
        seen: list[str] = []
        for page in range(1, 5):
            text = (await env.step(f"contacts.list(page={page})")).observation.messages[0].content
            rows, _, more = text.partition(" ; next ")
            seen += rows.split(" ; ")
            assert more == (str(page + 1) if page < 4 else "")
        assert len(set(seen)) == 10

    asyncio.run(scene())


@given(st.text(max_size=200) | st.binary(max_size=100).map(lambda b: b.decode("latin-1")))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_any_text_is_an_action_or_a_fault(text: str) -> None:
    for action_format in ("call", "json"):
        assert isinstance(parse_action(text, action_format), Call | Fault)


VALUES = st.integers(-2, 99) | st.sampled_from([10**9, "mon", "Ada", "\ud800", "docs", None, [1]])


@given(
    st.lists(
        st.tuples(st.sampled_from([*APIS]), st.lists(VALUES, min_size=3, max_size=3)), max_size=25
    )
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_calls_give_short_encodable_observations(calls: list[tuple[str, list[object]]]) -> None:
    async def scene() -> None:
        env = OfficeWorld(action_format="json")
        task = next(env.tasks("train", 0))
        await env.reset(task)
        for name, values in calls:
            shown = await env.step(f'{{"name": "docs.show", "arguments": {{"api": "{name}"}}}}')
            names = re.findall(r"\w+(?=[,)])", shown.observation.messages[0].content)
            call = Call(name=name, arguments=dict(zip(names, values, strict=False)))
            step = await env.step(render_action(call, "json"))
            assert 0 < len(step.observation.messages[0].content.encode()) < 400
            assert 0 <= (await env.evaluate()).reward <= 1

    asyncio.run(scene())


@pytest.mark.parametrize(
    "text",
    [
        "f(" * 900,
        "-" * 1900 + "1",
        "[" * 2000,
        '{"name": ' * 200,
        "f(a=" + "(" * 300 + "1" + ")" * 300 + ")",
        "f(**{})",
        "f(a=1, a=2)",
        "f(a={[]: 1})",
        "a.b.c()",
        "\x00",
        "\ud800",
        '{"name": 3}',
        '{"name": "x", "arguments": []}',
    ],
)
def test_hostile_text_is_a_fault(text: str) -> None:
    assert isinstance(parse_action(text, "call"), Fault)
    assert isinstance(parse_action(text, "json"), Fault)


def test_wrappers_are_accepted() -> None:
    call = Call(name="done", arguments={"answer": 3})
    text = render_action(call, "json")
    assert parse_action(f"<think>hm</think>\n<tool_call>\n{text}\n</tool_call>", "json") == call
    assert parse_action("<think>hm</think> done(answer=3)", "call") == call


def test_overlay_leaves_the_base_alone() -> None:
    base = generate(3, 10)
    before = repr(base)
    world = World(base)
    person, row = next(world.rows("contacts"))
    world.update("contacts", person, phone=0)
    assert world.diff().changed == {("contacts", person): {"phone": 0}}
    world.update("contacts", person, phone=row["phone"])
    assert not world.diff().changed
    world.remove("contacts", person)
    added = world.insert("contacts", {"name": "New", "phone": 1})
    assert world.diff().removed == {("contacts", person)}
    assert list(world.diff().added) == [("contacts", added)]
    assert person not in dict(world.rows("contacts"))
    world.remove("contacts", added)
    assert not world.diff().added
    assert repr(base) == before


def test_bad_options_and_tasks_are_refused() -> None:
    for options in (
        {"action_format": "xml"},
        {"style": "tiny"},
        {"scenarios": ["nope"]},
        {"difficulty": [4]},
        {"world_size": 3},
        {"action_format": "code"},
    ):
        with pytest.raises(ValueError, match="officeworld"):
            OfficeWorld(**options)
    env = OfficeWorld()
    task = Task(environment="officeworld", id="x", seed=0, split="train", scenario="nope")
    with pytest.raises(TaskError, match="nope"):
        asyncio.run(env.reset(task))


def test_size_of_the_world() -> None:
    assert len(APPS) >= 5 and len(APIS) >= 24 and len(SCENARIOS) >= 12
    assert len(set(FIRST_NAMES)) == len(FIRST_NAMES)
