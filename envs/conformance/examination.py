"""All rules, and the examination of one environment by them."""

import asyncio
import gc
import itertools
import statistics
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from loopwright.envs.conformance import declared, lasting, played
from loopwright.envs.conformance.kit import SPLITS, Finding, Kit, Rule
from loopwright.envs.registry import Environment

DEADLINE_S = 300.0  # for one rule: an environment that hangs is a finding
_TIMED_S = 0.3  # of playing, for the figures

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.__name__: rule
        for rule in (
            declared.spec,
            declared.task_records,
            declared.repeated_stream,
            declared.held_out,
            declared.tool_schemas,
            played.determinism,
            played.oracle_solves,
            played.idle_fails,
            played.random_fails,
            played.budget,
            played.survives_text,
            played.messages,
            played.signals,
            played.evaluate_idempotent,
            played.reward_range,
            played.starts_over,
            played.interleaved,
            played.ends,
            played.snapshots,
            lasting.answer_leak,
            lasting.cancel_leaks,
            lasting.memory,
        )
    }
)
TASKS, DEADLINE = "tasks", "deadline"  # broken where no rule can be tried: no tasks, a hang


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How fast it is: medians of one instance, wall clock."""

    reset_ms: float
    steps_per_s: float
    evaluate_ms: float

    def __str__(self) -> str:
        return (
            f"reset {self.reset_ms:.3g} ms · {self.steps_per_s:,.0f} steps/s · "
            f"evaluate {self.evaluate_ms:.3g} ms"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of an examination; without findings the environment is fit for training."""

    findings: tuple[Finding, ...]
    figures: Figures | None  # None where it could not be played


def explain(rule: str) -> str:
    """What a rule asks for, in a sentence."""
    if rule == TASKS:
        return "The environment can be made, and has tasks."
    if rule == DEADLINE:
        return "No call of an environment hangs."
    return " ".join((RULES[rule].__doc__ or "").split())


async def check(
    env_factory: Callable[[], Environment],
    *,
    tasks_per_split: int = 3,
    seed: int = 0,
    full: bool = False,
) -> list[Finding]:
    """Run every rule against fresh environments: the findings. Whatever a plugin raises becomes
    one. `full` plays as long as it takes to see a small leak; without it this is fit for a test
    suite."""
    report = await examine(
        env_factory, tasks_per_split=tasks_per_split, seed=seed, full=full, measure=False
    )
    return [*report.findings]


async def examine(
    env_factory: Callable[[], Environment],
    *,
    tasks_per_split: int = 3,
    seed: int = 0,
    full: bool = False,
    measure: bool = True,
    deadline_s: float = DEADLINE_S,
) -> Report:
    """As `check`, with figures if it is to `measure`. After a rule that does not end within
    `deadline_s` no other is tried."""
    kit = Kit(factory=env_factory, tasks=(), seed=seed, full=full)
    try:
        source = kit.make()
        kit.tasks = [
            t for s in SPLITS for t in itertools.islice(source.tasks(s, seed), tasks_per_split)
        ]
    except Exception as error:  # noqa: BLE001 - a plugin may raise anything
        return _hopeless(f"drawing tasks raised {error!r}")
    finally:
        await kit.close()
    if not kit.tasks:
        return _hopeless("both splits are empty")
    gc.freeze()  # what is there now is not the environment's; collections need not look at it
    try:
        findings = [found async for found in _broken(kit, deadline_s)]
    finally:
        gc.unfreeze()
    figures = await _measure(kit) if measure and not findings else None
    return Report(findings=tuple(findings), figures=figures)


async def _broken(kit: Kit, deadline_s: float) -> AsyncIterator[Finding]:
    for name, rule in RULES.items():
        try:
            async with asyncio.timeout(deadline_s) as deadline:
                async for task_id, detail in rule(kit):
                    yield Finding(rule=name, task_id=task_id, detail=detail)
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything
            if deadline.expired():
                detail = f"the rule {name} did not end within {deadline_s:g} s"
                yield Finding(rule=DEADLINE, task_id="", detail=detail)
                return
            where = traceback.extract_tb(error.__traceback__)[-1]
            detail = f"raised {error!r} in {where.filename}:{where.lineno}"
            yield Finding(rule=name, task_id="", detail=detail)
        finally:
            await kit.close()


def _hopeless(detail: str) -> Report:
    return Report(findings=(Finding(rule=TASKS, task_id="", detail=detail),), figures=None)


async def _measure(kit: Kit) -> Figures:
    """Reset, steps and grading of one instance, as many episodes as fit."""
    env, resets, steps, grades = kit.make(), list[float](), list[float](), list[float]()
    plan = [(t, (await kit.oracle(t))[0] or kit.noise(t, 3)[-3:]) for t in kit.tasks]
    ends = time.monotonic() + _TIMED_S
    for task, actions in itertools.cycle(plan):
        at = [time.perf_counter()]
        await env.reset(task)
        at.append(time.perf_counter())
        for action in actions:
            await env.step(action)
        at.append(time.perf_counter())
        await env.evaluate()
        resets.append(at[1] - at[0])
        steps.append((at[2] - at[1]) / len(actions))
        grades.append(time.perf_counter() - at[2])
        if time.monotonic() > ends and len(resets) >= len(plan):
            break
    await kit.close()
    return Figures(
        reset_ms=1e3 * statistics.median(resets),
        steps_per_s=1 / statistics.median(steps),
        evaluate_ms=1e3 * statistics.median(grades),
    )
