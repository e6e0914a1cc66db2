"""A policy from nothing: its tokenizer keeps values whole, and cloning teaches what was shown."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loopwright.actors.cloning import CloningError, clone
from loopwright.actors.packed_forward import Sequences
from loopwright.actors.tiny_model import TinyModelError, build_tiny_policy, train_tokenizer
from loopwright.actors.torch_backend import TorchBackend
from loopwright.actors.trainer_backend import TrainerSettings, published_tensors

TEXTS = ['contacts.find(name="Ana") -> {"id": 17, "at": "09:30"}\n', "Who is Ana? Ask Bo."] * 5


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=400)


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_a_value_is_the_same_token_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    for value in ("Ana", "17", "contacts.find"):
        whole = _tokens(tokenizer, value)
        assert len(whole) == 1
        for text in (f'"{value}"', f" {value}", f"={value}", f"({value}, ", f"\n{value}"):
            assert whole[0] in _tokens(tokenizer, text), text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_decodes_to_itself(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(_tokens(tokenizer, text)) == text


def test_the_chat_template_spends_two_tokens_a_message(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "Ana"}, {"role": "assistant", "content": "17"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert len(_tokens(tokenizer, text)) == 3 + 3 + 1
    function = {"name": "f.g", "parameters": {"properties": {"a": {}, "b": {}}}}
    tools = [{"type": "function", "function": function}]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert text.startswith("<|system|>f.g(a, b)\n<|im_end|><|user|>Ana<|im_end|>")


def test_a_built_policy_loads_and_depends_on_its_seed_alone(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16}
    checksums = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = build_tiny_policy(TEXTS, tmp_path / name, vocab_size=300, seed=seed, **sizes)
        backend = TorchBackend(TrainerSettings(model_path=str(folder)))
        weight = published_tensors(backend)["model.embed_tokens.weight"]
        checksums.append(float(weight.double().sum()))
        assert len(AutoTokenizer.from_pretrained(folder)) == weight.shape[0] <= 300
    assert checksums[0] == checksums[1] != checksums[2]


def test_sizes_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TinyModelError, match="heads=3"):
        build_tiny_policy(TEXTS, tmp_path, hidden_size=128, heads=3)
    with pytest.raises(TinyModelError, match="vocab_size=100"):
        train_tokenizer(TEXTS, vocab_size=100)
    with pytest.raises(TinyModelError, match="no text"):
        train_tokenizer([], vocab_size=400)


@dataclass(frozen=True)
class Shown:
    token_ids: np.ndarray
    action_mask: np.ndarray


def _copies(values: range) -> list[Shown]:
    """ "Say n": the answer repeats the value and ends."""
    mask = np.array([False, False, True, True])
    return [Shown(np.array([1, v, v, 2], dtype=np.int32), mask) for v in values]


def test_cloning_learns_the_action_tokens_and_leaves_the_rest(tmp_path: Path) -> None:
    start = build_tiny_policy(
        TEXTS, tmp_path / "start", hidden_size=32, layers=1, heads=2, kv_heads=1,
        intermediate_size=32, vocab_size=300,
    )  # fmt: skip
    seen: list[tuple[int, float]] = []
    report = clone(
        str(start), _copies(range(10, 20)), tmp_path / "out", steps=60, batch=5, lr=1e-2,
        progress=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert [step for step, _ in seen] == list(range(1, 61))
    assert report.loss_last < 0.5 * report.loss_first
    assert (report.demonstrations, report.action_tokens) == (10, 60 * 5 * 2)
    backend = TorchBackend(TrainerSettings(model_path=str(tmp_path / "out")))
    shown = _copies(range(10, 20))
    joined = Sequences.of(
        np.concatenate([s.token_ids for s in shown]),
        np.concatenate([s.action_mask for s in shown]),
        np.full(len(shown), 4),
    )
    assert -backend.logprobs(joined)[joined.action_mask].mean() < 0.5 * report.loss_first


def test_nothing_to_clone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CloningError, match="no demonstrations"):
        clone("anywhere", [], tmp_path, steps=1)
