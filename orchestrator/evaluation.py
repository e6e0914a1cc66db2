"""Success on held-out tasks: always the same ones, each played once, all at the version of one
moment."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

from loopwright.actors.episode import EpisodeLimits
from loopwright.algorithms.records import Outcome, Rollout
from loopwright.envs.metrics import behavior, scenario_goal_completion
from loopwright.envs.protocol import Task
from loopwright.orchestrator.environment_metrics import environment_metrics
from loopwright.orchestrator.faults import DeadlinePassed, RunError
from loopwright.orchestrator.pool import Pool, episode_seed

_FIRST = -1_000_000  # evaluation goes before any ticket: the loop waits for it


async def evaluate(
    pool: Pool,
    tasks: list[Task],
    limits: EpisodeLimits,
    *,
    seed: int,
    timeout_s: float,
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    """Play `tasks`; metrics `eval/…`: success (TGC, 0–1), reward, turns,
    faults.

    Tasks whose environment failed for good are left out of the means and counted; all of them
    failing is an error.
    """
    done: list[Rollout] = []

    async def play(task: Task) -> None:
        rollout, _ = await pool.play(
            task, 0, seed=episode_seed(seed, task, 0), priority=_FIRST, limits=limits
        )
        done.append(rollout)
        progress(len(done), len(tasks))

    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(play(task) for task in tasks))
    except TimeoutError:
        raise DeadlinePassed(
            f"evaluation: {len(done)} of {len(tasks)} episodes came back within {timeout_s:g} s; "
            "lower evaluation.tasks or raise cluster.step_timeout_s"
        ) from None
    scored = [r for r in done if r.outcome is not Outcome.INFRA_FAULT]
    if not scored:
        raise RunError(
            f"evaluation: all {len(done)} episodes were infra faults; "
            f"the last one: {done[-1].fault}"
        )
    return summarise(scored, faults=len(done) - len(scored), groups=scenario_groups(tasks))


def scenario_groups(tasks: list[Task]) -> dict[str, str]:
    """Task id → instance of a scenario, for the whole ones: environments that play all variants of
    an instance name it in the payload as `group`. The last one of an evaluation may be cut off."""
    named = {task.id: str(task.payload["group"]) for task in tasks if "group" in task.payload}
    sizes = Counter(named.values())
    whole = max(sizes.values(), default=0)
    return {task_id: group for task_id, group in named.items() if sizes[group] == whole}


def summarise(
    rollouts: list[Rollout], *, faults: int, groups: Mapping[str, str]
) -> dict[str, float]:
    """Means over scored rollouts, success by scenario, everything by environment, behaviour where
    an environment counts it, and scenario success (SGC, 0–1): the share of instances all of whose
    variants were solved."""
    scenarios: dict[str, list[bool]] = defaultdict(list)
    for rollout in rollouts:
        scenarios[rollout.scenario].append(rollout.success)
    count = len(rollouts)
    return {
        "eval/success": sum(r.success for r in rollouts) / count,
        "eval/reward_mean": sum(r.reward for r in rollouts) / count,
        "eval/turns_mean": sum(r.turns for r in rollouts) / count,
        "eval/generated_tokens_mean": sum(r.generated_tokens for r in rollouts) / count,
        "eval/infra_faults": float(faults),
        **_scenario_success(rollouts, groups),
        **{f"eval_behavior/{name}": value for name, value in _behavior(rollouts).items()},
        **{f"eval_scenario/{name}": sum(s) / len(s) for name, s in sorted(scenarios.items())},
        **environment_metrics(rollouts, "eval_environment"),
    }


def _scenario_success(rollouts: list[Rollout], groups: Mapping[str, str]) -> dict[str, float]:
    """Instances with a variant that no environment could play are left out."""
    found = Counter(groups[r.task_id] for r in rollouts if r.task_id in groups)
    wanted = Counter(groups.values())
    whole = [r for r in rollouts if r.task_id in groups]
    whole = [r for r in whole if found[groups[r.task_id]] == wanted[groups[r.task_id]]]
    if not whole:
        return {}
    completion = scenario_goal_completion((groups[r.task_id], r.success) for r in whole)
    return {"eval/scenario_success": completion / 100}


def _behavior(rollouts: list[Rollout]) -> dict[str, float]:
    return behavior([r.tool_errors for r in rollouts], [r.turns for r in rollouts])
