"""Success on held-out tasks: always the same ones, each played once, all at the version of one
moment."""

import asyncio
from collections import defaultdict
from collections.abc import Callable

from loopwright.actors.episode import EpisodeLimits
from loopwright.algorithms.records import Outcome, Rollout
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
    return summarise(scored, faults=len(done) - len(scored))


def summarise(rollouts: list[Rollout], *, faults: int) -> dict[str, float]:
    """Means over scored rollouts, success by scenario, and everything by environment."""
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
        **{f"eval_scenario/{name}": sum(s) / len(s) for name, s in sorted(scenarios.items())},
        **environment_metrics(rollouts, "eval_environment"),
    }
