"""The trace on paper against the same passes with memory, and against published sizes."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from loopwright.actors.known_models import KNOWN, model_config
from loopwright.actors.lora import add_adapters
from loopwright.actors.memory_meter import MemoryMeter
from loopwright.actors.memory_trace import Adapters, Work, parameters, trace, trace_whole
from loopwright.actors.model_files import ModelError
from loopwright.actors.packed_forward import Sequences, action_logprobs, micro_batches
from loopwright.actors.recompute import keep_less
from loopwright.algorithms.memory_model import MemoryTable

WORK = Work(rows=3, columns=48, chunk=50)


def _config(layers: int = 2) -> Any:
    return Qwen3Config(
        vocab_size=301,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    )


def _with_memory(config: Any, work: Work) -> MemoryTable:
    """The same two micro-batches on real tensors."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(getattr(torch, work.dtype)).eval()
    keep_less(model, work.checkpointing)
    if work.adapters.rank:
        model = add_adapters(
            model,
            kind="lora",
            rank=work.adapters.rank,
            alpha=work.adapters.alpha,
            targets="all-linear",
        )
    mask = np.ones(work.tokens, dtype=bool)
    mask[:: work.columns] = False
    lengths = np.full(work.rows, work.columns)
    sequences = Sequences.of(np.arange(work.tokens) % 301, mask, lengths)
    (micro,) = micro_batches(sequences, np.arange(work.rows), token_budget=work.tokens)
    meter = MemoryMeter(vocab=301)
    for meter in (MemoryMeter(vocab=301), MemoryMeter(vocab=301)):
        meter.hold("weights", (*model.parameters(), *model.buffers()))
        meter.hold("gradients", [p.grad for p in model.parameters() if p.grad is not None])
        with meter, meter.gradients_of(model.parameters()):
            loss = action_logprobs(model, micro, temperature=1.0, chunk=work.chunk).sum()
            with meter.phase("backward"):
                loss.backward()
    return meter.peak()


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "rank"),
    [("float32", "off", 0), ("float32", "on", 4), ("bfloat16", "off", 4), ("bfloat16", "on", 0)],
)
def test_paper_agrees_with_memory(dtype: str, checkpointing: Any, rank: int) -> None:
    work = dataclasses.replace(
        WORK, dtype=dtype, checkpointing=checkpointing, adapters=Adapters(rank=rank)
    )
    found, expected = trace(_config(), work).peak, _with_memory(_config(), work)
    assert found.total == pytest.approx(expected.total, rel=0.03)
    assert found.weights == pytest.approx(expected.weights, rel=0.01)
    assert found.gradients == pytest.approx(expected.gradients, rel=0.01)


@pytest.mark.parametrize("checkpointing", ["off", "on", "offload"])
def test_many_layers_are_extrapolated_from_few(checkpointing: Any) -> None:
    work = dataclasses.replace(WORK, checkpointing=checkpointing)
    few, whole = trace(_config(7), work), trace_whole(_config(7), work)
    assert few.peak.total == pytest.approx(whole.peak.total, rel=0.01)
    assert few.largest.activations == pytest.approx(whole.largest.activations, rel=0.01)


def test_each_mode_keeps_less_than_the_one_before() -> None:
    sizes = [
        trace(_config(7), dataclasses.replace(WORK, checkpointing=mode)).peak.activations
        for mode in ("off", "on", "offload")
    ]
    assert sizes == sorted(sizes, reverse=True)
    kept = 7 * WORK.tokens * 64 * 4  # one hidden state a layer
    assert sizes[1] - sizes[2] == pytest.approx(kept, rel=0.15)


def test_adapters_are_what_is_trained() -> None:
    plain, adapted = parameters(_config(), Adapters()), parameters(_config(), Adapters(rank=4))
    assert not plain.frozen and plain.count == plain.trained_count
    assert adapted.count - adapted.trained_count == plain.count
    assert all("lora_" in name for name in adapted.trained)


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_have_the_published_number_of_parameters(name: str) -> None:
    found = parameters(model_config(f"publisher/{name.lower()}"), Adapters())
    assert found.count == KNOWN[name].parameters
    blocks = model_config(name).num_hidden_layers * found.largest_block
    assert blocks + found.outside_blocks == found.count


def test_what_is_no_causal_language_model_is_refused(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="'vit', which is no causal language model"):
        model_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="no config that can be read"):
        model_config(str(tmp_path / "config.json"))
    with pytest.raises(ModelError, match="no such file or folder"):
        model_config("./nowhere")


def test_a_local_config_is_read(tmp_path: Any) -> None:
    _config().save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert model_config(str(path)).hidden_size == 64
