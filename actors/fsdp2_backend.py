"""The FSDP2 backend: parameters, gradients and optimizer states in row shards on every rank.

Each transformer block is gathered before its forward and its backward pass and freed after it;
embedding, norm and output layer are gathered once a micro-batch (torch's `fully_shard`). Parameters
are DTensors [rows / ranks, …], so an optimizer sees matrices, not flat pieces. Gradients are summed
over the ranks, not averaged: the weights of the loss already divide by the whole minibatch.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from loopwright.actors import optimizer_state, published
from loopwright.actors.critic import build_critic
from loopwright.actors.dry_run import held_tensors
from loopwright.actors.optimizer_choice import (
    build_optimizer,
    calibrate,
    descend,
    is_forward_only,
    update,
)
from loopwright.actors.packed_forward import MicroBatch, Sequences
from loopwright.actors.policy_model import (
    ActionLogprobs,
    blocks,
    load_policy,
    load_reference,
    without_adapters,
)
from loopwright.actors.policy_step import sequence_logprobs, take_step
from loopwright.actors.ranks import Ranks, alone
from loopwright.actors.trainer_backend import BUCKET_BYTES, BackendError, Read, TrainerSettings
from loopwright.algorithms.records import TrainBatch


class FSDP2Backend:
    """`TrainerBackend` for the ranks of one process group, which exists before."""

    def __init__(self, settings: TrainerSettings, ranks: Ranks | None = None) -> None:
        """Load the model on every rank and keep this rank's rows of it."""
        offload = _offload(settings)
        self.settings = settings
        self.ranks = ranks or alone(settings.device)
        self.step = 0
        self.non_finite = 0
        policy = load_policy(settings, device="cpu")
        self.model = policy.model
        self._published = policy.published
        self._logprobs = self._sharded(self.model, offload)
        reference = load_reference(settings, device="cpu")
        self._reference = None if reference is None else self._sharded(reference, offload)
        self._current = self._logprobs  # what `forward` computes with
        self.forward_only = is_forward_only(settings)
        self.critic = build_critic(settings, self.model.config.hidden_size)
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(settings, self.model)

    def _sharded(self, model: PreTrainedModel, offload: bool) -> ActionLogprobs:
        whole = ActionLogprobs(model, chunk=self.settings.logprob_chunk)
        mesh = init_device_mesh(self.settings.device, (self.ranks.size,))
        policy = CPUOffloadPolicy() if offload else OffloadPolicy()
        precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for part in (*blocks(model), whole):
            sharded = fully_shard(part, mesh=mesh, offload_policy=policy, mp_policy=precision)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
        return whole

    def train(self, batch: TrainBatch) -> dict[str, float]:
        calibrate(self.optimizer, self, batch)
        return take_step(self, batch)

    def logprobs(
        self,
        sequences: Sequences,
        chosen: np.ndarray | None = None,
        *,
        temperature: float | None = None,
    ) -> np.ndarray:
        return sequence_logprobs(self, sequences, chosen, temperature=temperature)

    def forward(self, micro: MicroBatch, *, temperature: float) -> Tensor:
        logprobs = self._current(micro, temperature)
        if not torch.is_grad_enabled():
            _cut_again(self._current)
        return logprobs

    def states(self, micro: MicroBatch) -> Tensor:
        with torch.no_grad():
            found = self._logprobs(micro, 1.0, states=True)
        _cut_again(self._logprobs)
        return found

    @contextmanager
    def reference(self) -> Iterator[None]:
        with without_adapters(self.model) if self._reference is None else nullcontext():
            self._current = self._reference or self._logprobs
            try:
                yield
            finally:
                self._current = self._logprobs

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, rate: float, limit: float) -> float:
        return update(self.optimizer, rate, limit)

    def descend(self, rate: float, loss: Callable[[], float]) -> float:
        return descend(self.optimizer, rate, loss)

    def drop_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self._trained:  # also of those that the optimizer leaves as they are
            parameter.grad = None

    def gather(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: _whole(self._parameters[name].detach()) for name in names}

    def scatter(self, names: Sequence[str], read: Read) -> None:
        for name in names:
            parameter = self._parameters[name].detach()
            _local(parameter).copy_(_local(_sharded_like(parameter, name, read)))

    def published_shapes(self) -> dict[str, Tensor]:
        return published.shapes(self._published)

    def published_buckets(self, size_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
        return published.buckets(self._published, self.gather, size_bytes)

    def held(self) -> dict[str, list[Tensor]]:
        critics = [] if self.critic is None else [self.critic]
        return held_tensors(
            (self.model, self._reference, *(c.head for c in critics)),
            (self.optimizer, *(c.optimizer for c in critics)),
        )

    def optimizer_buckets(self, size_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
        found = optimizer_state.leaves(self.optimizer, self._parameters)
        return optimizer_state.tensor_buckets(found, _whole, size_bytes)

    def optimizer_numbers(self) -> dict[str, Any]:
        return optimizer_state.numbers(self.optimizer, self._parameters)

    def restore_optimizer(self, read: Read, saved: Collection[str], numbers: Any) -> None:
        now = optimizer_state.leaves(self.optimizer, self._parameters)
        tensors = {}
        for path in saved:
            mine = now.get(path)
            if mine is None:  # a state that is made at the first update: cut if it is as large
                whole = read(path, None)
                parameter = self._parameters[path.rpartition("/")[0]]
                mine = parameter.detach() if whole.shape == parameter.shape else whole
            tensors[path] = _sharded_like(mine, path, read)
        optimizer_state.load(self.optimizer, self._parameters, tensors, numbers)


def _offload(settings: TrainerSettings) -> bool:
    options = dict(settings.backend_options)
    offload = options.pop("offload", False)
    if options or not isinstance(offload, bool):
        raise BackendError(
            f"trainer.backend_options = {dict(settings.backend_options)}: FSDP2 has offload = true "
            "or false (parameters, gradients and optimizer states in host memory)"
        )
    return offload


def _cut_again(module: Any) -> None:
    """Forget the gathered embedding, norm and output layer, which else wait for a backward pass:
    they would be stale once the rows are changed by anything but that pass's optimizer step."""
    module.reshard()


def _whole(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    here: Any = tensor.to(tensor.device_mesh.device_type)  # offloaded ones come back first
    whole: Tensor = here.full_tensor()
    return whole


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharded_like(like: Any, name: str, read: Read) -> Tensor:
    """A saved tensor, of which this rank reads the rows that it holds of `like`."""
    if not isinstance(like, DTensor):
        return read(name, None)
    size, rank = like.device_mesh.size(), like.device_mesh.get_local_rank()
    chunk = -(-like.shape[0] // size)  # as torch cuts: equal parts, the last ones shorter or empty
    rows = slice(min(rank * chunk, like.shape[0]), min((rank + 1) * chunk, like.shape[0]))
    return DTensor.from_local(
        read(name, rows).to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
