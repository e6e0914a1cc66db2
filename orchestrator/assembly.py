"""From a configuration to living actors: one table says which process gets what."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loopwright.actors.channels.settings import ChannelSettings
from loopwright.actors.engine import EngineSettings
from loopwright.actors.env_worker import WorkerSettings
from loopwright.actors.episode import PIECE_TOKENS, EpisodeLimits
from loopwright.actors.vllm_setup import VLLM_CPU_ENVIRONMENT
from loopwright.algorithms.admission import Schedule
from loopwright.algorithms.advantages import CRITIC
from loopwright.configs.channels import channel_option
from loopwright.configs.schema import Config
from loopwright.envs import mix, registry
from loopwright.envs.protocol import Env, EnvError
from loopwright.orchestrator import placement
from loopwright.orchestrator.cluster import connect
from loopwright.orchestrator.faults import Refused, RestartBudget
from loopwright.orchestrator.membership import Deadlines, Role
from loopwright.orchestrator.pool import FaultLimits, Pool
from loopwright.orchestrator.processes import Actor, Cluster, Placement
from loopwright.orchestrator.ranked_trainer import RankedTrainer
from loopwright.orchestrator.recorder import Recorder
from loopwright.orchestrator.samplers import Draws
from loopwright.orchestrator.sampling_record import SamplingRecord
from loopwright.orchestrator.tasks import DRAWS, Played
from loopwright.orchestrator.training import Training
from loopwright.orchestrator.watchdog import Watchdog

_WORKERS_MEMORY = 0.5  # of a machine's memory, for all environment workers together


@dataclass(slots=True, kw_only=True)
class Actors:
    """Every process of a run but the warm start's."""

    pool: Pool
    training: Training
    plan: placement.Plan
    watchdog: Watchdog
    spawn: Mapping[Role, Callable[[int], Actor]]  # one more of a kind, under a number


def open_cluster(config: Config, recorder: Recorder) -> Cluster:
    """The cluster the configuration names, or a new one."""
    c = config.cluster
    return connect(
        c.address,
        partial(placement.needs, config),
        cpus=c.cpus,
        object_store_bytes=c.object_store_bytes,
        timeout_s=c.start_timeout_s,
        say=recorder.phase,
    )


def build_environment(config: Config) -> Env:
    """An environment in this process: the controller draws tasks from it and asks it for
    budgets. Raises `Refused` for one that does not load or cannot be constructed."""
    name, options = config.environment.name, environment_options(config)
    try:
        return registry.load(name, options)
    except EnvError as error:
        raise Refused(str(error)) from error
    except Exception as error:  # the constructor is plugin code
        raise Refused(
            f"environment.name = {name!r}: its constructor raised {type(error).__name__}: {error} "
            f"(environment.options = {options})"
        ) from error


def environment_options(config: Config) -> dict[str, Any]:
    """What the environment is constructed with, here and in every worker."""
    e = config.environment
    return {"members": e.mix} if e.mix else dict(e.options)


def schedule(config: Config) -> Schedule:
    """How far generation runs ahead, and whom a step waits for."""
    r = config.rollout
    return Schedule(
        groups_per_step=r.groups_per_step,
        max_lag=r.max_lag,
        group_size=r.group_size,
        window=r.window,
        cut=r.cut,
        cut_group=r.cut_group,
    )


def episode_limits(config: Config, *, evaluation: bool) -> EpisodeLimits:
    """Budgets of an episode in training or in evaluation."""
    e = config.environment
    return EpisodeLimits(
        max_turns=(evaluation and config.evaluation.max_turns) or e.max_turns,
        max_new_tokens=e.max_new_tokens,
        max_context=e.max_context,
        timeout_s=e.episode_timeout_s,
        temperature=config.evaluation.temperature if evaluation else config.rollout.temperature,
        # "finish": a turn has one version, so it is one request
        piece_tokens=e.max_new_tokens if config.rollout.on_update == "finish" else PIECE_TOKENS,
    )


def draws_of_a_ticket(config: Config) -> int:
    """How many tasks a ticket may have: more than one where a group may be replaced."""
    return DRAWS if config.rollout.dynamic_sampling else 1


def draws(config: Config, env: Env, played: Mapping[int, Sequence[Played]]) -> Draws:
    """Who decides on training tasks. Raises `Refused` for options that no sampler takes."""
    e, r = config.environment, config.rollout
    return Draws(
        env,
        seed=e.seed,
        sampler=e.sampler,
        options=e.sampler_options,
        steps=config.run.steps,
        groups_per_step=r.groups_per_step,
        max_lag=r.max_lag,
        played=played,
        draws=draws_of_a_ticket(config),
    )


def concurrency_limits(env: Env) -> dict[str, int]:
    """Environment -> episodes of it that one worker plays at once, where there is a limit."""
    return {n: s.max_concurrency for n, s in mix.specs(env).items() if s.max_concurrency}


