"""Before RL: a policy to begin with, and a limited number of oracle demonstrations cloned into it.

What cloning teaches is measured apart from what RL teaches: the held-out success of the untouched
policy and of the clone are `success.initial` and `success.warm_start` of the summary.
"""

import asyncio
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from loopwright.actors.demonstrations import Demonstration, demonstrate
from loopwright.configs.schema import Config
from loopwright.envs.protocol import Env, TaskSource
from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.processes import Actor, Cluster, Placement
from loopwright.orchestrator.recorder import Recorder

if TYPE_CHECKING:
    from loopwright.actors.cloning import CloningReport

_TOKENIZER_EPISODES = 400  # read, not cloned: the vocabulary of the environment's own text
_DEMONSTRATION_SEED = 7_919  # another stream than the training tasks of the same seed


@dataclass(slots=True, kw_only=True)
class Plan:
    """Where the first weights come from."""

    base: str  # model folder (or hub id) before cloning
    cloned: Path  # where the clone is, or will be
    finished: bool  # the clone is there already, or none is wanted and base is all
    starter: Actor | None  # clones; None where nothing is to be cloned
    demonstrations: list[Demonstration]
    config: Config


def source_of(env: Env) -> TaskSource:
    """The environment as the source of its tasks."""
    if not isinstance(env, TaskSource):
        raise RunError(
            f"{type(env).__name__} has no tasks(split, seed): an environment brings its own tasks"
        )
    return env


async def record_demonstrations(
    env: Env, seed: int, count: int, recorder: Recorder
) -> list[Demonstration]:
    """What the oracle does on `count` training tasks."""
    tell = recorder.progress("recording oracle episodes")
    found: list[Demonstration] = []
    for task in islice(source_of(env).tasks("train", seed + _DEMONSTRATION_SEED), count):
        found.append(await demonstrate(env, task))
        if len(found) % 50 == 0 or len(found) == count:
            tell(len(found), count)
    return found


async def prepare(
    config: Config, folder: Path, env: Env, cluster: Cluster, recorder: Recorder
) -> Plan:
    """Build the tiny policy where it is wanted, and get ready to clone; nothing is done twice on
    resume."""
    tiny, wanted = config.model.path == "tiny", config.warm_start.demonstrations
    base = str((folder / "initial").resolve()) if tiny else config.model.path
    cloned = (folder / "warm_start").resolve()
    plan = Plan(
        base=base,
        cloned=cloned,
        finished=cloned.exists(),
        starter=None,
        demonstrations=[],
        config=config,
    )
    build = tiny and not Path(base).exists()
    if not build and (plan.finished or not wanted):
        return plan
    with recorder.timed("warm_start"):
        count = max(wanted, _TOKENIZER_EPISODES if build else 0)
        recorded = await record_demonstrations(env, config.environment.seed, count, recorder)
        plan.demonstrations = recorded[:wanted]
        plan.starter = cluster.spawn(
            "warm start",
            "loopwright.actors.warm_start:WarmStarter",
            (config.trainer.threads,),
            Placement(cpus=0, threads=config.trainer.threads, shares_memory=True),
        )
        if build:
            recorder.phase("building a tiny policy on the environment's own words")
            shape = {
                **config.tiny.model_dump(),
                "max_context": config.environment.max_context,
                "seed": config.run.seed,
            }
            await plan.starter.call(
                "build_tiny",
                recorded,
                base,
                shape,
                timeout_s=config.cluster.start_timeout_s,
                waiting_for="tiny policy",
            )
    if not wanted and plan.starter is not None:
        plan.starter.end()
        plan.starter = None
    return plan


async def clone(plan: Plan, recorder: Recorder) -> "CloningReport":
    """Clone the plan's demonstrations, showing progress; the report of the cloning."""
    starter, config = plan.starter, plan.config
    assert starter is not None, "prepare() made one"
    w = config.warm_start
    recorder.phase(f"warm start: cloning {len(plan.demonstrations)} oracle demonstrations")
    tell = recorder.progress("warm start")
    with recorder.timed("warm_start"):
        cloning = asyncio.ensure_future(
            starter.call(
                "clone",
                plan.demonstrations,
                plan.base,
                str(plan.cloned),
                {
                    "steps": w.steps,
                    "batch": w.batch,
                    "lr": w.lr,
                    "seed": config.run.seed,
                    "until_match": w.until_match,
                    "key_token_weight": w.key_token_weight,
                },
                timeout_s=config.cluster.step_timeout_s,
                waiting_for="cloning",
            )
        )
        try:
            while not cloning.done():
                await asyncio.wait([cloning], timeout=1.0)
                done, _ = await starter.call("progress", timeout_s=30, waiting_for="progress")
                tell(done, w.steps)
            report: CloningReport = await cloning
        finally:
            cloning.cancel()
    starter.end()
    recorder.event("cloned", **asdict(report))
    plan.starter, plan.demonstrations = None, []
    plan.finished = True
    return report
