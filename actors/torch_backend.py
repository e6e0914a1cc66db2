"""The torch backend: model and optimizer in one process."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopwright.actors import optimizer_state, published
from loopwright.actors.critic import build_critic
from loopwright.actors.dry_run import held_tensors
from loopwright.actors.optimizer_choice import (
    build_optimizer,
    calibrate,
    descend,
    is_forward_only,
    project_early,
    update,
)
from loopwright.actors.packed_forward import (
    MicroBatch,
    Sequences,
    action_logprobs,
    action_states,
)
from loopwright.actors.policy_model import load_policy, load_reference, without_adapters
from loopwright.actors.policy_step import sequence_logprobs, take_step
from loopwright.actors.ranks import Ranks
from loopwright.actors.trainer_backend import BUCKET_BYTES, BackendError, Read, TrainerSettings
from loopwright.algorithms.records import TrainBatch


class TorchBackend:
    """`TrainerBackend` for one process."""

    def __init__(self, settings: TrainerSettings, ranks: Ranks | None = None) -> None:
        """Load the model. Raises `BackendError` or `ForwardError` if it cannot be trained."""
        if settings.ranks != 1 or settings.backend_options:
            raise BackendError(
                f"trainer.backend = 'torch' with trainer.ranks = {settings.ranks} and "
                f"trainer.backend_options = {dict(settings.backend_options)}: it is one process "
                'without options; set trainer.backend = "fsdp2" or "deepspeed"'
            )
        self.settings = settings
        self.ranks = ranks or Ranks(device=settings.device)
        self.step = 0
        self.non_finite = 0
        policy = load_policy(settings, device=settings.device)
        self.model = policy.model
        self._current = self.model  # what `forward` computes with
        self._reference = load_reference(settings, device=settings.device)
        self.forward_only = is_forward_only(settings)
        self.critic = build_critic(settings, self.model.config.hidden_size)
        self._published = policy.published
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(settings, self.model)
        project_early(self.optimizer)

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
        return action_logprobs(
            self._current, micro, temperature=temperature, chunk=self.settings.logprob_chunk
        )

    def states(self, micro: MicroBatch) -> Tensor:
        with torch.no_grad():
            return action_states(self.model, micro)

    @contextmanager
    def reference(self) -> Iterator[None]:
        with without_adapters(self.model) if self._reference is None else nullcontext():
            self._current = self._reference or self.model
            try:
                yield
            finally:
                self._current = self.model

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
        return {name: self._parameters[name].detach() for name in names}

    def scatter(self, names: Sequence[str], read: Read) -> None:
        with torch.no_grad():
            for name in names:
                self._parameters[name].copy_(read(name, None))

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
        return optimizer_state.tensor_buckets(found, lambda tensor: tensor, size_bytes)

    def optimizer_numbers(self) -> dict[str, Any]:
        return optimizer_state.numbers(self.optimizer, self._parameters)

    def restore_optimizer(self, read: Read, saved: Collection[str], numbers: Any) -> None:
        tensors = {name: read(name, None) for name in saved}
        optimizer_state.load(self.optimizer, self._parameters, tensors, numbers)
