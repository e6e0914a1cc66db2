"""The value head and the reference policy inside the trainer: what they learn, cost and survive."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from loopwright.actors.critic import Critic, Share
from loopwright.actors.objective import LossSettings
from loopwright.actors.packed_forward import Sequences
from loopwright.actors.policy_model import load_reference
from loopwright.actors.ranks import Ranks
from loopwright.actors.tiny_model import build_tiny_policy
from loopwright.actors.torch_backend import TorchBackend
from loopwright.actors.trainer import Trainer
from loopwright.actors.trainer_backend import TrainerSettings, published_tensors
from loopwright.algorithms.records import TrainBatch, encode


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    shape: dict[str, Any] = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1}
    shape |= {"intermediate_size": 48, "vocab_size": 300, "max_context": 128}
    build_tiny_policy(["find Ana = 17 ."] * 3, folder, **shape)
    return str(folder)


def _batch(step: int = 1, *, rollouts: int = 12) -> TrainBatch:
    """Rollouts of three turns of two tokens; the reward is 1 where a prompt begins with token 7."""
    lengths = np.full(rollouts, 10, dtype=np.int32)
    random = np.random.default_rng(0)
    tokens = random.integers(20, 60, (rollouts, 10)).astype(np.int32)
    tokens[:, 0] = np.where(np.arange(rollouts) % 2 == 0, 7, 8)
    mask = np.tile(np.array([0, 1, 1, 0, 1, 1, 0, 0, 1, 1], dtype=bool), rollouts)
    turns = np.tile(np.array([-1, 0, 0, -1, 1, 1, -1, -1, 2, 2], dtype=np.int16), rollouts)
    return TrainBatch(
        step=step,
        token_ids=tokens.reshape(-1),
        action_mask=mask,
        behavior_logprobs=np.where(mask, -5.5, 0).astype(np.float32),
        policy_versions=np.where(mask, step - 1, -1).astype(np.int32),
        turn_ids=turns,
        lengths=lengths,
        rollout_ids=np.arange(rollouts, dtype=np.int32),
        rewards=(tokens[:, 0] == 7).astype(np.float32),
        advantages=np.zeros(rollouts, dtype=np.float32),
        rollout_count=rollouts,
    )


def _settings(policy: str, **more: Any) -> TrainerSettings:
    base: dict[str, Any] = {"critic": True, "value_lr": 2e-2, "lr": 1e-5, "minibatches": 2}
    return TrainerSettings(model_path=policy, **(base | more))


@pytest.mark.parametrize("level", ["token", "turn", "trajectory"])
def test_the_value_head_learns_which_states_are_worth_something(policy: str, level: str) -> None:
    loss = LossSettings(level=level)  # type: ignore[arg-type]
    backend = TorchBackend(_settings(policy, epochs=2, loss=loss))
    found = [backend.train(_batch(step)) for step in range(1, 16)]
    assert found[0]["value/explained_variance"] == pytest.approx(0.0, abs=1e-6)  # it says 0
    assert found[0]["value/mean"] == 0 and found[0]["value/return_mean"] == 0.5
    assert found[-1]["value/explained_variance"] > 0.8
    assert found[-1]["value/loss"] < found[0]["value/loss"] / 4
    assert found[-1]["time/train_critic_s"] > 0


def test_without_a_critic_there_are_no_metrics_of_one(policy: str) -> None:
    metrics = TorchBackend(_settings(policy, critic=False)).train(_batch())
    assert not [name for name in metrics if name.startswith("value/")]


def test_the_critic_never_moves_the_policy(policy: str) -> None:
    """The policy's update depends on the advantages, not on how fast the head learns."""
    weights = []
    for value_lr in (1e-3, 1e-1):
        backend = TorchBackend(_settings(policy, value_lr=value_lr))
        backend.train(_batch())
        weights.append({n: t.clone() for n, t in published_tensors(backend).items()})
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_resume_with_a_critic_is_bit_equal(policy: str, tmp_path: Path) -> None:
    settings = _settings(policy, lr=1e-3)
    straight, stopped = Trainer(settings, "critic-a"), Trainer(settings, "critic-b")
    for trainer in (straight, stopped):
        trainer.step(1, encode(_batch(1)))
    stopped.save(str(tmp_path))
    resumed = Trainer(settings, "critic-c")
    assert resumed.load(str(tmp_path)) == 1
    expected, found = (t.step(2, encode(_batch(2))) for t in (straight, resumed))
    same = ("value/explained_variance", "value/loss", "value/mean", "train/loss")
    assert [expected[k] for k in same] == [found[k] for k in same] and found["value/mean"] != 0
    assert straight.weights_checksum() == resumed.weights_checksum()


