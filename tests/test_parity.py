"""The check that engine and trainer mean the same by a logprob, before anything is sampled."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from loopwright.actors.model_identity import model_identity
from loopwright.actors.tiny_model import train_tokenizer
from loopwright.orchestrator.cli import DONE, FAILED
from loopwright.orchestrator.parity import ParityError, check_parity
from tests.tiny_run import train


class Answers:
    """Stands for a trainer and for a pool of two engines: answers a probe, shifted by engine."""

    def __init__(self, shifts: dict[str, float] | None = None) -> None:
        self.shifts = shifts

    async def probe(self, token_ids: np.ndarray) -> Any:
        """Logprobs [T-1]; with shifts, by engine name."""
        truth = -np.sqrt(np.arange(1, len(token_ids), dtype=np.float32))
        if self.shifts is None:
            return truth
        return {name: truth + np.float32(shift) for name, shift in self.shifts.items()}


def check(shifts: dict[str, float], dtype: str = "float32") -> float:
    """The check over such answers."""
    return asyncio.run(check_parity(cast(Any, Answers()), cast(Any, Answers(shifts)), dtype))


def test_the_largest_difference_comes_back() -> None:
    assert check({"rollout 0": 0.0, "rollout 1": 5e-4}) == pytest.approx(5e-4, rel=1e-2)


def test_an_engine_that_differs_is_named() -> None:
    with pytest.raises(ParityError, match=r"rollout 1: .* up to 0\.01, at most 0\.001"):
        check({"rollout 0": 0.0, "rollout 1": 0.01})
    assert check({"rollout 0": 0.01}, "bfloat16") == pytest.approx(0.01, rel=1e-3)


def test_an_engine_that_answers_nonsense_is_refused() -> None:
    with pytest.raises(ParityError, match="nan"):
        check({"rollout 0": float("nan")})


def test_another_tokenizer_is_refused_when_a_run_is_resumed(
    tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(policy, model)
    overrides = ("run.steps=1", "evaluation.tasks=1")
    assert train(tmp_path, str(model), *overrides)[0] == DONE
    template = next(path for path in model.iterdir() if "chat_template" in path.name)
    template.write_text(template.read_text() + "{# another #}")
    code, _ = train(tmp_path, str(model), "run.steps=2", "evaluation.tasks=1", resume=True)
    assert code == FAILED
    told = capsys.readouterr().err.rstrip().rpartition("\n")[2]
    assert told.startswith("loopwright: rollout 0: not the trainer's chat template")
    assert str(model) in told and "step-1" in told


@pytest.mark.parametrize(
    ("path", "dtype", "expected"),
    [
        ("", "float32", []),
        ("", "bfloat16", ["dtype (bfloat16 and float32)"]),
        ("", "", []),  # an environment worker holds no weights
        ("another", "float32", ["rules", "vocabulary"]),
    ],
)
def test_what_differs_is_told(
    tmp_path: Path, policy: str, path: str, dtype: str, expected: list[str]
) -> None:
    if path:
        train_tokenizer(["other words 1 2 3"] * 3, vocab_size=290).save_pretrained(tmp_path / path)
        path = str(tmp_path / path)
    other = model_identity(path or policy, dtype)
    assert other.differences(model_identity(policy, "float32")) == expected


def test_a_run_checks_its_engine_first(tmp_path: Path, policy: str) -> None:
    code, folder = train(tmp_path, policy, "run.steps=1")
    assert code == DONE
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    found = [event["logprob_difference_max"] for event in events if event["kind"] == "parity"]
    assert len(found) == 1
    assert 0 <= found[0] < 1e-4
