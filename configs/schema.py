"""What can be configured: every key, its type, unit, meaning, and its default in exactly this one
place.

The models are frozen and refuse unknown keys. What one key allows is said at the key; what keys
allow together is in `rules.py`. Sizes end in `_bytes`, durations in `_s`; 0 means "off" only where
the key says so.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loopwright.configs.rules import Contradictions, contradictions

TrackerName = Literal["console", "jsonl", "tensorboard", "wandb", "mlflow", "otel"]


class _Table(BaseModel):
    """Base of all tables: frozen, strict about types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunConfig(_Table):
    """[run] Length, rhythm and records of a run."""

    name: str = Field(
        min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder name below `dir`"
    )
    dir: str = Field("runs", min_length=1, description="where run directories are made")
    seed: int = Field(0, ge=0, description="seed of sampling, initial weights and batch order")
    steps: int = Field(40, ge=0, description="steps of training; each makes one policy version")
    max_seconds: float = Field(0, ge=0, description="stop cleanly after this long, s; 0 = no limit")
    eval_every: int = Field(
        10, ge=0, description="steps between evaluations; 0 = only before and after training"
    )
    checkpoint_every: int = Field(
        10, ge=0, description="steps between checkpoints; 0 = only the last"
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept on disk")
    trackers: tuple[TrackerName, ...] = Field(
        ("console", "jsonl"), strict=False, description="where metrics go"
    )
    max_restarts: int = Field(
        5, ge=0, description="restarts of all actors together before giving up"
    )
    infra_fault_limit: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of recent episodes lost to infra faults that ends the run",
    )


class ModelConfig(_Table):
    """[model] The policy."""

    path: str = Field(
        "tiny",
        min_length=1,
        description='Hugging Face folder or hub id; "tiny" builds one from [tiny]',
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of weights and activations"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="where engines and trainer compute")
    adapter: Literal["lora", "rslora", "dora", "loha", "lokr", "hra", "miss", "oft"] = Field(
        "lora", description="kind of adapters, where lora_rank > 0; merged in what is published"
    )
    lora_rank: int = Field(
        0, ge=0, description="rank of adapters (oft: size of a block); 0 = train all parameters"
    )
    lora_alpha: float = Field(
        32.0, gt=0, description="scale; the update is alpha / rank * B A (rslora: / sqrt(rank))"
    )
    lora_targets: str = Field(
        "all-linear",
        min_length=1,
        description='"all-linear" or a regular expression of module names',
    )


class TinyConfig(_Table):
    """[tiny] Shape of the policy built from nothing, where model.path = "tiny"."""

    hidden_size: int = Field(128, ge=8, description="width of the residual stream")
    layers: int = Field(4, ge=1, description="transformer blocks")
    heads: int = Field(4, ge=1, description="attention heads")
    kv_heads: int = Field(2, ge=1, description="key-value heads; divides `heads`")
    intermediate_size: int = Field(384, ge=8, description="width of the feed-forward layer")
    vocab_size: int = Field(
        1024, ge=300, description="tokens of the tokenizer trained on the environment's own text"
    )


class WarmStartConfig(_Table):
    """[warm_start] Cloning oracle demonstrations before RL begins."""

    demonstrations: int = Field(0, ge=0, description="oracle episodes to clone; 0 = no warm start")
    steps: int = Field(200, ge=1, description="optimizer steps of cloning, at most")
    batch: int = Field(32, ge=1, description="demonstrations per optimizer step")
    lr: float = Field(1e-3, gt=0, description="learning rate of cloning")
    until_match: float = Field(
        1.0,
        gt=0,
        le=1,
        description="stop cloning at this probability of writing an unseen demonstration word for "
        "word; 1 = only after `steps`",
    )
    key_token_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how far tokens that name a tool weigh more in cloning (TL-Training): 1 = as "
        "much as all others together, 9 times at most; 0 = no more",
    )


class EnvironmentConfig(_Table):
    """[environment] What is played, by how many, and within which budgets."""

    name: str = Field(min_length=1, description="a registered environment, or module:Class")
    options: dict[str, Any] = Field(
        default_factory=dict, description="passed to the environment's constructor"
    )
    workers: int = Field(1, ge=1, description="environment worker processes")
    max_turns: int = Field(
        0, ge=0, description="turns per episode; 0 = the environment's own budget"
    )
    max_new_tokens: int = Field(64, ge=1, description="generated tokens per turn")
    max_context: int = Field(1024, ge=16, description="tokens of one context, prompt and generated")
    episode_timeout_s: float = Field(
        120, gt=0, description="an episode that takes longer is an infra fault"
    )
    retries: int = Field(
        3, ge=0, description="times an episode is played again after an infra fault"
    )
    seed: int = Field(0, ge=0, description="seed of the stream of training tasks")
    mix: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description='members of name = "mix", by label: tables of environment, weight, options '
        "and max_turns",
    )
    sampler: Literal["uniform", "pass_rate", "failure_variants"] = Field(
        "uniform",
        description="training tasks: the stream's own, those that succeed sometimes, or variants "
        "of what fails",
    )
    sampler_options: dict[str, Any] = Field(
        default_factory=dict,
        description="of the sampler named above; and schedule.<value> = { start, end, steps, base "
        "} for values that change in training, such as search's noise",
    )


