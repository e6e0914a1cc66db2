"""A recorded step, taken again: the same weights, and where its numbers came from."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopwright.algorithms.advantages import leave_one_out
from loopwright.orchestrator.anatomy import render
from loopwright.orchestrator.cli import DONE, FAILED, main
from loopwright.orchestrator.replay import recorded_run, replay_step
from tests.tiny_run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, policy: str) -> Path:
    """A run of three steps with checkpoints after the second and the third."""
    code, folder = train(tmp_path_factory.mktemp("run"), policy, "algorithm.drop_below=0.05")
    assert code == DONE
    return folder


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return replay_step(run, 3)


def test_a_step_is_taken_again_from_the_checkpoint_before_it(report: dict[str, Any]) -> None:
    assert report["equal"] and report["now"] == report["recorded"]
    assert report["from"] == "checkpoint of step 2"


def test_a_step_before_any_checkpoint_begins_with_the_first_weights(run: Path) -> None:
    early = replay_step(run, 1)
    assert early["equal"] and early["from"] == "first weights"


def test_rewards_advantages_and_versions_are_those_of_the_ledger(
    run: Path, report: dict[str, Any]
) -> None:
    _, state = recorded_run(run)
    told = [(g["ticket"], r["attempt"]) for g in report["groups"] for r in g["rollouts"]]
    assert told == state.trained[3]
    for group in report["groups"]:
        rewards = [r["reward"] for r in group["rollouts"]]
        expected = leave_one_out(np.array(rewards))
        np.testing.assert_allclose([r["advantage"] for r in group["rollouts"]], expected)
        for r in group["rollouts"]:
            assert sum(r["tokens_by_version"].values()) == r["tokens"]
            assert r["lag"] == 2 - min(map(int, r["tokens_by_version"]))
            assert r["trained"] == (abs(r["advantage"]) >= 0.05) == (r["loss_weight"] > 0)


def test_the_loss_weight_of_a_token_is_its_part_in_the_gradient(
    run: Path, report: dict[str, Any]
) -> None:
    """At ratio 1: −A · min(proximal / behavior, 2) / (tokens of the rollout · minibatch size)."""
    of_first = [
        (g["ticket"], r)
        for g in report["groups"]
        for r in g["rollouts"]
        if r["trained"] and r["minibatch"] == 0
    ]
    rollouts = sum(len(g["rollouts"]) for g in report["groups"])
    for ticket, r in of_first[:2]:
        tokens = replay_step(run, 3, (ticket, r["attempt"]))["rollout"]["tokens"]
        assert len(tokens) == r["tokens"]
        for t in tokens:
            weight = min(t["mismatch_ratio"], 2.0) / (len(tokens) * rollouts / 2)
            assert t["loss_weight"] == pytest.approx(-r["advantage"] * weight, rel=1e-4)
            assert t["proximal_logprob"] == pytest.approx(t["behavior_logprob"], abs=0.5)
    assert of_first


def test_in_a_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), "--step", "3", "--rollout", "4/1"]) == DONE
    told = capsys.readouterr().out
    assert "the same weights" in told and "seen before the first token" in told
    assert all(word in told for word in ("ticket 4", "ticket 5", "advantage", "d loss / d logprob"))
    assert max(len(line) for line in told.splitlines()) <= 110


def test_for_machines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), "--step", "3", "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert main(["replay", str(run), "--json"]) == DONE
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["step"], row["equal"]) for row in rows] == [(1, True), (2, True), (3, True)]


def _changed(run: Path, folder: Path, before: str, after: str) -> Path:
    """A copy of the run with one setting changed."""
    copy = shutil.copytree(run, folder / "changed")
    config = (copy / "config.toml").read_text()
    assert before in config
    (copy / "config.toml").write_text(config.replace(before, after))
    return copy


def test_other_weights_are_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = shutil.copytree(run, tmp_path / "changed")
    config = (changed / "config.toml").read_text()
    (changed / "config.toml").write_text(
        config.replace("weight_decay = 0.01", "weight_decay = 0.5")
    )
    assert main(["replay", str(changed), "--step", "3"]) == FAILED
    assert "OTHER WEIGHTS" in capsys.readouterr().out


def test_a_dropped_rollout_is_shown_without_a_weight(run: Path, tmp_path: Path) -> None:
    changed = _changed(run, tmp_path, "drop_below = 0.05", "drop_below = 2.0")  # all of them
    shown = replay_step(changed, 1, (0, 1))
    assert not any(r["trained"] or r["loss_weight"] for g in shown["groups"] for r in g["rollouts"])
    assert shown["rollout"]["tokens"] and not shown["rollout"]["trained"]
    assert all(t["loss_weight"] is None for t in shown["rollout"]["tokens"])
    assert "dropped" in render(shown)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "9"], "has no step 9: it trained steps 1 to 3"),
        (["--step", "3", "--rollout", "0/1"], "trained no rollout 0/1; it has 4/0, 5/0"),
        (["--rollout", "4/1"], "goes with --step"),
    ],
)
def test_what_is_not_there_is_told(
    run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(run), *arguments]) == FAILED
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    assert main(["replay", str(tmp_path)]) == FAILED
