"""Who computes where, and how weights get from one to the other: decided from the configuration and
from what the cluster has, with the reason in words.
"""

from dataclasses import dataclass
from typing import Any

from loopwright.actors.channels.settings import Carrier, ChannelName
from loopwright.configs.channels import carrier_of, channel_option
from loopwright.configs.rules import served_apart
from loopwright.configs.schema import Config
from loopwright.orchestrator.resources import Needs, Resources

_WORKER_CPUS = 0.5  # an environment worker mostly waits for engines


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where trainer and engines compute, and the channel between them."""

    colocated: bool  # by turns on one device; else at the same time
    why_placed: str
    channel: ChannelName
    carrier: Carrier
    why: str  # this channel

    def __str__(self) -> str:
        place = "colocated, by turns" if self.colocated else "disaggregated"
        by = "" if self.carrier == self.channel else f" over {self.carrier}"
        return f"{place} ({self.why_placed}); weights by {self.channel}{by} ({self.why})"


def plan(config: Config, has: Resources) -> Plan:
    """What the configuration says, and where it says "auto" what suits the cluster."""
    colocated, why_placed = _placement(config, has)
    chosen = config.rollout.channel
    if chosen != "auto":
        channel, why = chosen, "as configured"
    else:
        channel, why = _channel(config, has, colocated)
    carrier: Any = carrier_of(channel, config.rollout.channel_options)
    if channel == "adapter" and chosen == "auto" and not _one_node(config, has, colocated):
        carrier = "collective"
    return Plan(
        colocated=colocated, why_placed=why_placed, channel=channel, carrier=carrier, why=why
    )


def needs(config: Config, has: Resources) -> Needs:
    """What all actors of a run ask for."""
    chosen, r = plan(config, has), config.rollout
    gpus = 1.0 if config.model.device == "cuda" else 0.0
    ranks = config.trainer.ranks
    engine = (float(r.threads), gpus)
    trainer = (float(config.trainer.threads * ranks), gpus * ranks)
    workers = (_WORKER_CPUS,) * config.environment.workers
    if chosen.colocated:
        cpus = max(trainer[0], engine[0] * r.engines)
        return Needs(one_node_cpus=cpus, one_node_gpus=gpus, elsewhere_cpus=workers)
    if chosen.carrier == "collective":
        return Needs(
            one_node_cpus=trainer[0],
            one_node_gpus=trainer[1],
            engines=(engine,) * r.engines,
            elsewhere_cpus=workers,
        )
    return Needs(
        one_node_cpus=trainer[0] + engine[0] * r.engines,
        one_node_gpus=gpus * (ranks + r.engines),
        elsewhere_cpus=workers,
    )


def fixed_sizes(config: Config, chosen: Plan) -> dict[Any, str]:
    """The roles that cannot be scaled while the run goes on, and why."""
    if chosen.colocated and config.model.device == "cuda":
        return {
            "rollout": "rollout: engines take turns with the trainer on one GPU, which is shared "
            "out at the start: stop the run, and go on with --resume --set rollout.engines=N"
        }
    return {}


def worker_cpus() -> float:
    """Of one environment worker."""
    return _WORKER_CPUS


def shares(config: Config, chosen: Plan) -> float:
    """The part of its CPUs and GPU that one actor on the device is booked with: all, or where they
    take turns such a part that together they book the device once."""
    if not chosen.colocated:
        return 1.0
    r, trainer = config.rollout, float(config.trainer.threads)
    return max(trainer, float(r.threads * r.engines)) / (trainer + r.threads * r.engines)


def _placement(config: Config, has: Resources) -> tuple[bool, str]:
    asked, r = config.cluster.placement, config.rollout
    if asked != "auto":
        return asked == "colocated", "as configured"
    ranks = config.trainer.ranks
    if ranks > 1:
        return False, f"trainer.ranks = {ranks}: every rank has a device of its own"
    if r.max_lag > 0:
        return False, f"rollout.max_lag = {r.max_lag} overlaps generation and training"
    if config.model.device == "cuda":
        wanted = 1 + r.engines
        if has.gpus < wanted:
            return True, f"{has.gpus:g} GPUs for a trainer and {r.engines} engines"
        return False, f"{has.gpus:g} GPUs, {wanted} needed"
    wanted = config.trainer.threads + r.engines * r.threads
    if has.cpus < wanted:
        return True, f"{has.cpus:g} CPUs, {wanted} needed at the same time"
    return False, f"{has.cpus:g} CPUs, {wanted} needed"


def _channel(config: Config, has: Resources, colocated: bool) -> tuple[ChannelName, str]:
    lora, device = config.model.lora_rank, config.model.device
    vllm = config.rollout.engine == "vllm"
    slow_lora = vllm and device == "cpu"
    another_base = vllm and config.warm_start.demonstrations > 0  # it keeps the one it started with
    apart = lora > 0 and served_apart(config)
    if apart and not slow_lora and not another_base:
        return "adapter", f"model.lora_rank = {lora}: the base weights travel once"
    if colocated and device == "cuda":
        return "ipc", "trainer and engines share a GPU"
    if colocated:
        return "shared_memory", "trainer and engines share one copy of the weights"
    if not _one_node(config, has, colocated):
        return "collective", "no node has room for the trainer and all engines"
    if apart and slow_lora:
        return "shared_memory", "merged weights: vLLM on a CPU serves LoRA at about half the speed"
    if lora and not apart:
        kind = f"model.adapter = {config.model.adapter!r}"
        return "shared_memory", f"merged weights: {config.rollout.engine} serves no {kind} apart"
    return "shared_memory", "trainer and engines are on one host"


def _one_node(config: Config, has: Resources, colocated: bool) -> bool:
    """Whether trainer and engines fit a single node."""
    r = config.rollout
    if colocated:
        return True
    ranks = config.trainer.ranks
    cpus = config.trainer.threads * ranks + r.engines * r.threads
    gpus = ranks + r.engines if config.model.device == "cuda" else 0
    return len(has.nodes) < 2 or any(c >= cpus and g >= gpus for c, g in has.nodes)


def host_option(config: Config, alone: bool) -> str:
    """Where a collective channel meets: as configured; on this machine where the cluster is this
    machine alone; else empty, for the trainer's process to find out."""
    given: str = channel_option(config.rollout.channel_options, "host")
    return given or ("127.0.0.1" if alone else "")
