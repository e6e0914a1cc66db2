"""The check that engine and trainer mean the same by a logprob, before anything is sampled."""

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from loopwright.orchestrator.cli import DONE
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


def test_a_run_checks_its_engine_first(tmp_path: Path, policy: str) -> None:
    code, folder = train(tmp_path, policy, "run.steps=1")
    assert code == DONE
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    found = [event["logprob_difference_max"] for event in events if event["kind"] == "parity"]
    assert len(found) == 1
    assert 0 <= found[0] < 1e-4