class _TwoRanks(Ranks):
    """A rank of two that are threads of this process: sums meet at a barrier."""

    meeting = threading.Barrier(2, timeout=30)
    brought: ClassVar[dict[int, np.ndarray]] = {}

    def sum(self, values: np.ndarray) -> np.ndarray:
        """As of two processes."""
        self.brought[self.rank] = values
        self.meeting.wait()
        total = self.brought[0] + self.brought[1]
        self.meeting.wait()
        return total


def test_two_ranks_fit_the_same_head_as_one() -> None:
    random = torch.Generator().manual_seed(1)
    states, targets = torch.randn(7, 8, generator=random), torch.rand(7, generator=random)
    minibatches = [np.array([0, 5, 2]), np.array([1, 3, 4, 6]), np.array([6])]

    # made one after the other: threads share torch's random state
    critics = [Critic(8, lr=1e-2, seed=3, device="cpu") for _ in range(3)]

    def fitted(critic: Critic, units: np.ndarray, ranks: Ranks) -> Critic:
        share = Share(
            total=7,
            units=units,
            states=states[units],
            before=torch.zeros(len(units)),
            targets=targets[units],
        )
        for _ in range(3):
            critic.fit(share, minibatches, ranks)
        return critic

    with ThreadPoolExecutor(2) as threads:
        parts = [np.array([5, 0, 1]), np.array([2, 3, 4, 6])]
        both = [
            threads.submit(fitted, critics[r], parts[r], _TwoRanks(rank=r, size=2)) for r in (0, 1)
        ]
        halves = [future.result(timeout=60) for future in both]
    whole = fitted(critics[2], np.arange(7), Ranks())
    for half in halves:
        for one, two in zip(whole.head.parameters(), half.head.parameters(), strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    assert float(whole.values(states).detach().abs().max()) > 0.01, (
        "nothing was learned: a weak test"
    )


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_reference_stays_where_training_began(policy: str, lora_rank: int) -> None:
    loss = LossSettings(kl="k3", kl_coef=0.1)
    settings = _settings(policy, critic=False, loss=loss, lora_rank=lora_rank, lr=1e-2)
    backend = TorchBackend(settings)
    batch = dataclasses.replace(
        _batch(), advantages=np.random.default_rng(0).normal(size=12).astype(np.float32)
    )
    sequences = Sequences.of(batch.token_ids, batch.action_mask, batch.lengths)
    began = backend.logprobs(sequences)
    for step in (1, 2):
        metrics = backend.train(dataclasses.replace(batch, step=step))
    now = backend.logprobs(sequences)
    with backend.reference():
        np.testing.assert_array_equal(backend.logprobs(sequences), began)
    np.testing.assert_array_equal(backend.logprobs(sequences), now)
    gap = (began - now)[batch.action_mask]
    assert np.abs(gap).max() > 0.01 and metrics["train/kl_reference_mean"] > 0


def test_lora_needs_no_second_model_for_its_reference(policy: str) -> None:
    penalty = LossSettings(kl="k3")
    assert load_reference(_settings(policy, lora_rank=2, loss=penalty), device="cpu") is None
    assert load_reference(_settings(policy), device="cpu") is None
    copy = load_reference(_settings(policy, loss=penalty), device="cpu")
    assert copy is not None and not any(p.requires_grad for p in copy.parameters())


@pytest.mark.parametrize(("kl", "kl_in"), [("k2", "loss"), ("k1", "reward")])
def test_a_kl_penalty_pulls_back_to_the_reference(policy: str, kl: str, kl_in: str) -> None:
    """From a policy that has moved away, steps on rewards that teach nothing go back. With one
    token a rollout, k1 in the reward has the gradient of k2 in the loss, whoever sampled."""
    loss = LossSettings(kl=kl, kl_coef=1.0, kl_in=kl_in)  # type: ignore[arg-type]
    backend = TorchBackend(_settings(policy, critic=False, loss=loss, lr=3e-3, minibatches=1))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backend.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=random)
    batch = _batch(rollouts=32)
    last = np.tile(np.arange(10) == 9, 32)
    batch = dataclasses.replace(batch, action_mask=last)
    sequences = Sequences.of(batch.token_ids, batch.action_mask, batch.lengths)
    with backend.reference():
        reference = backend.logprobs(sequences)
    gaps = []
    for step in range(1, 6):
        lp = backend.logprobs(sequences)
        gaps.append(float(((lp - reference)[last] ** 2).mean()))
        backend.train(dataclasses.replace(batch, step=step, behavior_logprobs=lp))
    assert gaps[-1] < 0.7 * gaps[0]
