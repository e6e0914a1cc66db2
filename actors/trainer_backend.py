"""What a trainer backend is: model and optimizer of one rank, and the verbs of an optimizer step.

    policy_step.take_step(backend, batch)      the same code for every backend
        micro-batch:   backend.forward → loss → backend.backward
        minibatch:     backend.update, or backend.drop_gradient
    backend.published_buckets()                what engines serve from, a bounded part at a time
    backend.gather(names), backend.scatter     parameters whole and back, whichever way they lie

On several ranks every process holds such a backend and every verb is called on all of them in the
same order; all but `drop_gradient` may be collective.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from loopwright.actors.critic import Critic
from loopwright.actors.objective import LossSettings
from loopwright.actors.packed_forward import MicroBatch, Sequences
from loopwright.actors.ranks import Ranks
from loopwright.actors.recompute import Checkpointing
from loopwright.algorithms.records import TrainBatch

Read = Callable[[str, slice | None], Tensor]  # a whole tensor by name, or some rows of it
BUCKET_BYTES = 256 << 20  # full tensors that exist at the same time while publishing and saving


class BackendError(Exception):
    """A trainer that cannot be built or cannot go on; the text says what, which value and the
    remedy.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """How to build and run a trainer: plain values, the meanings as in the configuration of the
    same names.
    """

    model_path: str  # Hugging Face folder or hub id
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    threads: int = 1
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01  # of matrices only
    grad_clip: float = 1.0  # 0: no clipping
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    total_steps: int = 0  # where linear and cosine reach 0
    epochs: int = 1
    minibatches: int = 4
    token_budget: int = 4096
    pack: bool = (
        False  # several sequences a row: for devices on which padding costs more than masks
    )
    gradient_checkpointing: Checkpointing = "off"
    logprob_chunk: int = 2048
    temperature: float = 1.0
    proximal: Literal["behavior", "recomputed", "loglinear"] = "recomputed"
    loss: LossSettings = field(default_factory=LossSettings)
    critic: bool = False  # a value head finds the advantages
    gamma: float = 1.0
    lam: float = 1.0
    value_lr: float = 1e-3
    backend: str = "torch"
    ranks: int = 1
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    adapter: str = "lora"  # which kind, where lora_rank is not 0
    lora_rank: int = 0  # 0: train all parameters
    lora_alpha: float = 32.0
    lora_targets: str = "all-linear"

    def __post_init__(self) -> None:
        known = {
            "proximal": ("behavior", "recomputed", "loglinear"),
            "schedule": ("constant", "linear", "cosine"),
            "gradient_checkpointing": get_args(Checkpointing),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise BackendError(
                    f"{name}={getattr(self, name)!r}, expected one of {', '.join(values)}"
                )


def learning_rate(settings: TrainerSettings, step: int) -> float:
    """The rate of step 1, 2, …: linear warm-up, then the schedule, 0 after `total_steps`."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    span = max(settings.total_steps - settings.warmup_steps, 1)
    progress = min((step - settings.warmup_steps - 1) / span, 1.0)
    factor = (
        1.0 - progress
        if settings.schedule == "linear"
        else 0.5 * (1.0 + math.cos(math.pi * progress))
    )
    return settings.lr * factor


class TrainerBackend(Protocol):
    """One rank's share of model and optimizer. `update` is the only verb that changes weights."""

    settings: TrainerSettings
    ranks: Ranks
    step: int  # the last step taken
    non_finite: int  # minibatches of the run that were skipped
    model: PreTrainedModel  # as transformers knows it; its parameters may be sharded
    forward_only: bool  # does the optimizer want losses and no gradient (`descend`)?
    critic: Critic | None  # where `settings.critic` asks for one; the same on every rank

    def train(self, batch: TrainBatch) -> dict[str, float]:
        """One step on the whole `batch`, of which this rank computes its share; the metrics."""
        ...

    def logprobs(
        self,
        sequences: Sequences,
        chosen: np.ndarray | None = None,
        *,
        temperature: float | None = None,
    ) -> np.ndarray:
        """Logprobs of the action tokens of all (or the `chosen`) sequences: [N] float32, 0
        elsewhere; at the training temperature unless another is given. The same on every rank.
        """
        ...

    def forward(self, micro: MicroBatch, *, temperature: float) -> Tensor:
        """Logprobs of the micro-batch's targets: [M] float32, differentiable unless under
        `torch.no_grad`. On several ranks all must call it equally often."""
        ...

    def states(self, micro: MicroBatch) -> Tensor:
        """The last hidden states that predict the micro-batch's targets: [M, H], without gradient.
        As collective as `forward`."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it, `forward` is that of the frozen policy that training began with. Only where
        `settings.loss.kl` asks for one."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, summed over the ranks, to the gradient of the minibatch."""
        ...

    def update(self, rate: float, limit: float) -> float:
        """Scale the gradient of the minibatch, over all ranks, down to the norm `limit` (inf: leave
        it) and take one optimizer step at the learning rate `rate`. Returns the norm before; if
        that is not finite, nothing was changed."""
        ...

    def descend(self, rate: float, loss: Callable[[], float]) -> float:
        """One step of a `forward_only` optimizer, which calls `loss` at weights of its choice, on
        all ranks alike. Returns the size of the slope it found; if that is not finite, nothing was
        changed."""
        ...

    def drop_gradient(self) -> None:
        """Forget the gradient of the minibatch."""
        ...

    def gather(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The parameters of the model with these names, whole, on every rank. They may be the
        parameters themselves: to be read, not kept."""
        ...

    def scatter(self, names: Sequence[str], read: Read) -> None:
        """Overwrite the parameters with these names by what `read` returns, each rank its share."""
        ...

    def published_shapes(self) -> dict[str, Tensor]:
        """All names that `published_buckets` yields, with tensors on the meta device: shapes and
        dtypes without values. Tied tensors are the same object."""
        ...

    def published_buckets(self, size_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
        """Every weight under its Hugging Face name, whole, adapters merged, in dictionaries of at
        most `size_bytes` (or of one tensor that is larger). Tied tensors are the same object, in
        the same bucket. Every rank must go through to the end; a bucket is valid until the next.
        """
        ...

    def held(self) -> dict[str, list[Tensor]]:
        """What this rank holds between two steps, as `dry_run.held_tensors` sorts it."""
        ...

    def optimizer_buckets(self, size_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
        """The tensors of the optimizer's state as `parameter/key`, whole, as `published_buckets`:
        every rank must go through to the end."""
        ...

    def optimizer_numbers(self) -> dict[str, Any]:
        """The rest of the optimizer's state, for a JSON file; after the buckets."""
        ...

    def restore_optimizer(self, read: Read, saved: Collection[str], numbers: Any) -> None:
        """Take back what the two above gave, on any number of ranks: the `saved` names of tensors
        through `read`. Raises `BackendError` or `OptimizerError` with the reason where it does not
        fit."""
        ...


def published_tensors(backend: TrainerBackend) -> dict[str, Tensor]:
    """All published weights at once: for models that one process can hold."""
    return {name: t for bucket in backend.published_buckets() for name, t in bucket.items()}
