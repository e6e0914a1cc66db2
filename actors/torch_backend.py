"""The torch backend: a Hugging Face causal LM and its optimizer in one process."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loopwright.actors import published
from loopwright.actors.allocator import keep_freed_memory
from loopwright.actors.model_files import load_model, refuse_dropout
from loopwright.actors.packed_forward import (
    MicroBatch,
    Sequences,
    action_logprobs,
    check_model,
)
from loopwright.actors.policy_step import sequence_logprobs, take_step
from loopwright.actors.ranks import Ranks
from loopwright.actors.trainer_backend import BUCKET_BYTES, BackendError, TrainerSettings
from loopwright.algorithms.records import TrainBatch


class TorchBackend:
    """`TrainerBackend` for one process."""

    def __init__(self, settings: TrainerSettings) -> None:
        """Load the model. Raises `BackendError` or `ForwardError` if it cannot be trained."""
        torch.set_num_threads(settings.threads)
        if settings.device == "cpu":
            keep_freed_memory()
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.ranks = Ranks(device=settings.device)
        self.step = 0
        self.non_finite = 0
        self.model = load_model(settings.model_path, dtype=settings.dtype, device=settings.device)
        check_model(self.model)
        if settings.gradient_checkpointing:
            # Hugging Face recomputes in training mode only.
            refuse_dropout(self.model.config.to_dict())
            self.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            self.model.train()
        adapters: dict[str, nn.Module] = {}
        if settings.lora_rank:
            from loopwright.actors.lora import adapted_layers, add_adapters

            self.model = add_adapters(
                self.model,
                rank=settings.lora_rank,
                alpha=settings.lora_alpha,
                targets=settings.lora_targets,
            )
            adapters = adapted_layers(self.model)
        self._published = published.layout(self.model, adapters)
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.optimizer = self._build_optimizer()

    def train(self, batch: TrainBatch) -> dict[str, float]:
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
            self.model, micro, temperature=temperature, chunk=self.settings.logprob_chunk
        )

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, limit: float) -> float:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        return float(nn.utils.clip_grad_norm_(trainable, limit))

    def update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def drop_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def gather(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._parameters[name].detach() for name in names}

    def scatter(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in tensors.items():
                self._parameters[name].copy_(value)

    def published_shapes(self) -> dict[str, Tensor]:
        return published.shapes(self._published)

    def published_buckets(self, size_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
        return published.buckets(self._published, self.gather, size_bytes)

    def state(self) -> dict[str, Any]:
        trainable = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        return {
            "step": self.step,
            "non_finite": self.non_finite,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "adapters": trainable if self.settings.lora_rank else {},
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        source = state["adapters"] if self.settings.lora_rank else tensors
        wanted = [n for n, p in self.model.named_parameters() if p.requires_grad]
        if missing := sorted(set(wanted) - set(source)):
            raise BackendError(
                f"saved weights lack {len(missing)} tensors of this model "
                f"({', '.join(missing[:5])}); load a "
                "checkpoint of the same model and the same LoRA settings"
            )
        self.scatter({name: source[name] for name in wanted})
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step, self.non_finite = int(state["step"]), int(state["non_finite"])

    def _build_optimizer(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for p in trainable if p.ndim >= 2],
                "weight_decay": self.settings.weight_decay,
            },
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(
            groups,
            lr=self.settings.lr,
            betas=self.settings.betas,
            eps=self.settings.eps,
            foreach=True,
        )
