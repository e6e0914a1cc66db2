"""The memory meter against the allocator's own record, and its classes on models written out."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from loopwright.actors.memory_meter import MemoryMeter
from loopwright.actors.packed_forward import MicroBatch, Sequences, action_logprobs, micro_batches
from loopwright.algorithms.memory_model import MemoryTable

VOCAB = 301


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def _micro(lengths: list[int]) -> MicroBatch:
    tokens = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    mask = np.ones(tokens, dtype=bool)
    mask[starts] = False
    sequences = Sequences.of(np.arange(tokens) % VOCAB, mask, np.array(lengths))
    (micro,) = micro_batches(sequences, np.arange(len(lengths)), token_budget=10**6)
    return micro


def _pass(model: PreTrainedModel, micro: MicroBatch, meter: MemoryMeter) -> None:
    loss = action_logprobs(model, micro, temperature=1.0, chunk=40).sum()
    with meter.phase("backward"):
        loss.backward()


def _allocator_peak(model: PreTrainedModel, micro: MicroBatch) -> int:
    """Largest sum of what torch's CPU allocator handed out during a pass and had not back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        _pass(model, micro, MemoryMeter(vocab=VOCAB))
    found = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())]
    return int(np.cumsum(sizes).max())


def _metered(model: PreTrainedModel, micro: MicroBatch) -> MemoryMeter:
    meter = MemoryMeter(vocab=VOCAB)
    meter.hold("weights", (*model.parameters(), *model.buffers()))
    with meter, meter.gradients_of(model.parameters()):
        _pass(model, micro, meter)
    return meter


def test_the_peak_is_the_allocators(model: PreTrainedModel) -> None:
    micro = _micro([60, 60])
    _pass(model, micro, MemoryMeter(vocab=VOCAB))  # what is made once is made
    model.zero_grad(set_to_none=True)
    metered = _metered(model, micro).peak()
    model.zero_grad(set_to_none=True)
    allocated = _allocator_peak(model, micro)
    model.zero_grad(set_to_none=True)
    assert metered.weights >= sum(p.nbytes for p in model.parameters())
    assert metered.total - metered.weights == pytest.approx(allocated, rel=0.01)


def test_gradients_are_gradients_also_of_tied_weights(model: PreTrainedModel) -> None:
    meter = _metered(model, _micro([9]))
    size = sum(p.nbytes for p in model.parameters())
    embedding = model.get_input_embeddings().weight.nbytes
    assert size <= meter.largest().gradients <= size + 2 * embedding  # output layer, sum, embedding
    model.zero_grad(set_to_none=True)


def test_padded_rows_take_no_more_than_full_ones(model: PreTrainedModel) -> None:
    """A mask of the padded rows would be rows x columns^2, and undo the fused attention."""
    full, padded = _micro([64] * 4), _micro([64, 40, 40, 7])
    assert bool((torch.diff(padded.position_ids) == 1).all())
    full_size = _metered(model, full).peak().activations
    model.zero_grad(set_to_none=True)
    assert _metered(model, padded).peak().activations <= full_size
    model.zero_grad(set_to_none=True)


def test_classes_of_a_layer_written_out() -> None:
    """y = x W, loss = sum y^2: what lives when, by hand."""
    layer, x = nn.Linear(8, 4, bias=False), torch.ones(16, 8)
    meter = MemoryMeter(vocab=999)
    meter.hold("weights", layer.parameters())
    meter.hold("activations", [x])
    with meter, meter.gradients_of(layer.parameters()):
        loss = (layer(x) ** 2).sum()
        with meter.phase("backward"):
            loss.backward()
        del loss
        with meter.phase("optimizer"):
            state = torch.zeros_like(layer.weight)
            layer.weight.grad = None
    weight, rows, outputs = 8 * 4 * 4, 16 * 8 * 4, 16 * 4 * 4
    largest = meter.largest()
    assert largest.weights == weight
    assert largest.gradients == weight
    assert largest.optimizer == state.nbytes == weight
    assert rows + 2 * outputs <= largest.activations <= rows + 4 * outputs + 16
    assert largest.logits == 0
    assert meter.peak().total <= largest.total


def test_what_is_freed_before_the_peak_is_not_in_it() -> None:
    meter = MemoryMeter(vocab=999)
    with meter:
        first: Tensor | None = torch.ones(100, 10)
        first = None
        second = torch.ones(50, 10)
    assert first is None and second.nbytes == 2000
    assert meter.peak() == MemoryTable(activations=4000)
    assert dataclasses.replace(meter.peak(), activations=0).total == 0


def test_it_leaves_no_hook_behind(model: PreTrainedModel) -> None:
    _metered(model, _micro([9]))
    model.zero_grad(set_to_none=True)
    assert not [n for n, p in model.named_parameters() if p._backward_hooks]


def test_an_operator_that_fails_is_named_by_what_it_was_to_make() -> None:
    meter = MemoryMeter(vocab=VOCAB)
    with pytest.raises(RuntimeError, match="allocate"), meter:
        torch.ones(1 << 45, 1).expand(-1, VOCAB).clone()
    assert meter.failed_on == "activations"
    with pytest.raises(RuntimeError, match="allocate"), meter:
        torch.ones(1, 1).expand(1 << 45, VOCAB).clone()
    assert meter.failed_on == "logits"
