"""`loopwright plan` as a user meets it: figures, remedies, splits, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from loopwright.orchestrator.cli import DONE, REFUSED, main

CONFIG = """
[run]
name = "planned"
[tiny]
hidden_size = 64
layers = 2
vocab_size = 400
[environment]
name = "officeworld"
max_context = 128
[rollout]
group_size = 8
groups_per_step = 256
concurrency = 4
[trainer]
token_budget = 512
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.toml").write_text(CONFIG)
    return "plan.toml"


def _report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == DONE
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == REFUSED
    return capsys.readouterr().err


def test_classes_add_up_and_are_what_the_model_says(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _report(capsys, config)
    prediction = report["prediction"]
    trainer, count = prediction["trainer"], prediction["parameters"]
    assert report["peak_bytes"] == sum(trainer.values())
    assert trainer["weights"] == pytest.approx(4 * count, rel=0.01)
    assert trainer["optimizer"] == pytest.approx(8 * count, rel=0.01)
    assert trainer["gradients"] >= 4 * count
    assert (prediction["rows"], prediction["columns"]) == (4, 128)
    kv = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width of a head, bytes
    assert prediction["engine"]["kv_token"] == kv
    assert prediction["engine"]["kv_wanted"] == kv * 4 * 128


def test_what_a_setting_is_said_to_save_it_saves(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _report(capsys, config)
    saved = [knob["saved_bytes"] for knob in report["knobs"]]
    assert saved == sorted(saved, reverse=True) and saved[-1] > 0
    for knob in report["knobs"][:2]:
        overrides = [part for setting in knob["set"] for part in ("--set", setting)]
        assert _report(capsys, config, *overrides)["peak_bytes"] == knob["peak_bytes"]
        assert knob["saved_bytes"] == report["peak_bytes"] - knob["peak_bytes"]


def test_a_frozen_copy_for_the_kl_penalty_is_weights_too(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = _report(capsys, config)["prediction"]
    copied = _report(capsys, config, "--set", "algorithm.kl=k3")["prediction"]
    assert copied["reference_bytes"] == 4 * copied["parameters"]
    grown = copied["trainer"]["weights"] - plain["trainer"]["weights"]
    assert grown == copied["reference_bytes"]
    adapted = _report(capsys, config, "--set", "algorithm.kl=k3", "--set", "model.lora_rank=2")
    assert adapted["prediction"]["reference_bytes"] == 0


def test_forward_only_training_keeps_nothing_for_a_backward_pass(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = _report(capsys, config)["prediction"]["largest"]
    found = _report(capsys, config, "--set", "trainer.optimizer=mezo")["prediction"]["largest"]
    assert found["gradients"] == 0 and found["activations"] < 0.3 * plain["activations"]


# Published figures, with the rules they were published for: all states of one kind.
LLAMA = {
    "adamw": (26.95, {"optimizer": "adamw", "state": "bf16", "write_back": "stochastic"}),
    "galore": (
        9.40,
        {"optimizer": "galore", "state": "bf16", "write_back": "stochastic", "rank": 1024},
    ),
    "galore-int8": (
        4.70,
        {"optimizer": "galore", "state": "int8", "write_back": "stochastic", "rank": 1024},
    ),
}


@pytest.mark.parametrize("method", LLAMA)
def test_llama_2_7b_as_published(
    config: str, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    expected, options = LLAMA[method]
    name = options.pop("optimizer")
    overrides = ["--set", f"trainer.optimizer={name}", "--set", "model.dtype=bfloat16"]
    if name == "galore":
        overrides += ["--set", "trainer.optimizer_options.embeddings=same"]
    for key, value in options.items():
        overrides += ["--set", f"trainer.optimizer_options.{key}={value}"]
    report = _report(capsys, config, "--model", "Llama-2-7B", *overrides)
    found = report["prediction"]["trainer"]["optimizer"] / 1e9
    assert found == pytest.approx(expected, rel=0.02)
    assert report["prediction"]["parameters"] == 6_738_415_616


def test_a_model_that_does_not_fit_is_told_what_would(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", "model.device=cuda", "--set", "model.dtype=bfloat16"]
    settings += ["--set", "trainer.gradient_checkpointing=on"]
    arguments = [config, "--model", "Llama-3.2-1B", "--gpus", "1xT4", *settings]
    (fit,) = _report(capsys, *arguments)["fits"]
    assert fit["trainer_free_bytes"] < 0 < fit["engine_free_bytes"]
    assert fit["make_fit"] and fit["make_fit_peak_bytes"] <= fit["usable_bytes"]
    assert fit["devices_missing"] == 1
    assert main(["plan", *arguments]) == DONE
    text = capsys.readouterr().out
    assert f"fits with --set {' --set '.join(fit['make_fit'])}" in text
    assert "2 devices are asked for" in text and "1 too few" in text


def test_the_time_model_on_given_times(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """LlamaRL's example: eta_t = 1 + .5 b, eta_g = 3 + .1 b, B0 = 2048, G0 = 256."""
    train, generate = "train:m=8,b=2,s=2.0", "generate:m={},b=8,s=3.8"
    gpus = ["--gpus", "256xH100", "--eta", train, "--eta"]
    times = _report(capsys, config, *gpus, generate.format(8))["times"]
    assert times["synchronous_s"] == pytest.approx(94.4)
    assert times["train_frac"] == pytest.approx(0.6779661)
    times = _report(capsys, config, *gpus, generate.format(4))["times"]
    assert times["train_frac"] == pytest.approx(0.80808081)
    assert times["asynchronous_s"] == pytest.approx(79.2)


@pytest.mark.parametrize(
    ("work", "seconds", "split"), [("80", 16.0, (3, 5)), ("64", 13.33, (3, 5))]
)
def test_whole_devices_can_lose(
    config: str, capsys: pytest.CaptureFixture[str], work: str, seconds: float, split: Any
) -> None:
    arguments = [config, "--gpus", "8xH100", "--train-s", "40", "--generate-s", work]
    times = _report(capsys, *arguments)["times"]
    best = times["whole_splits"][0]
    assert times["synchronous_with_tail_s"] == pytest.approx((40 + float(work)) / 8)
    assert best["step_s"] == pytest.approx(seconds, rel=1e-3)
    assert (best["train_devices"], best["generate_devices"]) == split


def test_a_run_is_compared_with(
    config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "planned"
    folder.mkdir(parents=True)
    classes = {f"{k}_bytes": 1000 for k in ("weights", "gradients", "optimizer", "activations")}
    event = {"kind": "memory", "peak_bytes": 4500, "logits_bytes": 500, "rows": 4, "columns": 128}
    (folder / "events.jsonl").write_text(json.dumps(event | classes) + "\n{cut off")
    steps = [
        {"step": n, "time/train_s": 2.0, "time/elapsed_s": 10.0 * n, "engine/0/busy_frac": 0.5}
        for n in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    report = _report(capsys, config)
    assert report["measured"]["memory"]["logits"] == 500
    assert report["measured"]["generate_s"] == pytest.approx(5.0)
    assert report["times"]["synchronous_s"] == pytest.approx((2 + 5) / 2)
    assert main(["plan", config]) == DONE
    assert "measured" in capsys.readouterr().out


def test_what_cannot_be_planned_is_refused_with_the_nearest(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean H100?" in _refusal(capsys, config, "--gpus", "8xH1000")
    said = _refusal(capsys, config, "--model", "Qwen3-9B")
    assert "did you mean Qwen3-" in said and "Llama-2-7B" in said
    assert "'galor'" in _refusal(capsys, config, "--set", "trainer.optimizer=galor")
    said = _refusal(capsys, config, "--set", "trainer.optimizer_options.rank=4")
    assert "'adamw' has no option 'rank'" in said
    said = _refusal(capsys, config, "--set", "trainer.gradient_checkpointing=offload")
    assert "in host memory already" in said
    assert "expected one of 'off', 'on', 'offload'" in _refusal(
        capsys, config, "--set", "trainer.gradient_checkpointing=true"
    )
    assert "neither a memory event" in _refusal(capsys, config, "--run", "nowhere")
    assert "times of generate are missing" in _refusal(capsys, config, "--train-s", "3")
    assert "expected train:m=8" in _refusal(capsys, config, "--eta", "train:m=8")
    both = ["--eta", "train:m=8,b=2,s=2", "--train-s", "3"]
    assert "leave --train-s" in _refusal(capsys, config, *both)
    assert "expected seconds" in _refusal(capsys, config, "--train-s", "-3")
