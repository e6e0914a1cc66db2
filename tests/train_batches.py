"""A small model and training batches for tests of the trainer."""

from pathlib import Path

import numpy as np

from loopwright.actors.tiny_model import build_tiny_policy
from loopwright.algorithms.records import TrainBatch


def build_policy(folder: Path, *, vocab_size: int = 300) -> str:
    """A policy of 20,000 random weights, tied embedding; its folder."""
    build_tiny_policy(
        ["find Ana = 17 ."] * 3,
        folder,
        hidden_size=32,
        layers=2,
        heads=2,
        kv_heads=1,
        intermediate_size=48,
        vocab_size=vocab_size,
        max_context=128,
    )
    return str(folder)


def make_batch(
    step: int = 1, *, seed: int = 0, rollouts: int = 8, contexts: int = 1, logprob: float = -5.5
) -> TrainBatch:
    """Rollouts of random tokens, lengths and advantages; two more rollouts were dropped before."""
    random = np.random.default_rng(seed)
    lengths = random.integers(6, 24, rollouts * contexts).astype(np.int32)
    tokens = int(lengths.sum())
    mask = random.random(tokens) < 0.5
    starts = np.cumsum(lengths) - lengths
    mask[starts], mask[starts + lengths - 1] = False, True
    turns = np.concatenate([np.arange(n) * 2 // n for n in lengths])
    return TrainBatch(
        step=step,
        token_ids=random.integers(0, 250, tokens).astype(np.int32),
        action_mask=mask,
        behavior_logprobs=np.where(mask, logprob, 0).astype(np.float32),
        policy_versions=np.where(mask, step - 1, -1).astype(np.int32),
        turn_ids=np.where(mask, turns, -1).astype(np.int16),
        lengths=lengths,
        rollout_ids=np.repeat(np.arange(rollouts), contexts).astype(np.int32),
        rewards=np.repeat(random.random(rollouts), contexts).astype(np.float32),
        advantages=np.repeat(random.normal(size=rollouts), contexts).astype(np.float32),
        rollout_count=rollouts + 2,
    )
