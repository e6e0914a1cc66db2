"""The torch backend: a Hugging Face causal LM, AdamW, and the optimizer steps of one training
batch.

One step of the loop is `epochs` passes over the batch, each cut at random into `minibatches`, each
of those into micro-batches by token budget. The gradient of a minibatch does not depend on how it
is cut (weights per unit are fixed before), and everything random is seeded by (seed, step, epoch),
so a step can be repeated bit for bit.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loopwright.actors.allocator import keep_freed_memory
from loopwright.actors.model_files import load_model, refuse_dropout
from loopwright.actors.objective import (
    LossSettings as LossSettings,
)
from loopwright.actors.objective import (
    MinibatchUnits,
    minibatch_units,
    weighted_loss,
)
from loopwright.actors.packed_forward import (
    MicroBatch,
    Sequences,
    action_logprobs,
    check_model,
    micro_batches,
    sequence_logprobs,
)
from loopwright.actors.step_progress import StepProgress
from loopwright.algorithms.records import TrainBatch

NON_FINITE_LIMIT = 20  # minibatches skipped before training fails (LOOP's code)
LOG_RATIO_LIMIT = (
    20.0  # |mean over rollouts of the summed log-ratio| that ends a step's passes (LOOP's code)
)


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
    gradient_checkpointing: bool = False
    logprob_chunk: int = 2048
    temperature: float = 1.0
    proximal: Literal["behavior", "recomputed"] = "recomputed"
    loss: LossSettings = field(default_factory=LossSettings)
    lora_rank: int = 0  # 0: train all parameters
    lora_alpha: float = 32.0
    lora_targets: str = "all-linear"


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


class TorchBackend:
    """Model and optimizer of one process. `train` is the only call that changes the weights."""

    def __init__(self, settings: TrainerSettings) -> None:
        """Load the model. Raises `BackendError` or `ForwardError` if it cannot be trained."""
        if settings.proximal not in ("behavior", "recomputed"):
            raise BackendError(
                f"proximal={settings.proximal!r}, expected 'behavior' or 'recomputed'"
            )
        if settings.schedule not in ("constant", "linear", "cosine"):
            raise BackendError(
                f"schedule={settings.schedule!r}, expected constant, linear or cosine"
            )
        torch.set_num_threads(settings.threads)
        if settings.device == "cpu":
            keep_freed_memory()
        torch.manual_seed(settings.seed)
        self.settings = settings
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
        if settings.lora_rank:
            from loopwright.actors.lora import add_adapters

            self.model = add_adapters(
                self.model,
                rank=settings.lora_rank,
                alpha=settings.lora_alpha,
                targets=settings.lora_targets,
            )
        self.optimizer = self._build_optimizer()

    def train(self, batch: TrainBatch) -> dict[str, float]:
        """One step: all epochs and minibatches over `batch`. Returns the metrics.

        Raises `BackendError` once more than 20 minibatches of the run had a loss or gradient that
        is not finite.
        """
        started = time.perf_counter()
        settings, progress = self.settings, StepProgress()
        rate = learning_rate(settings, batch.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sequences = Sequences.of(batch.token_ids, batch.action_mask, batch.lengths)
        passes = [self._minibatches(batch, epoch) for epoch in range(settings.epochs)]
        proximal = self._proximal(batch, sequences, passes[0][1:], progress)
        for minibatches in passes:
            for chosen in minibatches:
                self._optimizer_step(batch, sequences, chosen, proximal, progress)
                # From the same weights every later minibatch would see the same ratios: the step
                # ends here.
                if progress.stopped_early:
                    break
            if progress.stopped_early:
                break
        self.step = batch.step
        return progress.metrics(
            batch, epochs=settings.epochs, rate=rate, seconds=time.perf_counter() - started
        )

    def logprobs(
        self,
        sequences: Sequences,
        chosen: np.ndarray | None = None,
        *,
        temperature: float | None = None,
    ) -> np.ndarray:
        """Logprobs of the action tokens of all (or the `chosen`) sequences: [N] float32, 0
        elsewhere; at the training temperature unless another is given.
        """
        settings = self.settings
        return sequence_logprobs(
            self.model,
            sequences,
            temperature=settings.temperature if temperature is None else temperature,
            chunk=settings.logprob_chunk,
            token_budget=settings.token_budget,
            pack=settings.pack,
            device=settings.device,
            chosen=chosen,
        )

    def hugging_face_model(self) -> PreTrainedModel:
        """The model as transformers knows it, whose config describes `published_tensors`."""
        return self.model

    def published_tensors(self) -> dict[str, Tensor]:
        """What engines serve from: every weight under its Hugging Face name, adapters merged, tied
        ones shared.
        """
        if self.settings.lora_rank:
            from loopwright.actors.lora import merged_tensors

            return merged_tensors(self.model)
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {
            name: value.detach() for name, value in self.model.state_dict().items() if name in names
        }

    def state(self) -> dict[str, Any]:
        """Optimizer, step, counters and RNG, and the adapters if there are any; loadable with
        `weights_only`.
        """
        trainable = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        return {
            "step": self.step,
            "non_finite": self.non_finite,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "adapters": trainable if self.settings.lora_rank else {},
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take saved weights (Hugging Face names) and the rest from `state`. Raises `BackendError`
        on other names.
        """
        own = dict(self.model.named_parameters())
        source = state["adapters"] if self.settings.lora_rank else tensors
        wanted = {n for n, p in own.items() if p.requires_grad}
        if missing := sorted(wanted - set(source)):
            raise BackendError(
                f"saved weights lack {len(missing)} tensors of this model "
                f"({', '.join(missing[:5])}); load a "
                "checkpoint of the same model and the same LoRA settings"
            )
        with torch.no_grad():
            for name in wanted:
                own[name].copy_(source[name])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step, self.non_finite = int(state["step"]), int(state["non_finite"])

    def _build_optimizer(self) -> torch.optim.AdamW:
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

    def _proximal(
        self,
        batch: TrainBatch,
        sequences: Sequences,
        later: list[np.ndarray],
        progress: StepProgress,
    ) -> np.ndarray:
        """Proximal logprobs [N] of the `later` minibatches; the first finds its own: nothing is
        updated before it.
        """
        if self.settings.proximal == "behavior":
            return batch.behavior_logprobs
        started = time.perf_counter()
        values = np.zeros(len(batch.token_ids), dtype=np.float32)
        if later:
            chosen = np.concatenate(later)
            values = self.logprobs(sequences, chosen)
            places = batch.action_mask & np.isin(
                np.repeat(np.arange(len(batch.lengths)), batch.lengths), chosen
            )
            progress.tally.add_mismatch(
                torch.from_numpy(values[places]), torch.from_numpy(batch.behavior_logprobs[places])
            )
        progress.seconds["proximal"] = time.perf_counter() - started
        return values

    def _minibatches(self, batch: TrainBatch, epoch: int) -> list[np.ndarray]:
        """Sequence indices of each minibatch; the instances of a rollout stay together."""
        rollouts = np.unique(batch.rollout_ids)
        random = np.random.default_rng((self.settings.seed, batch.step, epoch))
        parts = np.array_split(random.permutation(rollouts), self.settings.minibatches)
        return [np.flatnonzero(np.isin(batch.rollout_ids, part)) for part in parts if part.size]

    def _optimizer_step(
        self,
        batch: TrainBatch,
        sequences: Sequences,
        chosen: np.ndarray,
        proximal: np.ndarray,
        progress: StepProgress,
    ) -> None:
        units = minibatch_units(
            self.settings.loss,
            action_mask=batch.action_mask,
            turn_ids=batch.turn_ids,
            sequence_of_place=np.repeat(np.arange(len(batch.lengths)), batch.lengths),
            rollout_ids=batch.rollout_ids,
            advantages=batch.advantages,
            chosen=chosen,
            minibatch_size=batch.rollout_count / self.settings.minibatches,
        )
        self.optimizer.zero_grad(set_to_none=True)
        log_ratio = self._accumulate_gradient(batch, sequences, chosen, proximal, units, progress)
        log_ratio /= max(units.rollouts, 1)
        progress.tally.log_ratio_by_minibatch.append(log_ratio)
        limit = self.settings.grad_clip or math.inf
        norm = float(
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], limit)
        )
        if not (math.isfinite(norm) and math.isfinite(log_ratio)):
            self._skip(batch.step, norm, progress)
        elif abs(log_ratio) > LOG_RATIO_LIMIT:
            progress.stopped_early = True
        else:
            self.optimizer.step()
            progress.grad_norms.append(norm)
        self.optimizer.zero_grad(set_to_none=True)

    def _accumulate_gradient(
        self,
        batch: TrainBatch,
        sequences: Sequences,
        chosen: np.ndarray,
        proximal: np.ndarray,
        units: MinibatchUnits,
        progress: StepProgress,
    ) -> float:
        """Backward over all micro-batches; returns the sum of the log-ratios."""
        settings, device = self.settings, self.settings.device
        first = not progress.tally.log_ratio_by_minibatch  # before any update: current is proximal
        total = 0.0
        for micro in self._micro_batches(sequences, batch.rollout_ids, chosen):
            started = time.perf_counter()
            lp = action_logprobs(
                self.model, micro, temperature=settings.temperature, chunk=settings.logprob_chunk
            )
            mu = torch.from_numpy(batch.behavior_logprobs[micro.tokens]).to(device)
            if first:
                progress.tally.add_mismatch(lp.detach(), mu)
                if settings.proximal == "recomputed":
                    proximal[micro.tokens] = lp.detach().cpu().numpy()
            prox = torch.from_numpy(proximal[micro.tokens]).to(device)
            loss, log_ratio = weighted_loss(
                settings.loss, units, micro.tokens, lp, prox, mu, progress.tally
            )
            total += log_ratio
            middle = time.perf_counter()
            loss.backward()
            progress.seconds["forward"] += middle - started
            progress.seconds["backward"] += time.perf_counter() - middle
        return total

    def _micro_batches(
        self, sequences: Sequences, rollout_ids: np.ndarray, chosen: np.ndarray
    ) -> list[MicroBatch]:
        settings = self.settings
        if settings.loss.level != "trajectory" and settings.loss.loss != "gspo":
            parts = [chosen]
        else:
            # One ratio over a whole rollout: its instances must meet in one micro-batch.
            several = np.bincount(rollout_ids[chosen])[rollout_ids[chosen]] > 1
            whole = chosen[several]
            parts = [
                chosen[~several],
                *(whole[rollout_ids[whole] == r] for r in np.unique(rollout_ids[whole])),
            ]
        budgets = [settings.token_budget] + [1 << 62] * (len(parts) - 1)
        return [
            micro
            for part, budget in zip(parts, budgets, strict=True)
            for micro in micro_batches(
                sequences, part, token_budget=budget, pack=settings.pack, device=settings.device
            )
        ]

    def _skip(self, step: int, norm: float, progress: StepProgress) -> None:
        progress.skipped += 1
        self.non_finite += 1
        if self.non_finite > NON_FINITE_LIMIT:
            raise BackendError(
                f"step {step}: {self.non_finite} minibatches were not finite (limit "
                f"{NON_FINITE_LIMIT}), the last with gradient norm {norm}; lower trainer.lr, or "
                "look for a reward or logprob that is not finite"
            )
