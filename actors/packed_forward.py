"""Sequences of any length through a causal LM in rows, and the logprobs of the tokens that matter.

A row holds one sequence padded on its right, or several end to end. One sequence a row needs no
mask (what is causal never sees the padding behind it), which is the fastest on a CPU; several need
a block-diagonal mask and positions that start over. Logits exist for one chunk of action tokens at
a time, never for the whole micro-batch (chunked_logprobs.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from loopwright.actors.chunked_logprobs import chunked_logprobs
from loopwright.algorithms.packing import best_fit_decreasing, padded_micro_batches


class ForwardError(Exception):
    """Sequences or a model that the packed forward cannot serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """S sequences laid end to end, N tokens."""

    token_ids: np.ndarray  # [N] int
    action_mask: np.ndarray  # [N] bool, tokens whose logprob is wanted
    starts: np.ndarray  # [S+1] int64, where each sequence begins, and N

    @classmethod
    def of(cls, token_ids: np.ndarray, action_mask: np.ndarray, lengths: np.ndarray) -> "Sequences":
        """From lengths [S]. Raises `ForwardError` where a sequence begins with an action token:
        nothing predicts it.
        """
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        bad = np.flatnonzero(action_mask[starts[:-1][np.asarray(lengths) > 0]])
        if bad.size:
            raise ForwardError(
                f"sequence {int(bad[0])} begins with an action token, which no token precedes: a "
                "context must begin "
                "with at least one token of the prompt"
            )
        return cls(token_ids=token_ids, action_mask=action_mask, starts=starts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence: [S]."""
        return np.diff(self.starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """R rows of C columns, and where the M wanted logprobs come from."""

    input_ids: Tensor  # [R, C] int64
    position_ids: Tensor  # [R, C] int64
    mask: Tensor | None  # [R, 1, C, C] bool, True where a query may see a key; None: plain causal
    predictors: Tensor  # [M] int64, flat position in R*C whose output predicts the token
    targets: Tensor  # [M] int64, the tokens
    tokens: np.ndarray  # [M] int64, their places in the N tokens of the sequences


def micro_batches(
    sequences: Sequences,
    chosen: Sequence[int] | np.ndarray,
    *,
    token_budget: int,
    pack: bool = False,
    device: str = "cpu",
) -> list[MicroBatch]:
    """Micro-batches of at most `token_budget` positions each over the `chosen` sequences.

    `pack` puts several sequences in a row, best fit decreasing. One sequence longer than the budget
    is a micro-batch by itself.
    """
    order = np.asarray(chosen, dtype=np.int64)
    lengths = sequences.lengths[order]
    if not order.size:
        return []
    if not pack:
        grouped = [
            [[row] for row in batch] for batch in padded_micro_batches(lengths, token_budget)
        ]
    else:
        rows = best_fit_decreasing(lengths, int(lengths.max()))
        per_batch = max(1, token_budget // int(lengths.max()))
        grouped = [rows[i : i + per_batch] for i in range(0, len(rows), per_batch)]
    return [_lay_out(sequences, [order[row] for row in batch], device) for batch in grouped]


def _lay_out(sequences: Sequences, rows: Sequence[np.ndarray], device: str) -> MicroBatch:
    width = max(int(sequences.lengths[row].sum()) for row in rows)
    shape = (len(rows), width)
    input_ids = np.zeros(shape, dtype=np.int64)
    # Padding goes on counting: positions that start over are taken for a second sequence, and
    # Hugging Face then builds a mask that costs memory and the fused attention.
    position_ids = np.tile(np.arange(width), (len(rows), 1))
    segments = np.full(shape, -1, dtype=np.int64)
    predictors, places = [], []
    for r, row in enumerate(rows):
        column = 0
        for index in row:
            start, end = int(sequences.starts[index]), int(sequences.starts[index + 1])
            span = slice(column, column + end - start)
            input_ids[r, span] = sequences.token_ids[start:end]
            position_ids[r, span] = np.arange(end - start)
            segments[r, span] = index
            actions = np.flatnonzero(sequences.action_mask[start:end])
            predictors.append(r * width + column + actions - 1)
            places.append(start + actions)
            column += end - start
    tokens = np.concatenate(places)
    several = any(len(row) > 1 for row in rows)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids).to(device),
        position_ids=torch.from_numpy(position_ids).to(device),
        mask=_block_diagonal(torch.from_numpy(segments).to(device)) if several else None,
        predictors=torch.from_numpy(np.concatenate(predictors)).to(device),
        targets=torch.from_numpy(sequences.token_ids[tokens].astype(np.int64)).to(device),
        tokens=tokens,
    )


def empty_micro_batch(device: str) -> MicroBatch:
    """One token whose logprob nobody wants: a pass for the sake of the ranks that wait for it."""
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    token = torch.zeros((1, 1), dtype=torch.int64, device=device)
    return MicroBatch(
        input_ids=token,
        position_ids=token,
        mask=None,
        predictors=nothing,
        targets=nothing,
        tokens=np.zeros(0, dtype=np.int64),
    )


def _block_diagonal(segments: Tensor) -> Tensor:
    # Padding (-1) sees padding, so that no row of the mask is empty: softmax over nothing is not a
    # number.
    width = segments.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    return ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]


def action_logprobs(
    model: PreTrainedModel, micro: MicroBatch, *, temperature: float, chunk: int
) -> Tensor:
    """Logprobs of the micro-batch's targets under `model` at `temperature`: [M] float32,
    differentiable.

    `model` is a Hugging Face causal LM (see `check_model`); logits exist for `chunk` targets at a
    time.
    """
    picked = action_states(model, micro)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and not _sharded(head.weight):
        return chunked_logprobs(picked, head, micro.targets, temperature=temperature, chunk=chunk)
    # A layer with an adapter or a sharded weight is only known as a module that can be called.
    if len(picked) <= chunk:
        return _chosen(picked, micro.targets, head, temperature)
    parts = []
    for rows, targets in zip(picked.split(chunk), micro.targets.split(chunk), strict=True):
        if (
            torch.is_grad_enabled()
        ):  # recomputed in the backward pass instead of kept: one chunk of logits at a time
            parts.append(checkpoint(_chosen, rows, targets, head, temperature, use_reentrant=False))
        else:
            parts.append(_chosen(rows, targets, head, temperature))
    return torch.cat(parts)


def action_states(model: PreTrainedModel, micro: MicroBatch) -> Tensor:
    """The last hidden states that predict the micro-batch's targets: [M, H], differentiable."""
    hidden = model.base_model(
        input_ids=micro.input_ids,
        position_ids=micro.position_ids,
        attention_mask=micro.mask,
        use_cache=False,
    ).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])[micro.predictors]


def _sharded(weight: Any) -> bool:
    """Is it a DTensor or another shell around tensors?"""
    return bool(is_traceable_wrapper_subclass(weight))


def _chosen(hidden: Tensor, targets: Tensor, head: nn.Module, temperature: float) -> Tensor:
    logits = head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    return -nn.functional.cross_entropy(logits, targets, reduction="none")


def check_model(model: PreTrainedModel, *, tolerance: float = 1e-4) -> None:
    """Refuse a model whose logits are not `head(base(tokens))`: some architectures scale or cap
    them.

    Raises `ForwardError` with the difference found.
    """
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None]
    training = model.training
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found = model.get_output_embeddings()(hidden).float()
    model.train(training)
    gap = float((found - expected).abs().max())
    if not gap <= tolerance:
        raise ForwardError(
            f"{type(model).__name__}: logits differ by {gap:.3g} from its output layer over its "
            "hidden states (limit "
            f"{tolerance:g}): the architecture scales or caps its logits, which the trainer does "
            "not support"
        )