def spawn(
    cluster: Cluster,
    config: Config,
    model_path: str,
    recorder: Recorder,
    sampling: SamplingRecord | None = None,
    *,
    most_of: Mapping[str, int],
    records: Path | None = None,
) -> Actors:
    """Start trainer, rollout actors and environment workers side by side; none of them has answered
    yet. `most_of` is `concurrency_limits`. `sampling` takes down what they sample, for a replay; in
    the folder `records` workers keep what their episodes have so far, for whoever goes on with
    them."""
    restarts = RestartBudget(config.run.max_restarts)
    plan = placement.plan(config, cluster.resources)
    recorder.event("placement", channel=plan.channel, carrier=plan.carrier, why=str(plan))
    recorder.phase(str(plan))
    c = config.cluster
    watchdog = Watchdog(recorder.event, ping_every_s=c.ping_every_s, hang_s=c.hang_timeout_s)
    trainer = _spawn_trainer(cluster, config, model_path, plan, watchdog)
    spawn: dict[Role, Callable[[int], Actor]] = {
        "rollout": lambda n: watchdog.watch(_spawn_engine(cluster, config, model_path, plan, n)),
        "environments": lambda n: watchdog.watch(
            _spawn_worker(cluster, config, model_path, records, n)
        ),
    }
    engines = [spawn["rollout"](number) for number in range(config.rollout.engines)]
    workers = [spawn["environments"](number) for number in range(config.environment.workers)]
    training = Training(
        trainer,
        initial=model_path,
        start_s=c.start_timeout_s,
        step_s=c.step_timeout_s,
        restarts=restarts,
        event=watchdog.event,
    )
    pool = Pool(
        engines,
        workers,
        deadlines=Deadlines(
            start_s=c.start_timeout_s,
            publish_s=c.publish_timeout_s,
            ping_every_s=c.ping_every_s,
            hang_s=c.hang_timeout_s,
        ),
        faults=FaultLimits(
            retries=config.environment.retries, infra_fault_share=config.run.infra_fault_limit
        ),
        restarts=restarts,
        on_update=config.rollout.on_update,
        most_episodes=2 * config.rollout.concurrency if config.rollout.adaptive_concurrency else 0,
        event=watchdog.event,
        resend=training.resend,
        sampling=sampling,
    )
    watchdog.begin()
    return Actors(pool=pool, training=training, plan=plan, watchdog=watchdog, spawn=spawn)


def worker_memory_share(config: Config) -> float:
    """Half of a machine's memory for all environment workers, wherever they run; 0 where they are
    not processes of their own."""
    apart = config.cluster.address != "none"
    return _WORKERS_MEMORY / config.environment.workers if apart else 0.0


def _spawn_trainer(
    cluster: Cluster, config: Config, model_path: str, plan: placement.Plan, watchdog: Watchdog
) -> Actor:
    """The trainer, one process a rank."""
    settings, share = trainer_settings(config, model_path), placement.shares(config, plan)
    count = config.trainer.ranks
    spawned = [
        cluster.spawn(
            "trainer" if count == 1 else f"trainer rank {rank}",
            "loopwright.actors.trainer:Trainer",
            (
                settings,
                config.run.name,
                rank,
                channel_settings(config, plan, alone=cluster.alone, head=cluster.head),
            ),
            Placement(
                cpus=config.trainer.threads * share,
                gpus=_gpus(config) * share,
                threads=config.trainer.threads,
                shares_memory=True,
            ),
        )
        for rank in range(count)
    ]
    # in this process it cannot hang alone
    apart = config.cluster.address != "none"
    ranks = [watchdog.watch(actor, pinged=apart) for actor in spawned]
    if count == 1:
        return ranks[0]
    c = config.cluster
    return RankedTrainer(
        ranks, join_s=c.start_timeout_s, exchange_s=c.step_timeout_s, event=watchdog.event
    )


def _spawn_engine(
    cluster: Cluster, config: Config, model_path: str, plan: placement.Plan, number: int
) -> Actor:
    r, share = config.rollout, placement.shares(config, plan)
    on_cpu = r.engine == "vllm" and config.model.device == "cpu"
    return cluster.spawn(
        f"rollout {number}",
        "loopwright.actors.rollout:RolloutActor",
        (r.engine, engine_settings(config, model_path, adapter=plan.channel == "adapter")),
        Placement(
            cpus=r.threads * share,
            gpus=_gpus(config) * share,
            threads=r.threads,
            shares_memory=plan.carrier != "collective",
            environment=VLLM_CPU_ENVIRONMENT if on_cpu else {},
        ),
    )


def _spawn_worker(
    cluster: Cluster, config: Config, model_path: str, records: Path | None, number: int
) -> Actor:
    settings = WorkerSettings(
        environment=config.environment.name,
        options=environment_options(config),
        tokenizer_path=model_path,
        memory_share=worker_memory_share(config),
        records=str(records.resolve()) if records is not None else "",
    )
    return cluster.spawn(
        f"environment worker {number}",
        "loopwright.actors.env_worker:EnvWorker",
        (settings,),
        Placement(cpus=placement.worker_cpus(), plays=True),
    )


