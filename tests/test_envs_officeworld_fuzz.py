"""Noise against the full office: random policies, hostile text, hostile cells. Nothing is solved by
it, nothing crashes, and every row that it wrote is one that its table allows."""

import asyncio
import hashlib
import itertools
import json
from random import Random
from typing import Any

import pytest

from loopwright.envs.officeworld import OfficeWorld
from loopwright.envs.officeworld.full.apps import RESOURCES

FUZZED_CALLS, FUZZED_CELLS = 4500, 1000  # calls: in each of two formats


@pytest.mark.parametrize("seed", range(5))
def test_random_policies_never_solve_and_never_crash(seed: int) -> None:
    env = OfficeWorld(style="full", action_format="json")
    rng = Random(seed)

    async def scene() -> None:
        for split in ("train", "test"):
            for task in itertools.islice(env.tasks(split, seed), 20):
                await env.reset(task)
                for _ in range(25):
                    step = await env.step(random_action(env, rng))
                    for message in step.observation.messages:
                        message.content.encode()
                    if step.terminated:
                        break
                verdict = await env.evaluate()
                assert 0 <= verdict.reward < 1 and not verdict.success

    asyncio.run(scene())


def random_action(env: OfficeWorld, rng: Random) -> str:
    """A call of a real API with arguments that may fit."""
    office = env._live().office
    if rng.random() < 0.02:
        return json.dumps({"name": "done", "arguments": {"answer": rng.randint(0, 3)}})
    shown = rng.choice([*office.dialect.routes])
    values: dict[str, Any] = {}
    for label, param in office.dialect.params[office.dialect.routes[shown]].items():
        if param.required or rng.random() < 0.3:
            values[label] = random_value(rng, env, shown, param)
    return json.dumps({"name": shown, "arguments": values})


def random_value(rng: Random, env: OfficeWorld, shown: str, param: Any) -> Any:
    office = env._live().office
    table = rng.choice([*RESOURCES])
    ids = [i for i, _ in itertools.islice(office.world.rows(table), 20)] or [1]
    people = [row for _, row in itertools.islice(office.world.rows("contacts"), 10)]
    if param.name == "access_token":
        if rng.random() < 0.9:
            office.tokens["t"] = shown.partition(".")[0]
        return "t"
    if param.choices and rng.random() < 0.9:
        return rng.choice(param.choices)
    options: dict[str, list[Any]] = {
        "int": [rng.choice(ids), 0, 1, 5, -1, 10**9],
        "str": ["x", "", "docs", rng.choice(people)["email"], rng.choice(people)["phone"]],
        "bool": [True, False],
        "day": ["2031-05-01", "2031-13-01", ""],
        "clock": ["09:30", "25:00"],
        "ints": [[rng.choice(ids)], []],
        "strs": [[rng.choice(people)["email"]], [], ["nobody"]],
    }
    return rng.choice([*options[param.kind], None] if rng.random() < 0.2 else options[param.kind])


def hostile(rng: Random, env: OfficeWorld) -> str:
    """Text that means no good."""
    action = random_action(env, rng)
    nested: Any = "x"
    for _ in range(rng.randint(1, 60)):
        nested = [nested] if rng.random() < 0.5 else {"k": nested}
    call = json.loads(action)
    junk = [
        "\ud800",
        "\x00",
        "9" * 5000,
        "a" * 3000,
        "\u202e\u0000",
        "\U0001f600" * 50,
        10**400,
        1e308,
        None,
    ]
    call.setdefault("arguments", {})[rng.choice([*call.get("arguments", {}), "q"])] = rng.choice(
        [nested, *junk]
    )
    return rng.choice([
        action, action[: rng.randint(0, len(action))], json.dumps(call), action * 2,
        "".join(rng.choices("(){}[]\"'\\,:=.x0 \n\té你\U0001f4a9", k=rng.randint(0, 200))),
        "[" * rng.randint(1, 1900), '{"name":' * rng.randint(1, 200), "x" * rng.randint(1900, 2100),
        "\x00" * 9, "<tool_call>" + action + "</tool_call>",
        "<think>" + action + "</think>" + action,
    ])  # fmt: skip


