"""Several ranks train as one: FSDP2 and DeepSpeed against the torch backend, same batches."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from loopwright.actors.objective import LossSettings
from loopwright.actors.ranks import Ranks
from loopwright.actors.trainer_backend import TrainerBackend, TrainerSettings, published_tensors
from loopwright.configs.backends import load_backend
from tests.rank_world import RankWorld
from tests.train_batches import build_policy, make_batch


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_policy(tmp_path_factory.mktemp("policy"), vocab_size=301)


@pytest.fixture(scope="module")
def world() -> Iterator[RankWorld]:
    with RankWorld(2) as world:
        yield world


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


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 2},
        {"critic": True, "lam": 0.9, "loss": LossSettings(kl="k3", kl_coef=0.1, level="turn")},
        {"lora_rank": 2, "loss": LossSettings(kl="k1", kl_in="reward", mismatch="geometric_is")},
    ],
    ids=["plain", "critic and reference", "adapters off"],
)
def test_two_ranks(policy: str, world: RankWorld, options: dict[str, Any]) -> None:
    one, metrics = _trained(None, _settings(policy, **options), 3)
    for two, same in world.run(_trained, _settings(policy, **options, backend="fsdp2", ranks=2), 3):
        for name, value in one.items():
            np.testing.assert_allclose(two[name], value, atol=1e-5, err_msg=name)
        for name, value in metrics.items():
            if "time" not in name and "per_s" not in name:
                assert same[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
