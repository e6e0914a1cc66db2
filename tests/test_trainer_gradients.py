"""What the trainer does for optimizers beside calling them: gradients that are projected while
backward runs, layers whose scores come from rollouts."""

import numpy as np
import pytest
import torch

from loopwright.actors.packed_forward import Sequences, micro_batches
from loopwright.actors.torch_backend import TorchBackend
from loopwright.algorithms.optimizers.pipeline import SCORE_UNIT, Pipeline
from loopwright.algorithms.records import TrainBatch
from tests.test_trainer_optimizers import _settings
from tests.train_batches import build_policy, make_batch


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_policy(tmp_path_factory.mktemp("policy"), vocab_size=301)


def _backward(backend: TorchBackend, batch: TrainBatch) -> list[str]:
    """Two micro-batches, forward and backward; the names of weights that hold a gradient."""
    sequences = Sequences.of(batch.token_ids, batch.action_mask, batch.lengths)
    for index in range(2):
        (micro,) = micro_batches(
            sequences, np.array([index]), token_budget=64, pack=False, device="cpu"
        )
        backend.backward(backend.forward(micro, temperature=1.0).sum())
    return [n for n, p in backend.model.named_parameters() if p.grad is not None]


def test_gradients_that_are_only_needed_projected_do_not_stay(policy: str) -> None:
    backend = TorchBackend(_settings(policy, "galore"))
    matrices = {
        name
        for name, parameter in backend.model.named_parameters()
        if "layers" in name and parameter.ndim == 2
    }
    assert matrices <= set(_backward(backend, make_batch())), "a basis is due: they are kept whole"
    backend.drop_gradient()
    backend.train(make_batch(1, seed=1))
    assert backend.optimizer.updates == 4  # type: ignore[attr-defined] # no basis due before 6
    assert not matrices & set(_backward(backend, make_batch(2, seed=2)))
    plain = TorchBackend(_settings(policy, "adamw"))
    assert matrices <= set(_backward(plain, make_batch()))


def test_projecting_early_changes_nothing_but_memory(policy: str) -> None:
    """Against the same updates with whole gradients kept."""
    early, late = (TorchBackend(_settings(policy, "galore")) for _ in range(2))
    for parameter in late.model.parameters():
        parameter._post_accumulate_grad_hooks = None  # as without `project_early`
    for step in range(1, 4):
        for backend in (early, late):
            backend.train(make_batch(step, seed=step))
    for (name, found), expected in zip(
        early.model.named_parameters(), late.model.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5, msg=name)


def test_owlore_scores_its_layers_on_the_first_rollouts(policy: str) -> None:
    backend = TorchBackend(_settings(policy, "owlore"))
    optimizer = backend.optimizer
    assert isinstance(optimizer, Pipeline)

    def scores() -> list[float]:
        group = optimizer.param_groups[0]
        return [group[f"layer_score_{k}"] / SCORE_UNIT for k in range(len(optimizer.layers))]

    before = scores()
    with torch.no_grad():  # one weight that stands out, in the second layer alone
        weight = backend.model.get_parameter("model.layers.1.mlp.up_proj.weight")
        weight[0, 0] = 1000.0 * weight.abs().mean()
    backend.train(make_batch(1, seed=1))
    first = scores()
    assert first != before and first[1] > first[0]
    backend.train(make_batch(2, seed=2))
    assert scores() == first, "scored once, before the first update"
