"""The trainer: gradients that depend on nothing but the minibatch, exact resume, publishing,
guards.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from loopwright.actors.model_files import ModelError
from loopwright.actors.objective import LossSettings, ObjectiveError
from loopwright.actors.packed_forward import (
    ForwardError,
    Sequences,
    action_logprobs,
    check_model,
    micro_batches,
)
from loopwright.actors.policy_step import NON_FINITE_LIMIT
from loopwright.actors.shared_memory import attach
from loopwright.actors.torch_backend import TorchBackend
from loopwright.actors.trainer import Trainer, TrainerError
from loopwright.actors.trainer_backend import (
    BackendError,
    TrainerSettings,
    learning_rate,
    published_tensors,
)
from loopwright.actors.weights import manifest_checksums, verify
from loopwright.algorithms.optimizers import OptimizerError
from loopwright.algorithms.records import TrainBatch, encode
from tests.train_batches import build_policy, make_batch


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_policy(tmp_path_factory.mktemp("policy"))


def _sequences(batch: TrainBatch) -> Sequences:
    return Sequences.of(batch.token_ids, batch.action_mask, batch.lengths)


def _weights_after(settings: TrainerSettings, batch: TrainBatch) -> dict[str, torch.Tensor]:
    backend = TorchBackend(settings)
    backend.train(batch)
    return {name: t.clone() for name, t in published_tensors(backend).items()}


def _gradients(settings: TrainerSettings, batch: TrainBatch) -> dict[str, torch.Tensor]:
    """The gradient of the batch as one minibatch: what plain SGD with rate 1 takes off."""
    descent = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0, "grad_clip": 0.0}
    backend = TorchBackend(dataclasses.replace(settings, minibatches=1, **descent))
    before = {n: p.detach().clone() for n, p in backend.model.named_parameters()}
    backend.train(batch)
    return {n: before[n] - p.detach() for n, p in backend.model.named_parameters()}


def _assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=2e-6, rtol=1e-4, msg=f"{name} differs")


def test_packed_padded_and_single_rows_give_the_same_logprobs(policy: str) -> None:
    sequences = _sequences(make_batch())

    def logprobs(**options: Any) -> np.ndarray:
        return TorchBackend(
            TrainerSettings(model_path=policy, temperature=0.8, **options)
        ).logprobs(sequences)

    single, padded = logprobs(token_budget=1), logprobs(token_budget=90)
    packed = logprobs(token_budget=90, pack=True)
    chunked = logprobs(token_budget=90, logprob_chunk=7)
    for other in (padded, packed, chunked):
        np.testing.assert_allclose(other, single, atol=1e-5)
    rows = micro_batches(sequences, np.arange(8), token_budget=90, pack=True)
    assert any(micro.mask is not None for micro in rows)


def test_logprobs_are_those_of_the_whole_hugging_face_model(policy: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    ids = np.arange(20, dtype=np.int32)
    trainer = Trainer(TrainerSettings(model_path=policy, temperature=0.7), "probe")
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1]
    picked = torch.arange(19), torch.arange(1, 20)
    at_one, in_training = (torch.log_softmax(logits / t, -1)[picked].numpy() for t in (1.0, 0.7))
    np.testing.assert_allclose(trainer.probe(ids), at_one, atol=1e-5)
    whole = Sequences.of(ids, np.arange(20) > 0, np.array([20]))
    np.testing.assert_allclose(trainer.backend.logprobs(whole)[1:], in_training, atol=1e-5)


def test_a_model_that_scales_its_logits_is_refused(policy: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    check_model(model)
    model.register_forward_hook(_double_logits)
    with pytest.raises(ForwardError, match="scales or caps"):
        check_model(model)


def _double_logits(_model: Any, _inputs: Any, output: Any) -> Any:
    output.logits = output.logits * 2
    return output


def test_chunked_logprobs_have_the_same_gradient(policy: str) -> None:
    gradients = []
    for chunk in (4096, 5):
        backend = TorchBackend(TrainerSettings(model_path=policy))
        for micro in micro_batches(_sequences(make_batch()), np.arange(8), token_budget=200):
            action_logprobs(backend.model, micro, temperature=1.0, chunk=chunk).sum().backward()
        gradients.append(
            {n: p.grad for n, p in backend.model.named_parameters() if p.grad is not None}
        )
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], atol=1e-4, rtol=1e-4)


OF_SEQUENCES = ("lengths", "rollout_ids", "rewards", "advantages")
LOSSES = [
    LossSettings(),
    LossSettings(level="turn"),
    LossSettings(level="trajectory"),
    LossSettings(loss="gspo"),
    LossSettings(loss="aipo"),
    LossSettings(loss="cispo", mismatch="masked_is"),
    LossSettings(aggregation="token_mean"),
    LossSettings(loss="decoupled", level="turn", aggregation="fixed_length"),
    LossSettings(mismatch="sequence_is", mismatch_cap=50.0),
    LossSettings(mismatch="geometric_mask", aggregation="sequence_mean"),
    LossSettings(kl="k3", kl_coef=0.5),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda s: f"{s.loss}-{s.level}-{s.aggregation}")
def test_the_gradient_does_not_depend_on_micro_batches(policy: str, loss: LossSettings) -> None:
    batch = make_batch(contexts=2)
    settings = TrainerSettings(model_path=policy, proximal="behavior", loss=loss, seed=1)
    whole = _gradients(dataclasses.replace(settings, token_budget=100_000), batch)
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-4
    _assert_close(whole, _gradients(dataclasses.replace(settings, token_budget=30), batch))
    packed = dataclasses.replace(settings, token_budget=60, pack=True)
    _assert_close(whole, _gradients(packed, batch))


def test_the_gradient_does_not_depend_on_the_order_of_sequences(policy: str) -> None:
    batch = make_batch(contexts=2)
    order = np.random.default_rng(3).permutation(len(batch.lengths))
    parts = np.split(np.arange(len(batch.token_ids)), np.cumsum(batch.lengths)[:-1])
    places = np.concatenate([parts[i] for i in order])
    names = ("token_ids", "action_mask", "behavior_logprobs", "policy_versions", "turn_ids")
    shuffled = dataclasses.replace(
        batch,
        **{name: getattr(batch, name)[places] for name in names},
        **{n: getattr(batch, n)[order] for n in OF_SEQUENCES},
    )
    settings = TrainerSettings(model_path=policy)
    _assert_close(_gradients(settings, batch), _gradients(settings, shuffled))


def test_two_ranks_add_up_to_one(policy: str) -> None:
    """Rollouts dealt to two ranks, each dividing by the constant of both: gradients sum to one
    rank's.
    """
    batch = make_batch(rollouts=6)
    whole = _gradients(TrainerSettings(model_path=policy), batch)
    halves = []
    for keep in (batch.rollout_ids < 1, batch.rollout_ids >= 1):  # very different token counts
        places = np.repeat(keep, batch.lengths)
        names = ("token_ids", "action_mask", "behavior_logprobs", "policy_versions", "turn_ids")
        part = dataclasses.replace(
            batch,
            **{name: getattr(batch, name)[places] for name in names},
            **{n: getattr(batch, n)[keep] for n in OF_SEQUENCES},
        )
        halves.append(_gradients(TrainerSettings(model_path=policy), part))
    _assert_close(whole, {name: halves[0][name] + halves[1][name] for name in whole})


def test_gradient_checkpointing_changes_nothing(policy: str) -> None:
    settings = TrainerSettings(model_path=policy)
    plain = _gradients(settings, make_batch())
    kept = dataclasses.replace(settings, gradient_checkpointing="on")
    _assert_close(plain, _gradients(kept, make_batch()))
    assert TorchBackend(kept).model.training and not TorchBackend(settings).model.training


def test_the_first_gradient_is_that_of_advantage_times_logprob(policy: str) -> None:
    """At ratio 1 the PPO gradient is REINFORCE's: written out here by hand, without units or
    weights.
    """
    batch = make_batch()
    found = _gradients(
        TrainerSettings(model_path=policy, loss=LossSettings(mismatch="none")), batch
    )
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    loss = torch.zeros(())
    starts = np.cumsum(batch.lengths) - batch.lengths
    for start, length, advantage in zip(starts, batch.lengths, batch.advantages, strict=True):
        ids = torch.from_numpy(batch.token_ids[start : start + length].astype(np.int64))
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1], -1)
        chosen = logprobs[torch.arange(length - 1), ids[1:]]
        mask = torch.from_numpy(batch.action_mask[start + 1 : start + length])
        loss = loss - float(advantage) * chosen[mask].mean() / batch.rollout_count
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    _assert_close(expected, found)


def test_training_raises_what_was_better_than_the_others(policy: str) -> None:
    backend = TorchBackend(TrainerSettings(model_path=policy, lr=1e-3))
    batch = make_batch()
    before = backend.logprobs(_sequences(batch))
    metrics = backend.train(batch)
    gained = (backend.logprobs(_sequences(batch)) - before) * np.repeat(
        batch.advantages, batch.lengths
    )
    assert gained[batch.action_mask].mean() > 0
    assert metrics["train/optimizer_steps"] == 4
    assert metrics["train/mismatch_abs_mean"] == pytest.approx(
        float(np.abs(before - batch.behavior_logprobs)[batch.action_mask].mean()), rel=1e-4
    )


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_resume_is_bit_equal(policy: str, tmp_path: Path, lora_rank: int) -> None:
    settings = TrainerSettings(
        model_path=policy, minibatches=2, epochs=2, schedule="cosine", warmup_steps=1,
        total_steps=5,
        lora_rank=lora_rank, lr=1e-3,
    )  # fmt: skip
    batches = [encode(make_batch(step, seed=step)) for step in range(1, 5)]
    straight = Trainer(settings, "straight")
    for step in range(1, 5):
        straight.step(step, batches[step - 1])
    first = Trainer(settings, "first")
    for step in (1, 2):
        first.step(step, batches[step - 1])
    first.save(str(tmp_path / "checkpoint"))
    second = Trainer(settings, "second")
    assert second.load(str(tmp_path / "checkpoint")) == 2
    for step in (3, 4):
        second.step(step, batches[step - 1])
    assert second.weights_checksum() == straight.weights_checksum() != first.weights_checksum()


def test_a_checkpoint_is_a_hugging_face_model_with_its_tokenizer(
    policy: str, tmp_path: Path
) -> None:
    for rank in (0, 2):
        trainer = Trainer(TrainerSettings(model_path=policy, lora_rank=rank, lr=1e-2), "saved")
        trainer.step(1, encode(make_batch()))
        trainer.save(str(tmp_path / str(rank)))
        again = Trainer(TrainerSettings(model_path=str(tmp_path / str(rank))), "again")
        ids = np.arange(12, dtype=np.int32)
        np.testing.assert_allclose(again.probe(ids), trainer.probe(ids), atol=1e-5)
        assert (tmp_path / str(rank) / "tokenizer.json").is_file()


def test_published_weights_are_the_trainers_own(policy: str) -> None:
    trainer = Trainer(TrainerSettings(model_path=policy), "published")
    try:
        trainer.step(1, encode(make_batch()))
        manifest = trainer.publish(1)
        tensors = attach(manifest)
        verify(tensors, manifest_checksums(manifest))
        assert torch.equal(tensors["model.norm.weight"], trainer.backend.model.model.norm.weight)
        assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
        names = set(AutoModelForCausalLM.from_pretrained(policy).state_dict())
        assert set(manifest.names) == names
    finally:
        trainer.close()


def test_lora_trains_adapters_only_and_publishes_full_weights(policy: str) -> None:
    plain = TorchBackend(TrainerSettings(model_path=policy))
    backend = TorchBackend(TrainerSettings(model_path=policy, lora_rank=2, lr=1e-2))
    start = published_tensors(backend)
    _assert_close(published_tensors(plain), start)
    backend.train(make_batch())
    after = published_tensors(backend)
    changed = {name for name in after if not torch.equal(after[name], start[name])}
    assert changed and all(name.endswith("_proj.weight") for name in changed)


def test_a_step_out_of_order_is_refused(policy: str) -> None:
    trainer = Trainer(TrainerSettings(model_path=policy), "order")
    trainer.step(1, encode(make_batch(1)))
    checksum = trainer.weights_checksum()
    for step in (1, 3):
        with pytest.raises(TrainerError, match=f"step {step}.*next is 2"):
            trainer.step(step, encode(make_batch(step)))
    with pytest.raises(TrainerError, match="step 2: got a TrainBatch of step 1"):
        trainer.step(2, encode(make_batch(1)))
    assert trainer.weights_checksum() == checksum


def test_minibatches_that_are_not_finite_are_skipped_and_then_fail(policy: str) -> None:
    backend = TorchBackend(TrainerSettings(model_path=policy, minibatches=1))
    lost = np.full(8, np.nan, dtype=np.float32)
    before = {n: t.clone() for n, t in published_tensors(backend).items()}
    for step in range(1, NON_FINITE_LIMIT + 1):
        broken = dataclasses.replace(
            make_batch(step), advantages=np.full(8, np.nan, dtype=np.float32)
        )
        assert backend.train(broken)["train/skipped_minibatches"] == 1
    for name, value in published_tensors(backend).items():
        assert torch.equal(value, before[name]), name
    broken = dataclasses.replace(make_batch(21), advantages=lost)
    with pytest.raises(BackendError, match="21 minibatches were not finite"):
        backend.train(broken)


def test_a_policy_far_from_the_proximal_one_ends_the_step(policy: str) -> None:
    settings = TrainerSettings(model_path=policy, proximal="behavior", epochs=3)
    backend = TorchBackend(settings)
    before = {n: t.clone() for n, t in published_tensors(backend).items()}
    metrics = backend.train(make_batch(logprob=-30.0))
    assert metrics["train/stopped_early"] == 1 and metrics["train/optimizer_steps"] == 0
    assert metrics["train/log_ratio_sum_max"] > 20
    for name, value in published_tensors(backend).items():
        assert torch.equal(value, before[name]), name


def test_an_empty_batch_changes_nothing_but_the_step(policy: str) -> None:
    backend = TorchBackend(TrainerSettings(model_path=policy))
    empty = dataclasses.replace(
        make_batch(),
        token_ids=np.zeros(0, np.int32), action_mask=np.zeros(0, bool),
        behavior_logprobs=np.zeros(0, np.float32), policy_versions=np.zeros(0, np.int32),
        turn_ids=np.zeros(0, np.int16), lengths=np.zeros(0, np.int32),
        rollout_ids=np.zeros(0, np.int32), rewards=np.zeros(0, np.float32),
        advantages=np.zeros(0, np.float32),
    )  # fmt: skip
    metrics = backend.train(empty)
    assert metrics["train/optimizer_steps"] == 0 and backend.step == 1


def test_the_same_settings_and_batch_give_the_same_bits(policy: str) -> None:
    settings = TrainerSettings(model_path=policy, seed=7)
    first, second = (_weights_after(settings, make_batch()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = _weights_after(dataclasses.replace(settings, seed=8), make_batch())
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_learning_rate_warms_up_and_decays() -> None:
    settings = TrainerSettings(
        model_path="", lr=1.0, warmup_steps=2, total_steps=6, schedule="linear"
    )
    rates = [learning_rate(settings, step) for step in range(1, 8)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    cosine = dataclasses.replace(settings, schedule="cosine")
    assert learning_rate(cosine, 5) == pytest.approx(0.5)
    constant = dataclasses.replace(settings, schedule="constant", warmup_steps=0)
    assert [learning_rate(constant, step) for step in (1, 100)] == [1.0, 1.0]


def test_what_cannot_be_trained_is_refused_with_the_reason(policy: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config.json there"):
        TorchBackend(TrainerSettings(model_path=str(tmp_path / "nowhere")))
    with pytest.raises(OptimizerError, match=r"write_back='plain'.*loses every update"):
        plain = {"write_back": "plain"}
        TorchBackend(
            TrainerSettings(model_path=policy, dtype="bfloat16", lr=1e-6, optimizer_options=plain)
        )
    with pytest.raises(BackendError, match="proximal='old'"):
        TrainerSettings(model_path=policy, proximal="old")  # type: ignore[arg-type]
    with pytest.raises(ObjectiveError, match="level='turn'"):
        LossSettings(loss="aipo", level="turn")
    with pytest.raises(BackendError, match=r"no trainer_state/numbers\.json"):
        Trainer(TrainerSettings(model_path=policy), "load").load(policy)
    with pytest.raises(ForwardError, match="begins with an action token"):
        Sequences.of(np.zeros(3, np.int32), np.ones(3, bool), np.array([3]))
