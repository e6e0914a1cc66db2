"""Logprobs of given tokens through an output layer, and their gradient, without the logits.

Logits exist for one chunk of tokens at a time, in one buffer that is worked on in place: first for
the logprobs, and once more in the backward pass, where the buffer becomes the gradient of the
chunk's logits, d loss / d logits = (d loss / d logprob) · (onehot(target) − softmax) / temperature,
and is multiplied into the gradients of hidden states and weights at once. Nothing of size
tokens × vocabulary is ever kept. The price is one more product with the output layer; the gain over
recomputing the chunk under autograd is that softmax, its logarithm and the gradient do not each
take a buffer.
"""

from typing import Any

import torch
from torch import Tensor, nn


def chunked_logprobs(
    hidden: Tensor, head: nn.Linear, targets: Tensor, *, temperature: float, chunk: int
) -> Tensor:
    """log softmax(head(hidden) / temperature) at `targets`: [M], float32 (float64 if `hidden` is).

    `hidden` is [M, H], `targets` [M] int64. Differentiable in `hidden` and in the parameters of
    `head`, once.
    """
    found: Tensor = _ChunkedLogprobs.apply(
        hidden, head.weight, head.bias, targets, temperature, chunk
    )
    return found


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        parts = [
            _exponentials(hidden[rows], weight, bias, targets[rows], temperature)[2]
            for rows in _chunks(len(hidden), chunk)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=_working(hidden))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (of_logprobs,) = gradients
        hidden, weight, bias, targets = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight) if wanted[1] else None
        of_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        for rows in _chunks(len(hidden), ctx.chunk):
            part, goals = hidden[rows], targets[rows]
            logits, sums, _ = _exponentials(part, weight, bias, goals, ctx.temperature)
            scale = of_logprobs[rows].to(logits.dtype)[:, None] / ctx.temperature
            logits.mul_(-scale / sums)
            logits.scatter_add_(1, goals[:, None], scale)
            of_logits = logits.to(part.dtype)
            del logits
            if of_hidden is not None:
                torch.mm(of_logits, weight, out=of_hidden[rows])
            if of_weight is not None:
                of_weight.addmm_(of_logits.T, part)
            if of_bias is not None:
                of_bias.add_(of_logits.sum(0))
            del of_logits
        return of_hidden, of_weight, of_bias, None, None, None


def _exponentials(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits − their maximum) [m, V], its sums [m, 1], and the logprobs [m] of `targets`."""
    logits = nn.functional.linear(hidden, weight, bias).to(_working(hidden))
    if temperature != 1.0:
        logits.div_(temperature)
    logits.sub_(logits.amax(1, keepdim=True))
    chosen = logits.gather(1, targets[:, None])
    sums = logits.exp_().sum(1, keepdim=True)
    return logits, sums, (chosen - sums.log())[:, 0]


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _working(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
