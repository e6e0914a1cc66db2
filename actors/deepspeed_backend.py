"""The DeepSpeed backend: ZeRO stages 1, 2 and 3, with offload to host memory.

    stage 1   optimizer states are cut over the ranks
    stage 2   and gradients
    stage 3   and parameters

ZeRO cuts flat pieces, not rows, so only element-wise optimizers work here. It averages gradients
over the ranks; the loss is multiplied by their number to make that the sum. States are saved and
restored by the names of parameters through DeepSpeed's own access functions, whole, so that a
checkpoint fits another number of ranks, another stage, and the other backends.
"""

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loopwright.actors import optimizer_state, published
from loopwright.actors.critic import build_critic
from loopwright.actors.dry_run import held_tensors
from loopwright.actors.flat_optimizer import FlatOptimizer
from loopwright.actors.optimizer_choice import optimizer_options, set_rate
from loopwright.actors.packed_forward import MicroBatch, Sequences
from loopwright.actors.policy_model import (
    ActionLogprobs,
    load_policy,
    load_reference,
    without_adapters,
)
from loopwright.actors.policy_step import sequence_logprobs, take_step
from loopwright.actors.ranks import Ranks, alone
from loopwright.actors.trainer_backend import BUCKET_BYTES, BackendError, Read, TrainerSettings
from loopwright.algorithms.records import TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroOptions:
    """`trainer.backend_options` of this backend."""

    zero_stage: int = 2
    offload: bool = False  # optimizer states, and in stage 3 parameters, in host memory

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "ZeroOptions":
        """Raises `BackendError` for options and values that do not exist."""
        try:
            options = cls(**given)
        except TypeError:
            options = cls(zero_stage=0)
        if options.zero_stage not in (1, 2, 3) or not isinstance(options.offload, bool):
            raise BackendError(
                f"trainer.backend_options = {dict(given)}: DeepSpeed has zero_stage = 1, 2 or 3 "
                "and offload = true or false"
            )
        return options


