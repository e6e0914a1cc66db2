"""Every optimizer in the trainer: two ranks as one process, and resumed as if never stopped."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopwright.actors import checkpoint
from loopwright.actors.objective import LossSettings
from loopwright.actors.ranks import Ranks
from loopwright.actors.trainer_backend import (
    BackendError,
    TrainerBackend,
    TrainerSettings,
    published_tensors,
)
from loopwright.algorithms.optimizers import METHODS, OptimizerError
from loopwright.configs.backends import load_backend
from tests.rank_world import RankWorld
from tests.train_batches import build_policy, make_batch

UPDATES_A_STEP = 4
# so that twenty updates see several refreshes, resets and choices of layers
OFTEN = {"rank": 4, "gap": 6, "reset_every": 7, "switch_every": 3, "warmup": 3, "layers": 1}
# so that a rounding error stays one: no quantised states, Adam smooth where gradients vanish
SMOOTH = {"embeddings": "fp32", "eps": 1e-3, "state": "fp32"}
# A gradient near zero may have either sign, and the slope of MeZO is a difference of near equals.
RATES = {"signsgd": 4e-6, "lion": 4e-6, "muon": 1e-4, "mezo": 1e-6, "sparse_mezo": 1e-6}
BY_LOSS = [name for name, method in METHODS.items() if method.forward_only]
SHARDED = [name for name, method in METHODS.items() if method.fsdp2]
FSDP2: dict[str, Any] = {"backend": "fsdp2", "ranks": 2}
ZERO: dict[str, Any] = {
    stage: {"backend": "deepspeed", "ranks": 2, "backend_options": {"zero_stage": stage}}
    for stage in (1, 2, 3)
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_policy(tmp_path_factory.mktemp("policy"), vocab_size=301)


def _settings(policy: str, optimizer: str, **more: Any) -> TrainerSettings:
    known = METHODS[optimizer].defaults
    options = {k: v for k, v in {**OFTEN, **SMOOTH}.items() if k in known}
    eps = options.pop("eps", 1e-3) if optimizer == "adamw" else 1e-3
    if optimizer in BY_LOSS:
        del options["eps"]  # there the size of a perturbation
    adapters = {"lora_rank": 4} if optimizer == "low_rank_restarts" else {}
    settings = TrainerSettings(
        model_path=policy,
        optimizer=optimizer,
        optimizer_options=options,
        lr=RATES.get(optimizer, 1e-3),
        eps=eps,
        minibatches=UPDATES_A_STEP,
        loss=LossSettings(loss="reinforce", mismatch="none"),
        **adapters,
    )
    return dataclasses.replace(settings, **more)


def _run(
    ranks: Ranks | None, settings: TrainerSettings, first: int, last: int, start: str, end: str
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Steps `first` to `last` from the checkpoint `start` (empty: the model), saved to `end` where
    that is not empty; the weights, and how many optimizer steps each step took."""
    build = load_backend("trainer.backend", settings.backend)
    backend: TrainerBackend = build(settings, ranks)
    if start:
        checkpoint.load(backend, Path(start))
    taken = [
        backend.train(make_batch(step, seed=step))["train/optimizer_steps"]
        for step in range(first, last + 1)
    ]
    if end:
        checkpoint.save(backend, Path(end))
    return {n: t.float().numpy().copy() for n, t in published_tensors(backend).items()}, taken


def _close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("optimizer", SHARDED)
def test_two_ranks_equal_one_process_over_twenty_updates(
    policy: str, world: RankWorld, optimizer: str
) -> None:
    settings = _settings(policy, optimizer)
    before = _run(None, settings, 1, 0, "", "")[0]
    one, taken = _run(None, settings, 1, 5, "", "")
    assert sum(taken) == 5 * UPDATES_A_STEP
    assert any(np.abs(one[name] - before[name]).max() > 2e-5 for name in one), "nothing moved"
    cut = dataclasses.replace(settings, **FSDP2)
    for found, _ in world.run(_run, cut, 1, 5, "", ""):
        _close(found, one)


@pytest.mark.parametrize("optimizer", METHODS)
def test_resume_is_bit_equal(policy: str, tmp_path: Path, optimizer: str) -> None:
    settings = _settings(policy, optimizer, minibatches=2)
    straight, _ = _run(None, settings, 1, 6, "", "")
    _run(None, settings, 1, 3, "", str(tmp_path))
    resumed, _ = _run(None, settings, 4, 6, str(tmp_path), "")
    for name, value in straight.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