class RolloutConfig(_Table):
    """[rollout] Generation, and how far it may run ahead of training."""

    engine: Literal["torch", "vllm"] = Field("torch", description="what generates")
    engines: int = Field(1, ge=1, description="rollout actors, one engine each")
    group_size: int = Field(8, ge=1, description="K: rollouts of one task, compared to each other")
    groups_per_step: int = Field(16, ge=1, description="groups that make one training batch")
    max_lag: int = Field(
        1, ge=0, description="largest policy lag a rollout may have when used; 0 = synchronous"
    )
    window: int = Field(
        1,
        ge=1,
        description="W: a step takes whole groups from the W oldest; 1 = strictly the oldest. "
        "Fewer groups are then in the making, so that max_lag stays the bound",
    )
    cut: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of a step's rollouts after which it goes on; the rest is cancelled; "
        "1 = wait for all",
    )
    cut_group: float = Field(
        0.75,
        gt=0,
        le=1,
        description="share of each group's rollouts, at least 2, that a cut step must have",
    )
    dynamic_sampling: bool = Field(
        False,
        description="play another task in place of one whose rollouts all earned the same, twice "
        "at most",
    )
    adaptive_concurrency: bool = Field(
        False, description="start fewer episodes on an engine whose KV cache is full"
    )
    on_update: Literal["continue", "recompute", "finish"] = Field(
        "continue",
        description="running sequences at a publish: go on under the new weights with the keys and "
        "values they have, go on with these computed anew, or finish first",
    )
    channel: Literal[
        "auto", "shared_memory", "collective", "ipc", "adapter", "delta", "lowrank_delta"
    ] = Field(
        "auto",
        description="how weights get to the engines; auto: from placement and kind of training",
    )
    channel_options: dict[str, Any] = Field(
        default_factory=dict, description="of the channel named above: configs/channels.py"
    )
    temperature: float = Field(1.0, gt=0, description="sampling temperature in training")
    top_p: float = Field(1.0, description="must be 1; the key exists to say why")
    concurrency: int = Field(64, ge=1, description="sequences one engine decodes together")
    kv_bytes: int = Field(64 << 20, ge=1 << 20, description="KV cache of one engine, bytes")
    threads: int = Field(1, ge=1, description="CPU threads of one engine")
    options: dict[str, Any] = Field(
        default_factory=dict, description="passed to the engine named above, and to no other"
    )

    @field_validator("top_p")
    @classmethod
    def _unfiltered(cls, value: float) -> float:
        if value != 1.0:
            raise ValueError(
                "1.0: with filtered sampling the recorded logprobs differ from the policy's"
                " (top_p 0.9: a log importance weight of -10.5 per 100 tokens, policy unchanged)"
            )
        return value


class EvaluationConfig(_Table):
    """[evaluation] Success on held-out tasks."""

    tasks: int = Field(128, ge=1, description="held-out tasks played each time, always the same")
    temperature: float = Field(1.0, ge=0, description="sampling temperature; 0 = greedy")
    max_turns: int = Field(0, ge=0, description="turns per episode; 0 = as in training")
    seed: int = Field(0, ge=0, description="seed of the stream of held-out tasks")


