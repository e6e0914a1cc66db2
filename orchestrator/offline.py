"""`loopwright eval` and `loopwright warmstart`: parts of a run on their own, with the same
actors."""

import asyncio
import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loopwright.configs.load import Loaded, load
from loopwright.configs.schema import Config
from loopwright.orchestrator import assembly, warm_start
from loopwright.orchestrator.evaluation import evaluate
from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.parts import checkpoints
from loopwright.orchestrator.recorder import Recorder
from loopwright.orchestrator.run import prepare_folder, run_trackers
from loopwright.orchestrator.tasks import TaskStream


async def evaluate_target(target: str, config_path: str, overrides: Sequence[str]) -> str:
    """Play the held-out tasks with a run's newest checkpoint or with a model; a table of what was
    solved."""
    loaded, model = _target(target, config_path, overrides)
    config = loaded.config
    assembly.check_model(model)
    env = assembly.build_environment(config)
    tasks = TaskStream(warm_start.source_of(env), "test", config.evaluation.seed).first(
        config.evaluation.tasks
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.closing(run_trackers(config, Path(scratch))) as trackers,
    ):
        recorder = Recorder(trackers)
        recorder.phase(f"evaluating {model} on {len(tasks)} held-out tasks")
        cluster = assembly.open_cluster(config, recorder)
        try:
            most_of = assembly.concurrency_limits(env)
            actors = assembly.spawn(cluster, config, model, recorder, most_of=most_of)
            await actors.training.start(None)
            await actors.pool.start(await actors.training.publish(0, actors.pool.members()))
            metrics = await evaluate(
                actors.pool,
                tasks,
                assembly.episode_limits(config, evaluation=True),
                seed=config.evaluation.seed,
                timeout_s=config.cluster.step_timeout_s,
                progress=recorder.progress("evaluate"),
            )
            await actors.watchdog.close()
            await actors.pool.close()
            await actors.training.close()
        finally:
            await asyncio.to_thread(cluster.shutdown)
            await env.close()
    return "\n".join(f"{name.partition('/')[2]:28} {value:.4f}" for name, value in metrics.items())


def _target(target: str, config_path: str, overrides: Sequence[str]) -> tuple[Loaded, str]:
    run = Path(target)
    if (run / "config.toml").is_file():
        whole = checkpoints(run)
        if not whole:
            raise RunError(f"{run} has no checkpoint yet: nothing to evaluate")
        return load(config_path or run / "config.toml", overrides), str(whole[-1][1].resolve())
    if not config_path:
        raise RunError(
            f"{target} is not a run's folder: --config CONFIG says which environment to play"
        )
    return load(config_path, overrides), target


async def warm_start_only(loaded: Loaded) -> str:
    """Clone as the configuration's [warm_start] says; where the model is and how the cloning
    went."""
    config: Config = loaded.config
    if not config.warm_start.demonstrations:
        raise RunError(
            "warm_start.demonstrations = 0: nothing to clone; --set warm_start.demonstrations=400"
        )
    folder = prepare_folder(loaded, resume=False)
    env = assembly.build_environment(config)
    with contextlib.closing(run_trackers(config, folder)) as trackers:
        recorder = Recorder(trackers)
        cluster = assembly.open_cluster(config, recorder)
        try:
            plan = await warm_start.prepare(config, folder, env, cluster, recorder)
            report = await warm_start.clone(plan, recorder)
        finally:
            await asyncio.to_thread(cluster.shutdown)
            await env.close()
    return (
        f"cloned {report.demonstrations} demonstrations in {report.steps} steps, "
        f"{report.seconds:.0f} s; negative logprob of an action token "
        f"{report.loss_first:.2f} → {report.loss_last:.2f}\nmodel: {plan.cloned}"
    )
