"""Rules of what an environment declares: its spec, its tasks, their streams, its tools."""

import itertools
import json
import re
from collections.abc import AsyncIterator, Mapping

from loopwright.envs.conformance.kit import SPLITS, Kit
from loopwright.envs.protocol import Snapshots, encode_task

TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
STREAM = 100  # tasks compared between splits and streams


async def spec(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """The declaration has a name, a version, budgets, and only abilities that are there; while a
    task is played, its name is the task's environment."""
    env = kit.make()
    found = env.spec
    for name, value in (("name", found.name), ("version", found.version)):
        if not value:
            yield "", f"spec.{name} is empty"
    if found.max_turns < 1:
        yield "", f"spec.max_turns is {found.max_turns}, must be at least 1"
    if found.max_concurrency < 0:
        yield "", f"spec.max_concurrency is {found.max_concurrency}, must be 0 (no limit) or more"
    if found.snapshots and not isinstance(env, Snapshots):
        yield "", "spec.snapshots is true, but there are no snapshot() and restore()"
    for task in kit.tasks:
        await env.reset(task)
        if task.environment != env.spec.name:
            yield task.id, f"Task.environment is {task.environment!r}, spec.name {env.spec.name!r}"


async def task_records(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """A task has an id, a known split, a difficulty from 1 to 3, and plain data that travels."""
    for task in kit.tasks:
        if task.split not in SPLITS or not 1 <= task.difficulty <= 3 or not task.id:
            yield task.id, f"split {task.split!r}, difficulty {task.difficulty}, id {task.id!r}"
        try:
            encode_task(task)
        except (TypeError, ValueError, OverflowError) as error:
            yield task.id, f"the task does not go into msgpack: {error}"


async def repeated_stream(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """The same split and seed give the same stream of tasks."""
    envs = (kit.make(), kit.make())
    for split in SPLITS:
        first, again = (list(itertools.islice(e.tasks(split, kit.seed), STREAM)) for e in envs)
        if first != again:
            yield "", f"tasks({split!r}, {kit.seed}) gave two different streams"


async def held_out(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """No task of the test split is one of the train split."""
    env = kit.make()
    streams = {
        split: [t for s in range(3) for t in itertools.islice(env.tasks(split, s), STREAM)]
        for split in SPLITS
    }
    train = {t.id for t in streams["train"]}
    for task in streams["test"]:
        if task.id in train:
            yield task.id, "occurs in both splits"
    for split, tasks in streams.items():
        if any(t.split != split for t in tasks):
            yield "", f"tasks({split!r}) yields tasks of another split"
    contents = {split: {(t.scenario, t.seed) for t in tasks} for split, tasks in streams.items()}
    if shared := contents["train"] & contents["test"]:
        yield "", f"{len(shared)} pairs of scenario and seed occur in both splits"


async def tool_schemas(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """Tools are JSON, in OpenAI's form, named, described, their required arguments declared."""
    env = kit.make()
    for task in kit.tasks:
        for tool in (await env.reset(task)).tools:
            if problem := schema_problem(tool):
                yield task.id, problem


def schema_problem(tool: object) -> str:
    """What is wrong with an OpenAI-style tool, or nothing."""
    if not isinstance(tool, Mapping):
        return f"a tool is a {type(tool).__name__}, expected a JSON object"
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    try:
        json.dumps(dict(tool), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return f"the schema of tool {name!r} is not JSON: {error}"
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        return 'a tool must be {"type": "function", "function": {…}}'
    parameters = function.get("parameters")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        return f"tool name {name!r} must match {TOOL_NAME.pattern}"
    if not function.get("description"):
        return f"tool {name} has no description"
    if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
        return f"tool {name}: parameters must be a JSON schema of type object"
    missing = set(parameters.get("required", ())) - set(parameters.get("properties", {}))
    return f"tool {name}: requires undeclared {sorted(missing)}" if missing else ""
