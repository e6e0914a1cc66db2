"""What keys allow together: contradictions are errors, doubtful combinations are warnings.

A rule is one line in one of three tables below; `contradictions` and `doubts` walk them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loopwright.configs.channels import carrier_of, option_problems

if TYPE_CHECKING:
    from loopwright.configs.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong with a configuration."""

    key: str  # dotted, "" if it is about the whole file
    value: Any = None
    expected: str
    nearest: str = ""  # the valid name it was probably meant to be
    where: str = ""  # "file:line" or "--set", if known


class Contradictions(ValueError):
    """Keys that cannot hold together; all of them, in `problems`."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(
            "; ".join(f"{p.key} = {p.value!r}: expected {p.expected}" for p in problems)
        )
        self.problems = problems


def value_at(config: Config, key: str) -> Any:
    """The value of the dotted `key`, such as `trainer.lr`."""
    table, name = key.split(".")
    return getattr(getattr(config, table), name)


def default_at(config: Config, key: str) -> Any:
    """The default of the dotted `key`, as the schema has it."""
    table, name = key.split(".")
    return type(getattr(config, table)).model_fields[name].get_default(call_default_factory=True)


def served_apart(c: Config) -> bool:
    """Whether the engines can add adapters of this kind to a base that they hold: vLLM refuses
    DoRA."""
    if c.model.adapter == "dora":
        return c.rollout.engine == "torch"
    return c.model.adapter in ("lora", "rslora")


def _masks(c: Config) -> bool:
    """Whether the mismatch weight leaves out what lies outside two bounds."""
    return c.algorithm.mismatch in ("masked_is", "sequence_mask", "geometric_mask")


def _scheduling(c: Config) -> Iterator[tuple[bool, str, str]]:
    """What bounds each other in how far generation runs ahead, and whom a step waits for."""
    r = c.rollout
    largest = max(1, r.max_lag * r.groups_per_step)
    yield (
        r.window <= largest,
        "rollout.window",
        f"at most {largest} = rollout.max_lag * rollout.groups_per_step (1 where that is 0): with "
        "a larger one too few groups are in the making to pass a straggler by",
    )
    yield (
        r.window == 1 or r.cut == 1,
        "rollout.window",
        f"1 with rollout.cut = {r.cut}: both are reliefs for stragglers, choose one",
    )
    yield (
        not r.dynamic_sampling or r.group_size > 1,
        "rollout.dynamic_sampling",
        "false with rollout.group_size = 1: one reward never differs",
    )
    least = max(2, round(r.cut_group * r.group_size))
    yield (
        r.cut == 1 or least < r.group_size,
        "rollout.cut_group",
        f"a share below 1 that leaves out somebody of rollout.group_size = {r.group_size}: with "
        f"{least} needed of each group there is nobody to cancel (at least 2 are always needed)",
    )


def _limits(c: Config) -> Iterator[tuple[bool, str, str]]:
    """(holds, key, what is expected) for each pair of keys that bound each other."""
    rollouts = c.rollout.group_size * c.rollout.groups_per_step
    yield from _scheduling(c)
    yield (
        c.rollout.group_size >= 2 or c.algorithm.advantage == "gae",
        "rollout.group_size",
        f"2 or more: algorithm.advantage = {c.algorithm.advantage!r} compares rollouts of one task",
    )
    yield (
        bool(c.environment.mix) == (c.environment.name == "mix"),
        "environment.mix",
        'two or more members where environment.name = "mix", and nothing elsewhere',
    )
    yield (
        not (c.environment.mix and c.environment.options),
        "environment.options",
        "nothing with a mix: options belong to its members, environment.mix.<label>.options",
    )
    yield (
        c.trainer.minibatches <= rollouts,
        "trainer.minibatches",
        f"at most the {rollouts} rollouts of a step (rollout.group_size * rollout.groups_per_step)",
    )
    yield (
        c.environment.max_new_tokens < c.environment.max_context,
        "environment.max_new_tokens",
        f"less than environment.max_context = {c.environment.max_context}: the prompt needs room",
    )
    yield (
        c.trainer.token_budget >= c.environment.max_context,
        "trainer.token_budget",
        f"at least environment.max_context = {c.environment.max_context}, the longest rollout",
    )
    yield (
        c.tiny.hidden_size % c.tiny.heads == 0,
        "tiny.hidden_size",
        f"a multiple of tiny.heads = {c.tiny.heads}",
    )
    yield (
        c.tiny.heads % c.tiny.kv_heads == 0,
        "tiny.kv_heads",
        f"a divisor of tiny.heads = {c.tiny.heads}",
    )
    yield (
        c.cluster.hang_timeout_s > c.cluster.ping_every_s,
        "cluster.hang_timeout_s",
        f"more than cluster.ping_every_s = {c.cluster.ping_every_s}",
    )
    yield (
        c.cluster.step_timeout_s > c.environment.episode_timeout_s,
        "cluster.step_timeout_s",
        f"more than environment.episode_timeout_s = {c.environment.episode_timeout_s}, as a step "
        "waits for its slowest episode",
    )
    yield (
        c.algorithm.mismatch == "none"
        or c.algorithm.loss == "aipo"
        or c.algorithm.proximal != "behavior",
        "algorithm.proximal",
        f"'recomputed' or 'loglinear': algorithm.mismatch = {c.algorithm.mismatch!r} weighs "
        'proximal against behavior logprobs, and with "behavior" the two are equal',
    )
    yield (
        not _masks(c) or c.algorithm.mismatch_low < c.algorithm.mismatch_cap,
        "algorithm.mismatch_low",
        f"less than algorithm.mismatch_cap = {c.algorithm.mismatch_cap}",
    )
    yield from _channel_limits(c)
    yield from _rank_limits(c)
    yield (
        c.algorithm.dual_clip == 0 or c.algorithm.dual_clip > 1,
        "algorithm.dual_clip",
        "0 (off) or more than 1",
    )
    yield (
        len(set(c.run.trackers)) == len(c.run.trackers),
        "run.trackers",
        "each name once",
    )


def _device_limits(c: Config) -> Iterator[tuple[bool, str, str]]:
    """As `_limits`, of what a device bounds."""
    yield (
        c.trainer.gradient_checkpointing != "offload" or c.model.device != "cpu",
        "trainer.gradient_checkpointing",
        '"on" or "off": with model.device = "cpu" activations are in host memory already',
    )


def _rank_limits(c: Config) -> Iterator[tuple[bool, str, str]]:
    """What several trainer processes ask for, and what backends and engines have no options."""
    ranks = c.trainer.ranks
    yield (
        ranks == 1 or c.trainer.backend != "torch",
        "trainer.backend",
        f"'fsdp2' or 'deepspeed': trainer.ranks = {ranks}, and 'torch' is one process",
    )
    yield (
        ranks == 1 or c.cluster.address != "none",
        "cluster.address",
        f"'auto' or 'local': trainer.ranks = {ranks} are processes, which Ray starts",
    )
    yield (
        ranks == 1 or c.cluster.placement != "colocated",
        "cluster.placement",
        f"'auto' or 'disaggregated': every one of trainer.ranks = {ranks} has a device of its own",
    )
    yield (
        not c.trainer.backend_options or c.trainer.backend != "torch",
        "trainer.backend_options",
        "none: trainer.backend = 'torch' has no options",
    )
    yield (
        not c.rollout.options or c.rollout.engine != "torch",
        "rollout.options",
        "none: rollout.engine = 'torch' has no options",
    )


def _channel_limits(c: Config) -> Iterator[tuple[bool, str, str]]:
    """What placement and channel ask of each other."""
    r, placement = c.rollout, c.cluster.placement
    colocated = placement == "colocated"
    yield (
        not colocated or r.max_lag == 0,
        "cluster.placement",
        f"'disaggregated', or rollout.max_lag = 0: with rollout.max_lag = {r.max_lag} engines "
        "generate while the trainer trains, and colocated they take turns",
    )
    yield (
        not colocated or carrier_of(r.channel, r.channel_options) != "collective",
        "rollout.channel",
        "'auto' or 'shared_memory': colocated trainer and engines share a device, and a network "
        "between them would copy what they can share",
    )
    yield (
        r.channel != "ipc" or c.model.device == "cuda",
        "rollout.channel",
        f"'auto': 'ipc' shares memory of a GPU, and model.device = {c.model.device!r}",
    )
    yield (
        r.channel != "ipc" or placement != "disaggregated",
        "rollout.channel",
        "'auto': 'ipc' shares memory of one GPU, and with cluster.placement = 'disaggregated' "
        "trainer and engines have devices of their own",
    )
    yield (
        r.channel != "adapter" or c.model.lora_rank > 0,
        "rollout.channel",
        "'auto', or model.lora_rank > 0: 'adapter' sends LoRA's A and B, and there are none",
    )
    yield (
        r.channel != "adapter" or served_apart(c),
        "rollout.channel",
        "'auto', which publishes merged weights: vLLM serves no DoRA (rollout.engine = 'torch' "
        "does)"
        if c.model.adapter == "dora"
        else f"'auto': 'adapter' sends LoRA's A and B, and model.adapter = {c.model.adapter!r} has "
        "other tensors; merged weights are published instead",
    )
    yield (
        r.channel != "adapter" or r.engine != "vllm" or c.warm_start.demonstrations == 0,
        "rollout.channel",
        "'auto' or 'shared_memory': vLLM keeps the base weights it was started with, and with "
        "warm_start.demonstrations > 0 adapters belong to the cloned ones",
    )
    yield (
        r.channel not in ("delta", "lowrank_delta") or c.model.lora_rank == 0,
        "rollout.channel",
        f"'adapter' or 'auto': {r.channel!r} sends what changed in every weight, and with "
        "model.lora_rank > 0 the merged weights change everywhere",
    )


def _unused(c: Config) -> Iterator[tuple[bool, str, tuple[str, ...]]]:
    """(is in use, the setting that decides it, the keys that then have no effect) within one
    topic."""
    loss = f"algorithm.loss = {c.algorithm.loss!r}"
    leveled = c.algorithm.loss in ("ppo", "decoupled")
    clips = leveled or c.algorithm.loss in ("cispo", "gspo")
    yield clips, loss, ("algorithm.clip_form", "algorithm.clip")
    yield leveled, loss, ("algorithm.level", "algorithm.dual_clip")
    yield c.algorithm.loss == "aipo", loss, ("algorithm.aipo_rho", "algorithm.aipo_grad")
    mismatch = f"algorithm.mismatch = {c.algorithm.mismatch!r}"
    weighs = c.algorithm.loss != "aipo"  # aipo weighs by the behavior logprobs itself
    off = c.algorithm.mismatch == "none"
    yield weighs or off, loss, ("algorithm.mismatch",)
    yield weighs and not off, f"{mismatch} and {loss}", ("algorithm.mismatch_cap",)
    yield _masks(c), mismatch, ("algorithm.mismatch_low",)
    critic = c.algorithm.advantage == "gae"
    advantage = f"algorithm.advantage = {c.algorithm.advantage!r}"
    yield critic, advantage, ("algorithm.gamma", "algorithm.lam", "algorithm.value_lr")
    yield not critic, f"{advantage}, which finds advantages later", ("algorithm.drop_below",)
    penalty = c.algorithm.kl != "none"
    kl = f"algorithm.kl = {c.algorithm.kl!r}"
    yield penalty, kl, ("algorithm.kl_coef", "algorithm.kl_in")
    yield not penalty or critic, f"{kl}, for which all rollouts stay", ("algorithm.drop_below",)
    optimizer = f"trainer.optimizer = {c.trainer.optimizer!r} (put it into optimizer_options)"
    yield c.trainer.optimizer == "adamw", optimizer, ("trainer.betas", "trainer.eps")
    yield c.rollout.cut < 1, "rollout.cut = 1 (no cut)", ("rollout.cut_group",)
    lora = ("model.adapter", "model.lora_alpha", "model.lora_targets")
    yield c.model.lora_rank > 0, "model.lora_rank = 0", lora
    scaled = c.model.adapter not in ("hra", "miss", "oft")
    yield scaled, f"model.adapter = {c.model.adapter!r}", ("model.lora_alpha",)


def _doubts(c: Config) -> Iterator[tuple[bool, str]]:
    """(is fine, what to think about) for combinations that are legal and rarely meant."""
    yield (
        c.rollout.max_lag == 0
        or c.algorithm.mismatch != "none"
        or c.algorithm.loss in ("aipo", "decoupled"),
        f"algorithm.mismatch = 'none' with rollout.max_lag = {c.rollout.max_lag}: nothing corrects "
        'for stale rollouts; set "truncated_is"',
    )
    yield (
        c.algorithm.kl != "k1" or c.algorithm.kl_in == "reward",
        "algorithm.kl = 'k1' in the loss: its gradient is 0 on average, so it penalises nothing; "
        'use "k2" or "k3", or kl_in = "reward"',
    )
    yield (
        c.algorithm.proximal != "loglinear" or c.rollout.max_lag > 0,
        "algorithm.proximal = 'loglinear' with rollout.max_lag = 0: without lag it is the same as "
        '"behavior"',
    )
    yield (
        c.model.device != "cpu" or c.model.dtype == "float32",
        "model.dtype = 'bfloat16' on a CPU: slow, and logprobs of engine and trainer differ by "
        '0.15 on average; set "float32"',
    )
    yield (
        c.model.path == "tiny" or c.tiny == type(c.tiny)(),
        f"[tiny] has no effect with model.path = {c.model.path!r}",
    )
    yield (
        c.warm_start.demonstrations > 0 or c.warm_start == type(c.warm_start)(),
        "[warm_start] has no effect with demonstrations = 0",
    )


def contradictions(config: Config) -> list[Problem]:
    """Everything about `config` that cannot hold together, or was set and is not used."""
    problems = [
        Problem(key=key, value=value_at(config, key), expected=expected)
        for holds, key, expected in (*_limits(config), *_device_limits(config))
        if not holds
    ]
    for in_use, because, keys in _unused(config):
        for key in () if in_use else keys:
            if value_at(config, key) != default_at(config, key):
                expected = f"no such setting: it has no effect with {because}"
                problems.append(Problem(key=key, value=value_at(config, key), expected=expected))
    r = config.rollout
    problems += [
        Problem(
            key=f"rollout.channel_options.{name}", value=value, expected=expected, nearest=nearest
        )
        for name, value, expected, nearest in option_problems(r.channel, r.channel_options)
    ]
    return problems


def doubts(config: Config) -> list[str]:
    """Warnings: what is legal and rarely meant, one sentence each."""
    return [sentence for fine, sentence in _doubts(config) if not fine]
