"""The dry run before step 1: it measures, it changes nothing, and what does not fit is named."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from loopwright.actors.dry_run import DryRun, dry_run
from loopwright.actors.out_of_memory import remedy
from loopwright.actors.tiny_model import build_tiny_policy, tiny_config
from loopwright.actors.torch_backend import TorchBackend
from loopwright.actors.trainer import Trainer
from loopwright.actors.trainer_backend import TrainerSettings
from loopwright.algorithms.records import encode
from loopwright.orchestrator.memory_plan import Planner
from tests.train_batches import make_batch

LONGEST, BUDGET = 64, 256
SIZES = {
    "small": {"hidden_size": 32, "layers": 2, "intermediate_size": 48},
    "medium": {"hidden_size": 96, "layers": 3, "intermediate_size": 256},
    "large": {"hidden_size": 256, "layers": 4, "intermediate_size": 640},
}
# name: optimizer, its options, rank of adapters
OPTIMIZERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "adamw": ("adamw", {}, 0),
    "adamw-int8": ("adamw", {"state": "int8"}, 0),
    "sgd": ("sgd", {}, 0),
    "galore": ("galore", {"rank": 8}, 0),
    "adamw-lora": ("adamw", {}, 4),
}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One tiny policy of each size, by name."""
    folder = tmp_path_factory.mktemp("policies")
    for name, shape in SIZES.items():
        build_tiny_policy(
            ["find Ana = 17 ."] * 3,
            folder / name,
            heads=4,
            kv_heads=2,
            vocab_size=300,
            max_context=LONGEST,
            **shape,
        )
    return {name: str(folder / name) for name in SIZES}


def _settings(policy: str, optimizer: str = "adamw", **changes: Any) -> TrainerSettings:
    name, options, rank = OPTIMIZERS[optimizer]
    settings = TrainerSettings(
        model_path=policy,
        token_budget=BUDGET,
        logprob_chunk=100,
        optimizer=name,
        optimizer_options=options,
        lora_rank=rank,
        lora_alpha=32.0,
    )
    return dataclasses.replace(settings, **changes)


def _measured(settings: TrainerSettings) -> DryRun:
    return dry_run(TorchBackend(settings), longest=LONGEST)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_changes_by_a_bit(policies: dict[str, str], optimizer: str) -> None:
    """Two trainers, one of which is rehearsed before and between its steps, stay equal."""
    settings = _settings(policies["small"], optimizer)
    plain, rehearsed = Trainer(settings, "plain"), Trainer(settings, "rehearsed")
    for step in (1, 2):
        backend = rehearsed.backend
        before = {kind: [t.clone() for t in held] for kind, held in backend.held().items()}
        random = torch.get_rng_state()
        rehearsed.dry_run(LONGEST)
        for kind, held in backend.held().items():
            assert len(held) == len(before[kind])
            for now, then in zip(held, before[kind], strict=True):
                assert torch.equal(now, then), kind
        assert torch.equal(torch.get_rng_state(), random)
        assert all(p.grad is None for p in backend.model.parameters())
        assert not any(p._backward_hooks for p in backend.model.parameters())
        batch = encode(make_batch(step, seed=step))
        plain.step(step, batch)
        rehearsed.step(step, batch)
    assert plain.weights_checksum() == rehearsed.weights_checksum()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_was_planned_is_what_is_measured(
    policies: dict[str, str], tmp_path: Path, size: str, optimizer: str
) -> None:
    name, options, rank = OPTIMIZERS[optimizer]
    config = tmp_path / "plan.toml"
    listed = ", ".join(f"{k} = {v!r}" for k, v in options.items())
    config.write_text(
        f'[run]\nname = "planned"\n[model]\npath = "{policies[size]}"\nlora_rank = {rank}\n'
        f'[environment]\nname = "officeworld"\nmax_context = {LONGEST}\nmax_new_tokens = 8\n'
        f'[trainer]\ntoken_budget = {BUDGET}\nlogprob_chunk = 100\noptimizer = "{name}"\n'
        f"optimizer_options = {{ {listed} }}\n"
    )
    planned = Planner(str(config), (), "").predict().trainer
    found = _measured(_settings(policies[size], optimizer)).peak
    assert planned.total == pytest.approx(found.total, rel=0.15)
    assert planned.optimizer == pytest.approx(found.optimizer, rel=0.01)
    assert planned.weights == pytest.approx(found.weights, rel=0.01)
    assert planned.gradients == pytest.approx(found.gradients, rel=0.05)