RANKED = {
    "fsdp2-galore": ("galore", FSDP2),
    "fsdp2-spam": ("spam", FSDP2),
    "fsdp2-owlore": ("owlore", FSDP2),
    "fsdp2-int8": ("adamw", {**FSDP2, "optimizer_options": {"state": "int8"}}),
    "fsdp2-adapters": ("low_rank_restarts", FSDP2),
    "fsdp2-bf16": ("adamw", {**FSDP2, "dtype": "bfloat16"}),
    "zero1": ("adamw", ZERO[1]),
    "zero2-bf16": ("adamw", {**ZERO[2], "dtype": "bfloat16"}),
    "zero3": ("lion", ZERO[3]),
}


@pytest.mark.parametrize("case", RANKED.values(), ids=RANKED.keys())
def test_ranks_resume_bit_equal(
    policy: str, world: RankWorld, tmp_path: Path, case: tuple[str, dict[str, Any]]
) -> None:
    optimizer, more = case
    settings = _settings(policy, optimizer, minibatches=2, **more)
    straight = world.run(_run, settings, 1, 4, "", "")
    world.run(_run, settings, 1, 2, "", str(tmp_path))
    resumed = world.run(_run, settings, 3, 4, str(tmp_path), "")
    for (one, _), (other, _) in zip(straight, resumed, strict=True):
        for name, value in one.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "1 -> fsdp2": ("galore", {}, FSDP2),
    "fsdp2 -> 1": ("galore", FSDP2, {}),
    "1 -> zero3": ("adamw", {}, ZERO[3]),
    "zero3 -> zero1": ("adamw", ZERO[3], ZERO[1]),
    "zero2 -> 1": ("adamw", ZERO[2], {}),
    "fsdp2 -> zero2": ("adamw", FSDP2, ZERO[2]),
    "zero1 -> fsdp2": ("adamw", ZERO[1], FSDP2),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_checkpoint_fits_other_ranks_and_backends(
    policy: str, world: RankWorld, tmp_path: Path, way: tuple[str, dict[str, Any], dict[str, Any]]
) -> None:
    optimizer, before, after = way
    settings = _settings(policy, optimizer, minibatches=2)
    straight, _ = _run(None, settings, 1, 4, "", "")

    def run(more: dict[str, Any], *args: Any) -> dict[str, np.ndarray]:
        chosen = dataclasses.replace(settings, **more)
        weights: dict[str, np.ndarray]
        weights = (world.run(_run, chosen, *args)[0] if more else _run(None, chosen, *args))[0]
        return weights

    saved = run(before, 1, 2, "", str(tmp_path))
    assert any(np.abs(straight[name] - saved[name]).max() > 1e-4 for name in saved), (
        "steps 3 and 4 must move the weights further than what is compared"
    )
    _close(run(after, 3, 4, str(tmp_path), ""), straight)


def test_what_does_not_fit_is_refused_with_the_reason(policy: str, tmp_path: Path) -> None:
    _run(None, _settings(policy, "adamw"), 1, 1, "", str(tmp_path))
    for other, reason in (
        (_settings(policy, "sgd"), r"made with trainer\.optimizer = 'adamw', this run has 'sgd'"),
        (_settings(policy, "adamw", lora_rank=2), r"made with model\.adapter = 'none'"),
    ):
        with pytest.raises(BackendError, match=reason):
            _run(None, other, 2, 2, str(tmp_path), "")
    int8 = _settings(policy, "adamw", optimizer_options={"state": "int8"})
    with pytest.raises(OptimizerError, match="of the checkpoint"):
        _run(None, int8, 2, 2, str(tmp_path), "")
    for settings, reason in (
        (_settings(policy, "adamw", optimizer_options={"gap": 3}), "has no option 'gap'"),
        (_settings(policy, "adamw", optimizer_options={"lr": 1.0}), r"set trainer\.lr instead"),
        (TrainerSettings(model_path=policy, optimizer="adamww"), "did you mean 'adamw'"),
        (
            _settings(
                policy, "adamw", **{**ZERO[2], "ranks": 1, "optimizer_options": {"state": "int8"}}
            ),
            "reach across parameters",
        ),
        (_settings(policy, "galore", **{**ZERO[2], "ranks": 1}), r'trainer\.backend = "fsdp2"'),
        (_settings(policy, "adamw", **{**ZERO[2], "backend_options": {"zero": 2}}), "zero_stage"),
        (_settings(policy, "adamw", **{**FSDP2, "backend_options": {"zero": 2}}), "offload"),
    ):
        with pytest.raises((BackendError, OptimizerError), match=reason):
            _run(None, settings, 1, 1, "", "")