def engine_settings(config: Config, model_path: str, *, adapter: bool = False) -> EngineSettings:
    """An engine's plain values, from the tables [model] and [rollout]; `adapter`: it is sent
    adapters, not weights."""
    r = config.rollout
    return EngineSettings(
        model_path=model_path,
        dtype=config.model.dtype,
        device=config.model.device,
        max_concurrency=r.concurrency,
        max_context=config.environment.max_context,
        kv_bytes=r.kv_bytes,
        threads=r.threads,
        lora_rank=config.model.lora_rank if adapter else 0,
        options=r.options,
    )


def channel_settings(
    config: Config, plan: placement.Plan, *, alone: bool, head: str = ""
) -> ChannelSettings:
    """How weights travel, of [rollout] and [cluster]. `alone`: the cluster is this machine; `head`:
    the address of the cluster's head."""
    r, options = config.rollout, config.rollout.channel_options
    workers = r.options.get("tensor_parallel_size", 1) if r.engine == "vllm" else 1
    return ChannelSettings(
        channel=plan.channel,
        carrier=plan.carrier,
        dtype=config.model.dtype,
        device=config.model.device,
        host=placement.host_option(config, alone),
        head=head,
        bucket_bytes=channel_option(options, "bucket_bytes"),
        timeout_s=config.cluster.publish_timeout_s,
        full_every=channel_option(options, "full_every"),
        level=channel_option(options, "level"),
        receivers_per_engine=workers,
        in_place=plan.colocated and config.model.device == "cpu" and not config.model.lora_rank,
    )


def _gpus(config: Config) -> float:
    return 1.0 if config.model.device == "cuda" else 0.0


def drop_below(config: Config) -> float:
    """Rollouts with a smaller absolute advantage are dropped; none where each has a penalty of its
    own."""
    return config.algorithm.drop_below if config.algorithm.kl == "none" else 0.0


def trainer_settings(config: Config, model_path: str) -> Any:
    """The trainer's plain values, from the tables [model], [algorithm] and [trainer]."""
    from loopwright.actors.objective import LossSettings
    from loopwright.actors.trainer_backend import TrainerSettings

    a, t, m = config.algorithm, config.trainer, config.model
    loss: dict[str, Any] = {
        name: getattr(a, name)
        for name in (
            "loss",
            "level",
            "clip_form",
            "clip",
            "dual_clip",
            "mismatch",
            "mismatch_cap",
            "mismatch_low",
            "aggregation",
            "aipo_rho",
            "aipo_grad",
            "kl",
            "kl_coef",
            "kl_in",
        )
    }
    # Dr. GRPO's constant: the most that a rollout can be long
    loss["fixed_length_tokens"] = float(config.environment.max_context)
    return TrainerSettings(
        model_path=model_path,
        dtype=m.dtype,
        device=m.device,
        seed=config.run.seed,
        total_steps=config.run.steps,
        temperature=config.rollout.temperature,
        proximal=a.proximal,
        loss=LossSettings(**loss),
        critic=a.advantage == CRITIC,
        gamma=a.gamma,
        lam=a.lam,
        value_lr=a.value_lr,
        adapter=m.adapter,
        lora_rank=m.lora_rank,
        lora_alpha=m.lora_alpha,
        lora_targets=m.lora_targets,
        backend=t.backend,
        ranks=t.ranks,
        backend_options=t.backend_options,
        optimizer=t.optimizer,
        optimizer_options=t.optimizer_options,
        threads=t.threads,
        lr=t.lr,
        betas=t.betas,
        eps=t.eps,
        weight_decay=t.weight_decay,
        grad_clip=t.grad_clip,
        schedule=t.schedule,
        warmup_steps=t.warmup_steps,
        epochs=t.epochs,
        minibatches=t.minibatches,
        token_budget=t.token_budget,
        gradient_checkpointing=t.gradient_checkpointing,
        logprob_chunk=t.logprob_chunk,
    )


def check_trainer(config: Config) -> None:
    """Refuse an optimizer or backend that cannot be had as asked, before anything is started."""
    from loopwright.actors.optimizer_choice import optimizer_options
    from loopwright.actors.trainer_backend import BackendError
    from loopwright.algorithms.optimizers import OptimizerError

    settings = trainer_settings(config, config.model.path)
    try:
        optimizer_options(settings)
    except (OptimizerError, BackendError) as error:
        raise Refused(f"[trainer]: {error}") from error


def check_engine(config: Config) -> None:
    """Refuse options that an engine cannot take, before anything is started."""
    from loopwright.actors.engine import EngineError
    from loopwright.actors.vllm_setup import engine_arguments

    if config.rollout.engine != "vllm":
        return
    try:
        engine_arguments(engine_settings(config, config.model.path))
    except EngineError as error:
        raise Refused(f"rollout.options: {error}") from error


def check_model(path: str) -> None:
    """Refuse a model path that cannot be one, before anything is started."""
    if path == "tiny":
        return
    folder = Path(path)
    looks_local = folder.is_absolute() or path.startswith((".", "~")) or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        raise Refused(
            f"model.path = {path!r}: no config.json there; expected a Hugging Face model folder, "
            'a hub id such as "organisation/name", or "tiny"'
        )