class DeepSpeedBackend:
    """`TrainerBackend` for the ranks of one process group, which exists before."""

    def __init__(self, settings: TrainerSettings, ranks: Ranks | None = None) -> None:
        """Load the model on every rank; DeepSpeed keeps this rank's pieces of what it cuts."""
        self._options = ZeroOptions.of(settings.backend_options)
        self.settings = settings
        self.ranks = ranks or alone(settings.device)
        self.step = 0
        self.non_finite = 0
        policy = load_policy(settings, device=settings.device)
        self.model = policy.model
        self._published = policy.published
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = FlatOptimizer(
            self._trained.values(), settings.optimizer, optimizer_options(settings)
        )
        self.forward_only = False
        self.critic = build_critic(settings, self.model.config.hidden_size)
        self._engine = self._initialize(self.model, self.optimizer)
        self._reference = self._load_reference()
        self._current = self._engine  # what `forward` computes with
        self._zero = self._engine.optimizer
        for piece in self._pieces():
            self.optimizer.prepare(piece)
        if self._options.zero_stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _load_reference(self) -> Any:
        model = load_reference(self.settings, device=self.settings.device)
        if model is None or self._options.zero_stage == 3:
            return None if model is None else self._initialize(model, None)
        return ActionLogprobs(model, chunk=self.settings.logprob_chunk)

    def _initialize(self, model: PreTrainedModel, optimizer: FlatOptimizer | None) -> Any:
        """A DeepSpeed engine; without an optimizer one that cuts parameters, for inference."""
        os.environ.setdefault("LOCAL_RANK", "0")  # every rank is a process with one device
        if self.settings.device == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        if self.settings.device == "cpu":
            # Nothing is compiled at start: what it knows of is a faster sum for AVX-512, and gloo
            # does as well.
            deepspeed.ops.__compatible_ops__ = {}
        stage, offload = self._options.zero_stage, self._options.offload
        zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
        if offload and optimizer is not None:
            zero["offload_optimizer"] = {"device": "cpu"}
        if offload and stage == 3:
            zero["offload_param"] = {"device": "cpu"}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # a step ends where `update` says so
            "gradient_clipping": 1.0,  # `update` sets the limit
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.settings.dtype == "bfloat16", "check_grad_overflow": True},
            "steps_per_print": 1 << 60,
        }
        deepspeed.utils.logger.setLevel("ERROR")
        engine, *_ = deepspeed.initialize(
            model=ActionLogprobs(model, chunk=self.settings.logprob_chunk),
            optimizer=optimizer,
            config=config,
        )
        return engine

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
        lp: Tensor = self._current(micro, temperature)
        return lp

    def states(self, micro: MicroBatch) -> Tensor:
        with torch.no_grad():
            found: Tensor = self._engine(micro, 1.0, states=True)
        return found

    @contextmanager
    def reference(self) -> Iterator[None]:
        with without_adapters(self.model) if self._reference is None else nullcontext():
            self._current = self._reference or self._engine
            try:
                yield
            finally:
                self._current = self._engine

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self.ranks.size)

    def update(self, rate: float, limit: float) -> float:
        set_rate(self.optimizer, rate)
        self._zero.clip_grad = limit if math.isfinite(limit) else 0.0
        self._engine.step()
        return math.nan if self._zero.overflow else float(self._zero._global_grad_norm)

    def descend(self, rate: float, loss: Callable[[], float]) -> float:
        raise BackendError("DeepSpeed has element-wise optimizers only, none of them forward-only")

    def drop_gradient(self) -> None:
        self._zero.zero_grad(set_to_none=True)
        if self._options.zero_stage == 3:
            self._zero.averaged_gradients = {}
        else:
            for group in self._zero.averaged_gradients:
                self._zero.averaged_gradients[group] = None

    def gather(self, names: Sequence[str]) -> dict[str, Tensor]:
        import deepspeed

        chosen = {name: self._parameters[name] for name in names}
        if self._options.zero_stage < 3:
            return {name: p.detach() for name, p in chosen.items()}
        with deepspeed.zero.GatheredParameters(list(chosen.values())):
            return {name: p.detach().clone() for name, p in chosen.items()}

    def scatter(self, names: Sequence[str], read: Read) -> None:
        import deepspeed

        for name in names:
            parameter, value = self._parameters[name], read(name, None)
            if self._options.zero_stage == 3:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(value)
            else:
                parameter.data.copy_(value)
            if parameter.requires_grad:
                self._set_piece(parameter, value.float(), None)

    def published_shapes(self) -> dict[str, Tensor]:
        return published.shapes(self._published)

    def published_buckets(self, size_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
        return published.buckets(self._published, self.gather, size_bytes)

    def held(self) -> dict[str, list[Tensor]]:
        critics = [] if self.critic is None else [self.critic]
        found = held_tensors(
            (self.model, self._reference, *(c.head for c in critics)),
            (self.optimizer, *(c.optimizer for c in critics)),
        )
        if self._options.zero_stage == 3:  # parameters are empty, their pieces lie beside them
            cut: list[Any] = list(self.model.parameters())
            found["weights"] = [p.ds_tensor for p in cut] + list(self.model.buffers())
        found["optimizer"] += self._pieces()
        return found

    def optimizer_buckets(self, size_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        keys = self._state_keys()
        bucket: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            for key, dtype in keys.items():
                whole = (
                    safe_get_full_fp32_param(parameter)
                    if key == optimizer_state.MASTER
                    else safe_get_full_optimizer_state(parameter, key)
                )
                bucket[f"{name}/{key}"] = whole.to(dtype)
            if sum(t.nbytes for t in bucket.values()) >= size_bytes:
                yield bucket
                bucket = {}
        if bucket:
            yield bucket

    def optimizer_numbers(self) -> dict[str, Any]:
        plain = {
            key: value
            for key, value in self.optimizer.state[self._pieces()[0]].items()
            if not isinstance(value, Tensor)
        }
        state = {f"{name}/{key}": v for name in self._trained for key, v in plain.items()}
        counted = self.optimizer.counters()
        return {"state": state, "groups": [counted for _ in self.optimizer.param_groups]}

    def restore_optimizer(self, read: Read, saved: Collection[str], numbers: Any) -> None:
        keys = self._state_keys()
        wanted = {f"{name}/{key}" for name in self._trained for key in keys}
        if wanted != set(saved):
            odd = sorted(wanted ^ set(saved))
            raise BackendError(
                f"the saved optimizer differs in {len(odd)} states ({', '.join(odd[:5])}): load a "
                "checkpoint of the same model, adapter and optimizer options"
            )
        for name, parameter in self._trained.items():
            for key in keys:
                value = read(f"{name}/{key}", None).float()
                self._set_piece(parameter, value, None if key == optimizer_state.MASTER else key)
        counts = {(path.rpartition("/")[2], value) for path, value in numbers["state"].items()}
        if len(counts) > len({key for key, _ in counts}):
            raise BackendError(
                "the saved optimizer has updated some parameters more often than others; ZeRO "
                "keeps one count for all: go on with the torch or FSDP2 backend"
            )
        for piece in self._pieces():
            self.optimizer.restore_counters(piece, numbers)

    def _state_keys(self) -> dict[str, torch.dtype]:
        """Names of the state tensors of a parameter, and the dtypes they are kept in."""
        piece = self._pieces()[0]
        keys = {
            key: value.dtype
            for key, value in self.optimizer.state[piece].items()
            if isinstance(value, Tensor)
        }
        return keys | ({optimizer_state.MASTER: torch.float32} if self._masters else {})

    @property
    def _masters(self) -> bool:
        return self.settings.dtype != "float32"

    def _pieces(self) -> list[Tensor]:
        """The flat fp32 pieces of this rank."""
        if self._options.zero_stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _set_piece(self, parameter: nn.Parameter, whole: Tensor, key: str | None) -> None:
        """Put this rank's part of a `whole` tensor into its piece: of the fp32 weights, or of the
        state `key`."""
        part: Any = parameter
        if self._options.zero_stage < 3:
            part.set_full_hp_param(whole.to(parameter.device), key)
            return
        size = part.ds_tensor.ds_numel
        flat = torch.zeros(size * self.ranks.size, dtype=whole.dtype)
        flat[: whole.numel()] = whole.flatten()
        mine = flat.narrow(0, size * self.ranks.rank, size)
        self._zero.set_local_hp_param(mine.to(parameter.device), part, key)
