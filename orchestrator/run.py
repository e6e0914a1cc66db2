"""One run from configuration to summary: check, start, warm-start, train, evaluate, leave a folder
that says it all."""

import asyncio
import contextlib
import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopwright.algorithms.batching import smallest_group
from loopwright.configs.load import Loaded, load, render
from loopwright.configs.schema import Config
from loopwright.envs.protocol import Env
from loopwright.orchestrator import assembly, warm_start
from loopwright.orchestrator.buffer import GroupBuffer
from loopwright.orchestrator.evaluation import evaluate
from loopwright.orchestrator.faults import Refused, RunError
from loopwright.orchestrator.groups import Groups
from loopwright.orchestrator.ledger import Ledger
from loopwright.orchestrator.loop import train
from loopwright.orchestrator.parity import check_identity, check_parity
from loopwright.orchestrator.parts import Parts, checkpoints, read_run_state
from loopwright.orchestrator.picture import draw
from loopwright.orchestrator.placement import fixed_sizes
from loopwright.orchestrator.processes import Cluster
from loopwright.orchestrator.recorder import Recorder, write_json
from loopwright.orchestrator.resume import refuse_changes
from loopwright.orchestrator.room import Room
from loopwright.orchestrator.sampling_record import SamplingRecord
from loopwright.orchestrator.scaling import Scaling, as_reached
from loopwright.orchestrator.tasks import TaskStream
from loopwright.orchestrator.trackers import Trackers, open_trackers

_START_FILE = "start.json"  # success before training
_RECORDS = "episodes"  # what is being played, while the run lasts: actors/episode_record.py
_MIN_FREE_BYTES = 200 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a run ended."""

    folder: Path
    summary: dict[str, Any]
    complete: bool  # False: stopped on request, `--resume` goes on


def run_folder(config: Config) -> Path:
    """`run.dir`/`run.name`."""
    return Path(config.run.dir) / config.run.name


async def run(loaded: Loaded, *, resume: bool) -> Ended:
    """Run to the end. Raises `RunError` (or `EnvError`) with the reason; what was earned is in the
    run's folder."""
    config = loaded.config
    env = assembly.build_environment(config)
    assembly.draws(config, env, {})  # refuses bad sampler options before anything is made
    if resume:
        loaded = as_reached(loaded, run_folder(config))
        config = loaded.config
    folder = prepare_folder(loaded, resume)
    whole = checkpoints(folder) if resume else []
    state = read_run_state(whole[-1][1]) if whole else None
    with (
        contextlib.closing(run_trackers(config, folder)) as trackers,
        contextlib.closing(Ledger(folder / "ledger")) as ledger,
    ):
        recorder = Recorder(trackers, resumed=state)
        if ledger.state.cut_bytes:
            recorder.event("ledger_cut", size_bytes=ledger.state.cut_bytes)
        recorder.phase(
            "starting Ray" if config.cluster.address != "none" else "starting in this process"
        )
        with recorder.timed("start_cluster"):
            cluster = assembly.open_cluster(config, recorder)
        recorder.phase(cluster.description)
        if (exported := cluster.tracker(config.run.name)) is not None:
            trackers.join("ray", exported)
        shutil.rmtree(folder / _RECORDS, ignore_errors=True)  # of a life of the run before this
        try:
            with _interrupt_on_sigterm():
                parts = await _start(
                    config, folder, env, cluster, recorder, ledger, whole[-1] if whole else None
                )
            try:
                with _stop_on_signals(parts.stop):
                    return await _train(config, parts)
            finally:
                await parts.close()
        finally:
            await asyncio.to_thread(cluster.shutdown)
            shutil.rmtree(folder / _RECORDS, ignore_errors=True)
            await env.close()


def run_trackers(config: Config, folder: Path) -> Trackers:
    """The trackers that `run.trackers` names, writing into `folder`."""
    return open_trackers(
        config.run.trackers,
        folder,
        run_name=config.run.name,
        total_steps=config.run.steps,
        config=config.model_dump(mode="json"),
    )


