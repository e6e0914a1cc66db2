"""Several ranks train as one: FSDP2 and DeepSpeed against the torch backend, same batches."""

from typing import Any

import numpy as np
import pytest

from loopwright.actors.objective import LossSettings
from loopwright.actors.packed_forward import Sequences
from loopwright.actors.ranks import Ranks
from loopwright.actors.trainer_backend import TrainerBackend, TrainerSettings, published_tensors
from loopwright.configs.backends import load_backend
from tests.rank_world import RankWorld
from tests.train_batches import build_policy, make_batch


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_policy(tmp_path_factory.mktemp("policy"), vocab_size=301)


def _backend(ranks: Ranks | None, settings: TrainerSettings) -> TrainerBackend:
    backend: TrainerBackend = load_backend("trainer.backend", settings.backend)(settings, ranks)
    return backend


def _trained(
    ranks: Ranks | None, settings: TrainerSettings, steps: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Weights after some steps, and the metrics of the last."""
    backend = _backend(ranks, settings)
    metrics: dict[str, float] = {}
    for step in range(1, steps + 1):
        metrics = backend.train(make_batch(step, seed=step))
    return {n: t.float().numpy().copy() for n, t in published_tensors(backend).items()}, metrics


def _settings(policy: str, **options: Any) -> TrainerSettings:
    defaults: dict[str, Any] = {"lr": 1e-3, "minibatches": 2, "token_budget": 60}
    return TrainerSettings(model_path=policy, **{**defaults, **options})


def _published(settings: TrainerSettings) -> dict[str, Any]:
    return published_tensors(_backend(None, settings))


SMOOTH = LossSettings(loss="reinforce", mismatch="none")
FSDP2: dict[str, Any] = {"backend": "fsdp2", "ranks": 2}


def zero(stage: int, **options: Any) -> dict[str, Any]:
    """Settings of two DeepSpeed ranks."""
    return {
        "backend": "deepspeed",
        "ranks": 2,
        "backend_options": {"zero_stage": stage, **options},
    }


def _assert_same(
    one: tuple[dict[str, np.ndarray], dict[str, float]],
    ranks: list[tuple[dict[str, np.ndarray], dict[str, float]]],
) -> None:
    for weights, metrics in ranks:
        assert weights.keys() == one[0].keys()
        for name, value in one[0].items():
            np.testing.assert_allclose(weights[name], value, atol=1e-5, err_msg=name)
        for name, number in one[1].items():
            if "time/" not in name and "per_s" not in name:
                assert metrics[name] == pytest.approx(number, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 2},
        {"critic": True, "lam": 0.9, "loss": LossSettings(kl="k3", kl_coef=0.1, level="turn")},
        {"lora_rank": 2, "loss": LossSettings(kl="k1", kl_in="reward", mismatch="geometric_is")},
        {"gradient_checkpointing": "on", "logprob_chunk": 7},
        {"loss": LossSettings(level="trajectory")},
        {"loss": LossSettings(loss="gspo"), "pack": True},
    ],
    ids=["plain", "critic, reference", "adapters", "checkpointing", "trajectory", "packed"],
)
def test_fsdp2_on_two_ranks_equals_one_process(
    policy: str, world: RankWorld, options: dict[str, Any]
) -> None:
    one = _trained(None, _settings(policy, **options), 3)
    _assert_same(one, world.run(_trained, _settings(policy, **FSDP2, **options), 3))


@pytest.mark.parametrize(
    "adapter", ["lora", "rslora", "dora", "loha", "lokr", "hra", "miss", "oft"]
)
def test_every_kind_of_adapter_trains_alike_on_two_ranks(
    policy: str, world: RankWorld, adapter: str
) -> None:
    """Twenty updates on a smooth loss; epsilon well above rounding, so that Adam is smooth too."""
    options: dict[str, Any] = {"adapter": adapter, "lora_rank": 4, "eps": 1e-3, "loss": SMOOTH}
    start = {n: t.numpy().copy() for n, t in _published(_settings(policy, **options)).items()}
    one = _trained(None, _settings(policy, **options), 10)
    _assert_same(one, world.run(_trained, _settings(policy, **FSDP2, **options), 10))
    moved = [n for n, value in one[0].items() if np.abs(value - start[n]).max() > 1e-4]
    assert moved and all(name.endswith("_proj.weight") for name in moved)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_zero_on_two_ranks_equals_one_process(
    policy: str, world: RankWorld, stage: int, optimizer: str
) -> None:
    same = {"optimizer": optimizer, "lr": 1e-3 if optimizer == "adamw" else 1e-1}
    one = _trained(None, _settings(policy, **same), 3)
    _assert_same(one, world.run(_trained, _settings(policy, **zero(stage), **same), 3))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["critic, reference, offload", "adapters, checkpointing"])
def test_zero_serves_all_that_a_step_may_ask(
    policy: str, world: RankWorld, stage: int, kind: str
) -> None:
    # adapters: without states and decay, see `FlatOptimizer` on gradients that are all zero
    options: dict[str, Any] = {"lora_rank": 2, "gradient_checkpointing": "on"}
    options |= {"optimizer": "sgd", "lr": 1e-1, "weight_decay": 0.0}
    if kind.startswith("critic"):
        options = {"critic": True, "loss": LossSettings(kl="k3", kl_coef=0.1)}
    one = _trained(None, _settings(policy, **options), 3)
    cut = zero(stage, offload=kind.endswith("offload"))
    _assert_same(one, world.run(_trained, _settings(policy, **cut, **options), 3))


def _after_a_change(ranks: Ranks | None, settings: TrainerSettings) -> tuple[Any, Any]:
    """Logprobs before and after every parameter was doubled from outside."""
    backend = _backend(ranks, settings)
    batch = make_batch()
    sequences = Sequences.of(batch.token_ids, batch.action_mask, batch.lengths)
    before = backend.logprobs(sequences)
    names = [name for name, _ in backend.model.named_parameters()]
    doubled = {name: 2 * tensor.clone() for name, tensor in backend.gather(names).items()}
    backend.scatter(names, lambda name, rows: doubled[name][rows or slice(None)])
    return before, backend.logprobs(sequences)


@pytest.mark.parametrize("more", [FSDP2, zero(1), zero(3)], ids=["fsdp2", "zero1", "zero3"])
def test_changed_parameters_are_used_at_once(
    policy: str, world: RankWorld, more: dict[str, Any]
) -> None:
    before, after = _after_a_change(None, _settings(policy))
    assert np.abs(before - after).max() > 0.1
    for found in world.run(_after_a_change, _settings(policy, **more)):
        np.testing.assert_allclose(found, (before, after), atol=1e-4)