def test_each_knob_makes_its_class_smaller(policies: dict[str, str]) -> None:
    settings = _settings(policies["medium"])
    plain = _measured(settings)
    assert (plain.rows, plain.columns) == (BUDGET // LONGEST, LONGEST)
    less = _measured(dataclasses.replace(settings, gradient_checkpointing="on")).largest
    assert less.activations < 0.6 * plain.largest.activations
    less = _measured(dataclasses.replace(settings, token_budget=LONGEST)).largest
    assert less.activations < 0.5 * plain.largest.activations
    less = _measured(dataclasses.replace(settings, logprob_chunk=10)).largest
    assert less.logits == plain.largest.logits // 10
    less = _measured(_settings(policies["medium"], "adamw-lora")).largest
    assert less.gradients < 0.2 * plain.largest.gradients
    assert _measured(_settings(policies["medium"], "sgd")).largest.optimizer == 0


def test_an_optimizer_without_gradients_has_none(policies: dict[str, str]) -> None:
    settings = _settings(policies["medium"], optimizer="adamw")
    plain = _measured(settings).largest
    found = _measured(dataclasses.replace(settings, optimizer="mezo")).largest
    assert found.gradients == 0
    assert found.activations < 0.3 * plain.activations


def test_a_budget_below_the_longest_context_is_one_row(policies: dict[str, str]) -> None:
    found = _measured(_settings(policies["small"], token_budget=LONGEST // 2))
    assert (found.rows, found.columns) == (1, LONGEST)


def test_the_report_adds_up(policies: dict[str, str]) -> None:
    found = _measured(_settings(policies["small"]))
    event = found.event()
    classes = ("weights", "gradients", "optimizer", "activations", "logits")
    assert event["peak_bytes"] == sum(event[f"{name}_bytes"] for name in classes)
    assert all(event[f"{name}_max_bytes"] >= event[f"{name}_bytes"] for name in classes)
    assert found.sentence().startswith("peak ") and "= activations" in found.sentence()
    more = dataclasses.replace(found, device_peak_bytes=found.peak.total + 5_000_000)
    assert "5.00 MB that the device's allocator adds" in more.sentence()
    assert more.event()["peak_bytes"] == found.peak.total + 5_000_000


_SMALL_MACHINE = """
import resource, sys
from pathlib import Path
from loopwright.actors.trainer import Trainer
from loopwright.actors.trainer_backend import TrainerSettings
def trainer(policy, budget, chunk):
    settings = TrainerSettings(model_path=policy, token_budget=budget, logprob_chunk=chunk)
    return Trainer(settings, "small")
trainer(sys.argv[1], 64, 64).dry_run(64)  # threads and what is loaded at the first use are there
large = [trainer(sys.argv[1], 64 * 2000, 100), trainer(sys.argv[2], 64 * 40, 64 * 40)]
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
for one in large:
    try:
        one.dry_run(64)
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_what_does_not_fit_is_named(policies: dict[str, str], tmp_path: Path) -> None:
    """With 64 MiB left: many tokens through a small model, and few through a wide output layer."""
    wide = tiny_config(
        vocab_size=20_000,
        hidden_size=8,
        layers=1,
        heads=2,
        kv_heads=1,
        intermediate_size=8,
        max_context=LONGEST,
    )
    Qwen3ForCausalLM(wide).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _SMALL_MACHINE, policies["small"], str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    said = done.stdout.splitlines()
    assert len(said) == 2, done.stderr
    for line, rows in zip(said, (2000, 40), strict=True):
        assert line.startswith(f"OutOfMemory out of memory in the dry run of {rows} x 64 tokens")
        assert "holding weights" in line and "`loopwright plan`" in line
    assert re.search(r'activations do not fit.*checkpointing = "on" or lower', said[0])
    assert re.search(r"logits do not fit \(.*asked for.*Lower trainer.logprob_chunk", said[1])


def test_remedies_go_with_the_settings(policies: dict[str, str]) -> None:
    settings = _settings(policies["small"])
    assert '"on" or lower trainer.token_budget' in remedy("activations", settings, LONGEST)
    on = dataclasses.replace(settings, gradient_checkpointing="on", token_budget=LONGEST)
    assert remedy("activations", on, LONGEST).startswith("Lower environment.max_context")
    device = dataclasses.replace(on, device="cuda")
    assert '"offload"' in remedy("activations", device, LONGEST)
    assert "'adamw'" in remedy("optimizer", settings, LONGEST)
    assert "model.lora_rank" in remedy("gradients", settings, LONGEST)


def test_offloading_changes_no_gradient(policies: dict[str, str]) -> None:
    """On a CPU it moves nothing, but the hooks are the same."""
    found = []
    for mode in ("off", "offload"):
        settings = _settings(policies["small"], minibatches=1, optimizer="sgd", lr=1.0)
        backend = TorchBackend(dataclasses.replace(settings, gradient_checkpointing=mode))
        backend.train(make_batch())
        found.append({n: p.detach().clone() for n, p in backend.model.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=2e-6, rtol=1e-4)
