"""Chunked logprobs: value and gradient of the plain path in float64, and one buffer of logits."""

import pytest
import torch
from torch import Tensor, nn

from loopwright.actors.chunked_logprobs import chunked_logprobs
from loopwright.actors.memory_meter import MemoryMeter

WIDTH, VOCAB, TOKENS = 6, 23, 17


def _problem(dtype: torch.dtype = torch.float64, *, bias: bool) -> tuple[Tensor, nn.Linear, Tensor]:
    random = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    hidden = torch.randn(TOKENS, WIDTH, generator=random, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCAB, (TOKENS,), generator=random)
    return hidden.requires_grad_(), head, targets


def _plain(hidden: Tensor, head: nn.Linear, targets: Tensor, temperature: float) -> Tensor:
    logits = head(hidden).to(torch.float64) / temperature
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def _ppo_like(logprobs: Tensor) -> Tensor:
    """A loss that is not linear in the logprobs, with clipped and negative parts."""
    advantage = torch.linspace(-1, 1, len(logprobs), dtype=logprobs.dtype)
    ratio = torch.exp(logprobs - logprobs.detach().roll(1).clamp(-3, -1))
    return -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage).sum()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 5, TOKENS, 1000])
def test_value_and_gradient_are_those_of_the_plain_path(
    bias: bool, temperature: float, chunk: int
) -> None:
    hidden, head, targets = _problem(bias=bias)
    expected = _plain(hidden, head, targets, temperature)
    wanted = torch.autograd.grad(_ppo_like(expected), [hidden, *head.parameters()])
    found = chunked_logprobs(hidden, head, targets, temperature=temperature, chunk=chunk)
    gradients = torch.autograd.grad(_ppo_like(found), [hidden, *head.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    for value, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(value, other, atol=1e-11, rtol=1e-11)


def test_the_gradient_is_that_of_finite_differences() -> None:
    hidden, head, targets = _problem(bias=True)

    def logprobs(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(
            _Chunked(head, targets), {"head.weight": weight, "head.bias": bias}, (states,)
        )

    assert torch.autograd.gradcheck(logprobs, (hidden, head.weight, head.bias))


class _Chunked(nn.Module):
    def __init__(self, head: nn.Linear, targets: Tensor) -> None:
        super().__init__()
        self.head, self.targets = head, targets

    def forward(self, hidden: Tensor) -> Tensor:
        return chunked_logprobs(hidden, self.head, self.targets, temperature=0.8, chunk=4)


def test_a_frozen_layer_gets_no_gradient_and_nothing_is_no_error() -> None:
    hidden, head, targets = _problem(bias=False)
    head.requires_grad_(False)
    chunked_logprobs(hidden, head, targets, temperature=1.0, chunk=3).sum().backward()
    assert hidden.grad is not None and head.weight.grad is None
    none = chunked_logprobs(hidden[:0], head, targets[:0], temperature=1.0, chunk=3)
    assert none.shape == (0,)
    none.sum().backward()


def test_logits_take_float32_and_gradients_their_own_dtype() -> None:
    hidden, head, targets = _problem(torch.bfloat16, bias=True)
    found = chunked_logprobs(hidden, head, targets, temperature=1.0, chunk=4)
    assert found.dtype == torch.float32
    expected = _plain(hidden, head, targets, 1.0).float()
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.01)
    found.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_one_chunk_of_logits_exists_and_no_more() -> None:
    hidden, head, targets = _problem(torch.float32, bias=False)
    chunk = 4
    meter = MemoryMeter(vocab=VOCAB)
    meter.hold("weights", head.parameters())
    with meter:
        chunked_logprobs(hidden, head, targets, temperature=0.9, chunk=chunk).sum().backward()
    assert meter.largest().logits == chunk * VOCAB * 4
    plain = MemoryMeter(vocab=VOCAB)
    with plain:
        _plain(hidden, head, targets, 0.9).sum().backward()
    assert plain.largest().logits >= 2 * TOKENS * VOCAB * 4