def prepare_folder(loaded: Loaded, resume: bool) -> Path:
    """Checks that need nothing started; the run's folder with its `config.toml`."""
    config = loaded.config
    assembly.check_model(config.model.path)
    assembly.check_trainer(config)
    assembly.check_engine(config)
    folder = run_folder(config)
    started = (folder / "config.toml").exists()
    if started and not resume:
        raise Refused(
            f"{folder} holds a run already: add --resume to go on with it, "
            "--set run.name=... to start another, or remove the folder"
        )
    if resume and not started:
        raise Refused(f"--resume: there is no run in {folder}; start it without --resume")
    if resume:
        refuse_changes(load(folder / "config.toml").config, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < _MIN_FREE_BYTES:
            raise Refused(
                f"{folder} has {free >> 20} MiB of free disk, a run needs "
                f"{_MIN_FREE_BYTES >> 20} MiB: free space, or set run.dir"
            )
        (folder / "config.toml").write_text(render(loaded))
    except OSError as error:
        raise Refused(f"{folder}: {error.strerror}; set run.dir to a folder to write in") from error
    return folder


async def _start(
    config: Config,
    folder: Path,
    env: Env,
    cluster: Cluster,
    recorder: Recorder,
    ledger: Ledger,
    checkpoint: tuple[int, Path] | None,
) -> Parts:
    """Actors up, version 0 (or the checkpoint's) in every engine, and its success measured where
    that is due."""
    plan = await warm_start.prepare(config, folder, env, cluster, recorder)
    parts = _parts(config, folder, env, cluster, recorder, ledger, plan, checkpoint)
    recorder.phase("starting trainer, engines and environment workers")
    try:
        await _bring_up(parts, plan, checkpoint, config)
        if checkpoint is None:
            await parts.pool.watched(_measure(parts, plan))
    except BaseException:
        await parts.close()
        raise
    recorder.success.setdefault("initial", recorder.success.get("warm_start", 0.0))
    return parts


async def _measure(parts: Parts, plan: warm_start.Plan) -> None:
    """Success of version 0, and of what was there before cloning; kept for a resume before the
    first checkpoint."""
    kept = parts.folder / _START_FILE
    success = parts.recorder.success
    if plan.finished and kept.exists():
        success.update(json.loads(kept.read_text()))
        return
    if plan.finished:
        success["warm_start"] = await parts.evaluate(0)
    else:
        await _initial_and_clone(parts, plan)
    write_json(kept, success)


async def _bring_up(
    parts: Parts, plan: warm_start.Plan, checkpoint: tuple[int, Path] | None, config: Config
) -> None:
    with parts.recorder.timed("start_actors"):
        await parts.training.start(checkpoint[1] if checkpoint else None)
        if checkpoint is None and plan.finished:
            await parts.training.reset(str(plan.cloned))
        memory = await parts.training.dry_run(config.environment.max_context)
        parts.recorder.rehearsed(memory.sentence(), memory.event())
        manifest = await parts.training.publish(parts.buffer.version, parts.pool.members())
        reports = await parts.pool.start(manifest)
        await check_identity(parts.training, parts.pool)
        parity = await check_parity(parts.training, parts.pool, config.model.dtype)
    parts.recorder.published(manifest, reports)
    parts.recorder.event("parity", logprob_difference_max=parity)


async def _initial_and_clone(parts: Parts, plan: warm_start.Plan) -> None:
    """Measure the untouched policy while demonstrations are cloned beside it; then begin from the
    clone."""
    recorder = parts.recorder
    if plan.starter is None:
        recorder.success["initial"] = await parts.evaluate(0)
        recorder.success["warm_start"] = recorder.success["initial"]
        return
    async with asyncio.TaskGroup() as tasks:
        cloning = tasks.create_task(warm_start.clone(plan, recorder))
        metrics = await evaluate(
            parts.pool,
            parts.eval_tasks,
            parts.eval_limits,
            seed=parts.eval_seed,
            timeout_s=parts.step_timeout_s,
            progress=lambda done, total: None,
        )
        recorder.untouched(metrics)
        await cloning
    await parts.training.reset(str(plan.cloned))
    manifest = await parts.training.publish(0, parts.pool.members())
    recorder.published(manifest, await parts.pool.publish(manifest))
    recorder.success["warm_start"] = await parts.evaluate(0)


def _actors(
    config: Config, folder: Path, env: Env, cluster: Cluster, recorder: Recorder, model: str
) -> assembly.Actors:
    records = None
    if config.cluster.address != "none":  # else no worker can be lost
        records = folder / _RECORDS
        records.mkdir()
    return assembly.spawn(
        cluster,
        config,
        model,
        recorder,
        SamplingRecord(folder / "ledger"),
        most_of=assembly.concurrency_limits(env),
        records=records,
    )


def _parts(
    config: Config,
    folder: Path,
    env: Env,
    cluster: Cluster,
    recorder: Recorder,
    ledger: Ledger,
    plan: warm_start.Plan,
    checkpoint: tuple[int, Path] | None,
) -> Parts:
    actors = _actors(config, folder, env, cluster, recorder, plan.base)
    r, run_ = config.rollout, config.run
    version = checkpoint[0] if checkpoint else 0
    schedule = assembly.schedule(config)
    buffer = GroupBuffer(
        schedule,
        version=version,
        consumed=ledger.state.consumed(version),
        planned=ledger.state.planned(version),
    )
    room = Room(_groups_at_once(config, r.engines))

    async def engines_up(count: int) -> None:
        await room.resize(_groups_at_once(config, count))

    source = warm_start.source_of(env)
    stream = TaskStream(
        source,
        "train",
        config.environment.seed,
        choose=assembly.draws(config, env, ledger.state.played),
        draws=assembly.draws_of_a_ticket(config),
    )
    return Parts(
        folder=folder,
        steps=run_.steps,
        samplers=schedule.outstanding,
        advantage=config.algorithm.advantage,
        drop_below=assembly.drop_below(config),
        step_timeout_s=config.cluster.step_timeout_s,
        max_seconds=run_.max_seconds,
        eval_every=run_.eval_every,
        checkpoint_every=run_.checkpoint_every,
        keep_checkpoints=run_.keep_checkpoints,
        eval_limits=assembly.episode_limits(config, evaluation=True),
        eval_tasks=TaskStream(source, "test", config.evaluation.seed).first(
            config.evaluation.tasks
        ),
        eval_seed=config.evaluation.seed,
        stream=stream,
        buffer=buffer,
        groups=Groups(
            group_size=r.group_size,
            least=smallest_group(config.algorithm.advantage),
            seed=run_.seed,
            limits=assembly.episode_limits(config, evaluation=False),
            stream=stream,
            buffer=buffer,
            pool=actors.pool,
            ledger=ledger,
            recorder=recorder,
        ),
        pool=actors.pool,
        training=actors.training,
        watchdog=actors.watchdog,
        by_turns=actors.plan.colocated,
        ledger=ledger,
        recorder=recorder,
        room=room,
        scaling=Scaling(
            folder,
            actors.pool,
            spawn=actors.spawn,
            fixed=fixed_sizes(config, actors.plan),
            engines_up=engines_up,
            event=recorder.event,
        ),
    )


def _groups_at_once(config: Config, engines: int) -> int:
    """As many as fill the engines, and one more, so that none runs dry."""
    r = config.rollout
    return -(-engines * r.concurrency // r.group_size) + 1


async def _train(config: Config, parts: Parts) -> Ended:
    recorder = parts.recorder
    recorder.phase(f"training: {parts.steps} steps, lag ≤ {parts.buffer.schedule.max_lag}")
    try:
        with recorder.timed("training"):
            await train(parts)
        version = parts.buffer.version
        complete = version >= parts.steps
        newest = checkpoints(parts.folder)
        if version and (not newest or newest[-1][0] < version):
            await parts.checkpoint(version)
    finally:
        # without room on the disk there is none for a picture either, and that is not the reason
        with contextlib.suppress(OSError):
            draw(parts.folder / "curve.png", recorder.summary())
    if complete:
        recorder.success["final"] = recorder.summary()["curve"][-1][1]
    summary = recorder.summary() | {"name": config.run.name, "complete": complete}
    try:
        write_json(parts.folder / "summary.json", summary)
    except OSError as error:
        raise RunError(
            f"cannot write {parts.folder}/summary.json: {error.strerror}; the last checkpoint is "
            "whole: free space, then run the same command with --resume"
        ) from error
    return Ended(folder=parts.folder, summary=summary, complete=complete)


@contextlib.contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """While nothing is trained yet, SIGTERM is Ctrl-C: asyncio cancels the run, which cleans up."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


@contextlib.contextmanager
def _stop_on_signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM (`ray job stop`, Kubernetes) and Ctrl-C end the run after the current step, with a
    checkpoint."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
