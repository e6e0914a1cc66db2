"""The conformance kit: what every environment must do, one rule at a time.

    findings = await check(lambda: MyEnv(option=1))

An empty list means that the environment is fit for training. `RULES` names them all; each finding
carries the rule's name, the task and what was seen.
"""

import itertools
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Any

import msgpack

from loopwright.envs.protocol import Message, Observation, Step, Task, Verdict
from loopwright.envs.registry import Environment

SPLITS = ("train", "test")
ROLES = ("system", "user", "assistant", "tool")
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
SESSIONS = 8
STREAM = 100  # tasks compared between splits and streams


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One broken rule."""

    rule: str
    task_id: str  # empty where no task is involved
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """What a rule works with."""

    factory: Callable[[], Environment]
    tasks: Sequence[Task]  # from both splits
    seed: int

    def noise(self, task: Task, count: int) -> list[str]:
        """Hostile actions, the same for the same task."""
        rng = Random(f"noise/{self.seed}/{task.id}")
        fixed = ["", " \n\t", "x" * 100_000, "\x00\ud800\U0001f600 ﷽", "{" * 500, "f(" * 500]
        broken = [
            '{"name": 1}',
            '{"name": "a", "arguments": 3}',
            "<tool_call>",
            "<answer></answer>",
        ]
        alphabet = "abc(){}[]<>=\"', .\\\n0123456789é你"
        random = ["".join(rng.choices(alphabet, k=rng.randrange(1, 80))) for _ in range(count)]
        return [*fixed, *broken, *random]


Rule = Callable[[Kit], AsyncIterator[tuple[str, str]]]  # yields (task id, detail) for each breach


async def check(
    env_factory: Callable[[], Environment], *, tasks_per_split: int = 3, seed: int = 0
) -> list[Finding]:
    """Run every rule against fresh environments. Whatever a plugin raises becomes a finding."""
    try:
        source = env_factory()
        tasks = [
            t for s in SPLITS for t in itertools.islice(source.tasks(s, seed), tasks_per_split)
        ]
    except Exception as error:  # noqa: BLE001 - a plugin may raise anything
        return [Finding(rule="tasks", task_id="", detail=f"drawing tasks raised {error!r}")]
    if not tasks:
        return [Finding(rule="tasks", task_id="", detail="both splits are empty")]
    kit = Kit(factory=env_factory, tasks=tasks, seed=seed)
    findings: list[Finding] = []
    for name, rule in RULES.items():
        try:
            async for task_id, detail in rule(kit):
                findings.append(Finding(rule=name, task_id=task_id, detail=detail))
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything
            findings.append(Finding(rule=name, task_id="", detail=f"raised {error!r}"))
    return findings


def _texts(observation: Observation) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in observation.messages]


async def _transcript(env: Environment, task: Task, actions: Sequence[str]) -> list[Any]:
    """Everything an episode shows: opening, each reply, verdict."""
    seen: list[Any] = [_texts(await env.reset(task))]
    for action in actions:
        step = await env.step(action)
        seen.append((_texts(step.observation), step.terminated, dict(step.signals)))
        if step.terminated:
            break
    seen.append(await env.evaluate())
    return seen


async def _oracle(env: Environment, task: Task) -> tuple[list[str], Verdict]:
    """Play the oracle, its actions drawn between steps; they and the verdict."""
    await env.reset(task)
    actions: list[str] = []
    for action in env.oracle():
        actions.append(action)
        if (await env.step(action)).terminated:
            break
    return actions, await env.evaluate()


async def _spec(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    spec = kit.factory().spec
    for name, value in (("name", spec.name), ("version", spec.version)):
        if not value:
            yield "", f"spec.{name} is empty"
    if spec.max_turns < 1:
        yield "", f"spec.max_turns is {spec.max_turns}, must be at least 1"
    for task in kit.tasks:
        if task.environment != spec.name:
            yield task.id, f"Task.environment is {task.environment!r}, spec.name {spec.name!r}"


async def _task_records(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    for task in kit.tasks:
        if task.split not in SPLITS or not 1 <= task.difficulty <= 3 or not task.id:
            yield task.id, f"split {task.split!r}, difficulty {task.difficulty}, id {task.id!r}"
        try:
            msgpack.packb(dict(task.payload))
        except (TypeError, ValueError, OverflowError) as error:
            yield task.id, f"payload does not go into msgpack: {error}"


async def _repeated_stream(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    for split in SPLITS:
        first, again = (
            list(itertools.islice(kit.factory().tasks(split, kit.seed), STREAM)) for _ in range(2)
        )
        if first != again:
            yield "", f"tasks({split!r}, {kit.seed}) gave two different streams"


async def _held_out(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    env = kit.factory()
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


async def _determinism(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    if not kit.factory().spec.deterministic:
        return
    for task in kit.tasks:
        actions, _ = await _oracle(kit.factory(), task)
        for played in (actions, kit.noise(task, 5)[-5:]):
            first = await _transcript(kit.factory(), task, played)
            if first != await _transcript(kit.factory(), task, played):
                yield task.id, "the same actions gave other observations or another verdict"
                break


async def _oracle_solves(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    for task in kit.tasks:
        env = kit.factory()
        actions, verdict = await _oracle(env, task)
        if actions and not (verdict.success and verdict.reward >= 0.999):
            yield task.id, f"the oracle reached {verdict.reward}, success {verdict.success}"
        if len(actions) > env.spec.max_turns:
            yield task.id, f"the oracle took {len(actions)} turns of {env.spec.max_turns}"


async def _idle_fails(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    for task in kit.tasks:
        env = kit.factory()
        await env.reset(task)
        if (await env.evaluate()).success:
            yield task.id, "doing nothing counts as success"


async def _survives_text(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    for task in kit.tasks:
        env = kit.factory()
        await env.reset(task)
        for action in kit.noise(task, 30):
            shown = ascii(action[:40])
            try:
                step: object = await env.step(action)
            except Exception as error:  # noqa: BLE001 - the rule is that nothing is raised
                yield task.id, f"step({shown}) raised {error!r}"
                return
            if not isinstance(step, Step):
                yield task.id, f"step({shown}) gave a {type(step).__name__}"
                return
            if step.terminated:
                await env.reset(task)


async def _messages(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    for task in kit.tasks:
        env = kit.factory()
        seen: list[Message] = list((await env.reset(task)).messages)
        if not seen:
            yield task.id, "reset gave no message"
        for action in kit.noise(task, 10):
            step = await env.step(action)
            seen += step.observation.messages
            if step.terminated:
                break
        for message in seen:
            if message.role not in ROLES:
                yield task.id, f"role {message.role!r} is none of {', '.join(ROLES)}"
            try:
                message.content.encode()
            except (UnicodeEncodeError, AttributeError):
                yield task.id, f"content is not encodable text: {ascii(message.content)[:60]}"


async def _evaluate_idempotent(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    for task in kit.tasks:
        actions, plain = await _oracle(kit.factory(), task)
        env = kit.factory()
        await env.reset(task)
        for action in actions:
            if await env.evaluate() != await env.evaluate():
                yield task.id, "two evaluations in a row differ"
                break
            await env.step(action)
        if await env.evaluate() != plain:
            yield task.id, "evaluating between the steps changed the final verdict"


async def _reward_range(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    for task in kit.tasks:
        for actions in ([], kit.noise(task, 3)[-3:]):
            verdict = (await _transcript(kit.factory(), task, actions))[-1]
            values = {"reward": verdict.reward, **verdict.parts}
            for name, value in values.items():
                if not isinstance(value, int | float) or not math.isfinite(value):
                    yield task.id, f"{name} is {value!r}, must be a finite number"


async def _starts_over(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    for task in kit.tasks:
        actions, _ = await _oracle(kit.factory(), task)
        fresh = await _transcript(kit.factory(), task, actions)
        env = kit.factory()
        for other in kit.tasks[:2]:
            await _oracle(env, other)
        if await _transcript(env, task, actions) != fresh:
            yield task.id, "a used instance plays the task differently from a new one"


async def _interleaved(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    for task in kit.tasks[:2]:
        actions, _ = await _oracle(kit.factory(), task)
        alone = await _transcript(kit.factory(), task, actions)
        envs = [kit.factory() for _ in range(SESSIONS)]
        logs: list[list[Any]] = [[_texts(await env.reset(task))] for env in envs]
        for index in range(len(alone) - 2):  # the opening and the verdict are no actions
            for env, log in zip(envs, logs, strict=True):
                step = await env.step(actions[index])
                log.append((_texts(step.observation), step.terminated, dict(step.signals)))
        for env, log in zip(envs, logs, strict=True):
            log.append(await env.evaluate())
        differing = sum(log != alone for log in logs)
        if differing:
            yield task.id, f"{differing} of {SESSIONS} interleaved sessions differ from one alone"


async def _tool_schemas(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    for task in kit.tasks:
        for tool in (await kit.factory().reset(task)).tools:
            if problem := _schema_problem(tool):
                yield task.id, problem


def _schema_problem(tool: Mapping[str, Any]) -> str:
    """What is wrong with an OpenAI-style tool, or nothing."""
    try:
        json.dumps(tool, allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"a tool is not JSON: {error}"
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        return 'a tool must be {"type": "function", "function": {…}}'
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        return f"tool name {name!r} must match {TOOL_NAME.pattern}"
    if not function.get("description"):
        return f"tool {name} has no description"
    if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
        return f"tool {name}: parameters must be a JSON schema of type object"
    missing = set(parameters.get("required", ())) - set(parameters.get("properties", {}))
    return f"tool {name}: requires undeclared {sorted(missing)}" if missing else ""


async def _ends(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    for task in kit.tasks:
        env = kit.factory()
        actions, verdict = await _oracle(env, task)
        await env.step(actions[-1] if actions else "")
        if actions and not (await env.evaluate()).success and verdict.success:
            yield task.id, "an action after the end changed the verdict"
        await env.close()
        await env.close()


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "spec": _spec,
        "task_records": _task_records,
        "repeated_stream": _repeated_stream,
        "held_out": _held_out,
        "determinism": _determinism,
        "oracle_solves": _oracle_solves,
        "idle_fails": _idle_fails,
        "survives_text": _survives_text,
        "messages": _messages,
        "evaluate_idempotent": _evaluate_idempotent,
        "reward_range": _reward_range,
        "starts_over": _starts_over,
        "interleaved": _interleaved,
        "tool_schemas": _tool_schemas,
        "ends": _ends,
    }
)
