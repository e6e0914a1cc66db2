"""Supervised warm start: clone a limited number of oracle demonstrations, loss on the action tokens
only.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from loopwright.actors.checkpoint import save_weights
from loopwright.actors.packed_forward import Sequences, micro_batches
from loopwright.actors.torch_backend import TorchBackend
from loopwright.actors.trainer_backend import TrainerSettings, learning_rate

_WARMUP_STEPS = 50
_RECENT_STEPS = 15  # optimizer steps that the early stop averages over

Progress = Callable[[int, float], None]  # (step, mean negative logprob of its action tokens)


class Demonstration(Protocol):
    """Tokens of an episode the oracle played; `algorithms.records.Context` is one."""

    @property
    def token_ids(self) -> np.ndarray:
        """[T] int32."""
        ...

    @property
    def action_mask(self) -> np.ndarray:
        """[T] bool."""
        ...


class CloningError(ValueError):
    """Demonstrations that cannot be cloned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloningReport:
    """What was learned by cloning, so that it can be told apart from what RL learned."""

    demonstrations: int  # that were learned from
    steps: int
    action_tokens: int  # seen, repeats counted
    loss_first: float  # mean negative logprob of an action token
    loss_last: float
    match_last: float  # probability of writing an unseen demonstration word for word, recent mean
    seconds: float


def clone(
    model_path: str,
    sequences: Sequence[Demonstration],
    out_dir: str | Path,
    *,
    steps: int,
    batch: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    threads: int = 1,
    token_budget: int = 2048,
    until_match: float = 1.0,
    weights: Sequence[np.ndarray] | None = None,
    progress: Progress | None = None,
) -> CloningReport:
    """Train the model at `model_path` on `sequences` for at most `steps` optimizer steps, save it
    to `out_dir`.

    Each step takes `batch` demonstrations; the demonstrations are gone through in a new order as
    often as it takes. Cloning ends early once the policy would write a demonstration it is about to
    learn from word for word with probability `until_match` (mean of the recent ones): RL is to do
    the rest, and a policy cloned to certainty no longer explores. Learning rate: warm-up over the
    first 50 steps, then constant. `weights`, [T] for each demonstration, weigh its tokens in the
    loss; without them all count the same. Raises `CloningError` without demonstrations.
    """
    started = time.perf_counter()
    if not sequences:
        raise CloningError(
            "no demonstrations to clone; raise warm_start.demonstrations, or check the oracle"
        )
    settings = TrainerSettings(
        model_path=str(model_path),
        seed=seed,
        threads=threads,
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        warmup_steps=min(_WARMUP_STEPS, max(1, steps // 10)),
        token_budget=token_budget,
    )
    backend = TorchBackend(settings)
    joined = _joined(sequences)
    whole_weights = None if weights is None else np.concatenate(weights).astype(np.float32)
    losses: list[float] = []
    matches: deque[float] = deque(maxlen=_RECENT_STEPS)
    tokens = 0
    order = _endless_order(len(sequences), min(batch, len(sequences)), seed)
    for step in range(1, steps + 1):
        loss, seen, match = _cloning_step(
            backend, joined, next(order), learning_rate(settings, step), whole_weights
        )
        losses.append(loss)
        matches.append(match)
        tokens += seen
        if progress is not None:
            progress(step, loss)
        if len(matches) == _RECENT_STEPS and float(np.mean(matches)) >= until_match:
            break
    save_weights(backend, Path(out_dir))
    return CloningReport(
        demonstrations=min(len(sequences), len(losses) * batch),
        steps=len(losses),
        action_tokens=tokens,
        loss_first=losses[0] if losses else 0.0,
        loss_last=float(np.mean(losses[-10:])) if losses else 0.0,
        match_last=float(np.mean(matches)) if matches else 0.0,
        seconds=time.perf_counter() - started,
    )


def _joined(sequences: Sequence[Demonstration]) -> Sequences:
    return Sequences.of(
        np.concatenate([s.token_ids for s in sequences]),
        np.concatenate([s.action_mask for s in sequences]),
        np.array([len(s.token_ids) for s in sequences]),
    )


def _endless_order(count: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of indices: each demonstration once before any comes again."""
    random = np.random.default_rng(seed)
    waiting = np.zeros(0, dtype=np.int64)
    while True:
        while len(waiting) < batch:
            waiting = np.concatenate([waiting, random.permutation(count)])
        yield waiting[:batch]
        waiting = waiting[batch:]


def _cloning_step(
    backend: TorchBackend,
    sequences: Sequences,
    chosen: np.ndarray,
    rate: float,
    weights: np.ndarray | None,
) -> tuple[float, int, float]:
    """One optimizer step; mean negative logprob and number of its action tokens, and the mean
    probability, before the step, of writing one of its demonstrations word for word."""
    settings = backend.settings
    spans = zip(sequences.starts[chosen], sequences.starts[chosen + 1], strict=True)
    tokens = sum(int(sequences.action_mask[start:end].sum()) for start, end in spans)
    total = 0.0
    whole = np.zeros(len(sequences.lengths))  # logprob of each demonstration's actions
    for micro in micro_batches(
        sequences, chosen, token_budget=settings.token_budget, device=settings.device
    ):
        lp = backend.forward(micro, temperature=1.0)
        weighed = lp if weights is None else lp * torch.from_numpy(weights[micro.tokens]).to(lp)
        loss = -weighed.sum() / max(tokens, 1)
        backend.backward(loss)
        total += float(loss.detach())
        owner = np.searchsorted(sequences.starts, micro.tokens, side="right") - 1
        np.add.at(whole, owner, lp.detach().cpu().numpy())
    backend.update(rate, 1.0)
    backend.drop_gradient()
    return total, tokens, float(np.exp(whole[chosen]).mean())