class AlgorithmConfig(_Table):
    """[algorithm] From rewards to a gradient."""

    advantage: Literal[
        "leave_one_out", "group_mean", "group_normalized", "batch_normalized", "gae"
    ] = Field(
        "leave_one_out",
        description="baseline and scale of rewards within a group; gae: a value head's, over the "
        "units of `level`",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="discount per unit of `level` (gae)")
    lam: float = Field(
        1.0, ge=0, le=1, description="gae's λ: 1 = returns less the value, 0 = one unit ahead"
    )
    value_lr: float = Field(1e-3, gt=0, description="learning rate of the value head (gae)")
    loss: Literal["ppo", "decoupled", "aipo", "reinforce", "cispo", "gspo"] = Field(
        "ppo", description="policy loss"
    )
    level: Literal["token", "turn", "trajectory"] = Field(
        "token", description="unit of the probability ratio (ppo, decoupled)"
    )
    clip_form: Literal["code", "paper"] = Field(
        "code",
        description="ratio bounds: code [1/(1+clip), 1+clip], paper [1-clip, 1+clip]",
    )
    clip: float = Field(
        0.1,
        gt=0,
        description="how far the ratio may move before it is clipped (ppo, decoupled, cispo, gspo)",
    )
    dual_clip: float = Field(
        3.0, ge=0, description="bound c*A of the objective where A < 0 (ppo, decoupled); 0 = off"
    )
    mismatch: Literal[
        "none",
        "truncated_is",
        "masked_is",
        "sequence_is",
        "sequence_mask",
        "geometric_is",
        "geometric_mask",
    ] = Field(
        "truncated_is",
        description="weight exp(proximal - behavior), of a unit, or of a rollout as product "
        "(sequence) or geometric mean: none, capped (_is), or masked",
    )
    mismatch_cap: float = Field(
        2.0, gt=0, description="largest mismatch weight; where masked, the upper end"
    )
    mismatch_low: float = Field(
        0.5, ge=0, description="where masked: what has a weight below this is left out"
    )
    proximal: Literal["behavior", "recomputed", "loglinear"] = Field(
        "recomputed",
        description="proximal logprobs: the sampler's, the trainer's own pass, or between the "
        "sampler's and the current ones by lag, without a pass",
    )
    kl: Literal["none", "k1", "k2", "k3"] = Field(
        "none", description="estimator of the KL to the policy that training began with"
    )
    kl_coef: float = Field(0.01, gt=0, description="weight of the KL penalty")
    kl_in: Literal["loss", "reward"] = Field(
        "loss", description="where the KL penalty goes: into the loss, or each token's reward"
    )
    aggregation: Literal[
        "rollout_mean_over_constant", "token_mean", "sequence_mean", "fixed_length"
    ] = Field("rollout_mean_over_constant", description="how token losses become one number")
    aipo_rho: float = Field(4.0, ge=1, description="one-sided cap of the importance weight (aipo)")
    aipo_grad: Literal["stopgrad", "through"] = Field(
        "stopgrad",
        description="is the capped weight a constant (the paper), or differentiated (aipo)",
    )
    drop_below: float = Field(
        0.01,
        ge=0,
        description="rollouts with a smaller absolute advantage are not trained on; 0 = all are",
    )


class TrainerConfig(_Table):
    """[trainer] The optimizer step."""

    backend: Literal["torch", "fsdp2", "deepspeed"] = Field(
        "torch", description="one process, or ranks that share weights and optimizer states"
    )
    ranks: int = Field(
        1, ge=1, description="trainer processes, each with its share of weights and batch"
    )
    backend_options: dict[str, Any] = Field(
        default_factory=dict, description="passed to the backend named above, and to no other"
    )
    optimizer: str = Field(
        "adamw", min_length=1, description="a method of loopwright.algorithms.optimizers"
    )
    optimizer_options: dict[str, Any] = Field(
        default_factory=dict, description="passed to the optimizer named above, and to no other"
    )
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field(
        (0.9, 0.999), strict=False, description="decay of first and second moment (adamw)"
    )
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment (adamw)")
    weight_decay: float = Field(0.01, ge=0, description="decoupled; applied to matrices only")
    grad_clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 = no clipping")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up, towards 0 at the last step"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    epochs: int = Field(1, ge=1, description="passes over one step's batch")
    minibatches: int = Field(4, ge=1, description="optimizer steps per pass")
    token_budget: int = Field(4096, ge=16, description="tokens of one micro-batch")
    gradient_checkpointing: Literal["off", "on", "offload"] = Field(
        "off",
        description="keep a layer's input and recompute the rest; offload: keep it in host memory",
    )
    logprob_chunk: int = Field(
        2048, ge=1, description="tokens whose logits exist at the same time in the trainer"
    )
    threads: int = Field(1, ge=1, description="CPU threads of the trainer")

    @field_validator("betas")
    @classmethod
    def _decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("two numbers in [0, 1)")
        return value


class ClusterConfig(_Table):
    """[cluster] Ray, and every deadline of the run."""

    address: str = Field(
        "auto",
        min_length=1,
        description='"auto": the job\'s Ray or RAY_ADDRESS, else a new one in this process; '
        '"local": always a new one; "none": no Ray, one process; or an address',
    )
    placement: Literal["auto", "disaggregated", "colocated"] = Field(
        "auto",
        description="trainer and engines at the same time on devices of their own, or by turns on "
        "the same; auto: from what the cluster has",
    )
    cpus: int = Field(0, ge=0, description="CPUs of a Ray started here; 0 = all of the machine")
    object_store_bytes: int = Field(
        128 << 20, ge=80 << 20, description="object store of a Ray started here, bytes"
    )
    start_timeout_s: float = Field(180, gt=0, description="for Ray and for each actor to come up")
    step_timeout_s: float = Field(
        600, gt=0, description="for one batch, one update, one evaluation"
    )
    publish_timeout_s: float = Field(60, gt=0, description="for all engines to hold a new version")
    ping_every_s: float = Field(5, gt=0, description="pause between two signs of life of an actor")
    hang_timeout_s: float = Field(60, gt=0, description="silence after which an actor is restarted")


class Config(_Table):
    """One run, whole. Only the orchestrator sees all of it."""

    run: RunConfig
    model: ModelConfig = ModelConfig()
    tiny: TinyConfig = TinyConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    environment: EnvironmentConfig
    rollout: RolloutConfig = RolloutConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    trainer: TrainerConfig = TrainerConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = contradictions(self)
        if problems:
            raise Contradictions(problems)
        return self