@pytest.mark.parametrize("action_format", ["json", "call"])
def test_fuzzed_calls_leave_the_world_consistent(action_format: Any) -> None:
    env = OfficeWorld(style="full", action_format=action_format)
    rng = Random(f"fuzz/{action_format}")

    async def scene() -> int:
        count = 0
        tasks = env.tasks("test", 5)
        while count < FUZZED_CALLS:
            task = next(tasks)
            await env.reset(task)
            before = (
                hashlib.sha256(repr(env._live().office.world._base).encode()).digest()
                if count == 0
                else b""
            )
            for _ in range(50):
                text = hostile(rng, env)
                if action_format == "call" and rng.random() < 0.5:
                    text = text.replace('{"name": "', "", 1).replace('", "arguments": {', "(", 1)
                step = await env.step(text)
                count += 1
                for message in step.observation.messages:
                    assert len(message.content.encode()) < 40_000
                if step.terminated:
                    break
            consistent(env)
            assert 0 <= (await env.evaluate()).reward < 1
            if before:
                assert (
                    hashlib.sha256(repr(env._live().office.world._base).encode()).digest() == before
                )
        return count

    assert asyncio.run(scene()) >= FUZZED_CALLS


def consistent(env: OfficeWorld) -> None:
    """Every row that the episode wrote has its table's columns, with values of their kind."""
    office = env._live().office
    diff = office.world.diff()
    assert office.world.get("wallet", 1)["balance"] >= 0  # type: ignore[index, operator]
    for table, row_id in (*diff.added, *diff.changed):
        row = office.world.get(table, row_id)
        assert row is not None
        if (resource := RESOURCES.get(table)) is None:
            continue
        assert set(row) == {f.name for f in resource.fields}, table
        for f in resource.fields:
            value = row[f.name]
            wanted: Any = {"int": int, "bool": bool, "ints": tuple, "strs": tuple}.get(f.kind, str)
            assert type(value) is wanted, (table, f.name, value)
            if f.choices:
                assert value in f.choices


CELLS = (
    "x = 1", "x", "print('a' * 10**5)", "1 / 0", "import os; os._exit(1)", "while True: pass",
    "apis.nope.nope()", "apis.docs.show_app_descriptions(1)", "def f(): return f()\nf()", "(" * 300,
    "apis.vault.show_profile(x=[[[[1]]]])", "apis.done(result=1)", "open('/etc/passwd')", "\x00",
    "apis.docs.search_apis(query='\\ud800')", "print('\\ud800')", "raise SystemExit",
    "é = '你'; é",
    "[apis.vault.list_accounts() for _ in range(30)]", "import os; os.write(3, b'zzzz')",
    "del apis",
    "apis.mail.list_emails(page=10**30)", "x = [0] * 10**10", "apis.docs.show_api_doc(app={})",
    "print(dir(apis), apis.mail, vars())", "import socket; socket.socket()", "lambda: (yield)", "",
)  # fmt: skip


def test_fuzzed_cells_leave_the_world_consistent() -> None:
    env = OfficeWorld(style="full", action_format="code", cell_timeout_s=0.15)
    rng = Random("cells")

    async def scene() -> int:
        count = 0
        tasks = env.tasks("test", 6)
        while count < FUZZED_CELLS:
            task = next(tasks)
            await env.reset(task)
            for _ in range(21):
                code = rng.choice(CELLS)
                if code == "while True: pass" and rng.random() < 0.8:
                    code = "x = 1"  # each costs the whole deadline
                cut = code[: rng.randint(0, len(code))] if rng.random() < 0.2 else code
                step = await env.step(rng.choice(["```python\n{}\n```", "{}"]).format(cut))
                count += 1
                step.observation.messages[0].content.encode()
                if step.terminated:
                    break
            assert env.unit_tests()["collateral/none"]
            assert (await env.evaluate()).reward < 1
        await env.close()
        return count

    assert asyncio.run(scene()) >= FUZZED_CELLS
