"""A whole run in one process: what it leaves behind, what it refuses, how it goes on."""

import json
import shutil
from pathlib import Path

import pytest

from loopwright.configs.load import load
from loopwright.orchestrator.cli import DONE, REFUSED
from loopwright.orchestrator.ledger import FILE, audit, read
from loopwright.orchestrator.parts import checkpoints
from loopwright.orchestrator.replay import replay
from tests.tiny_run import train, write_config

P, K = 2, 4  # groups per step, rollouts per group


def test_a_run_leaves_summary_curve_ledger_and_checkpoints(tmp_path: Path, policy: str) -> None:
    code, folder = train(tmp_path, policy)
    assert code == DONE
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["complete"] is True
    assert set(summary["success"]) == {"initial", "warm_start", "final"}
    assert set(summary["lag"]) == {"max", "mean", "tokens"}
    assert sum(summary["lag"]["tokens"].values()) > 0
    assert summary["publish"]["size_bytes"] > 0 < summary["publish"]["seconds"]
    assert summary["idle"] and all(0 <= share <= 1 for share in summary["idle"].values())
    assert 0 < summary["loss"]["mismatch_ess_frac"] <= 1
    assert set(summary["unused"]) >= {"cancelled_rollouts", "discarded_tokens"}
    assert set(summary["lag"]["tokens"]) <= {"0", "1"}
    assert 0 <= summary["lag"]["mean"] <= summary["lag"]["max"] <= 1
    assert (summary["steps"], summary["publishes"], summary["restarts"]) == (3, 4, 0)
    assert summary["episodes"] >= 3 * P * K
    assert summary["tokens"]["generated"] > 0 and summary["tokens"]["trained"] > 0
    assert summary["seconds"]["total"] > summary["seconds"]["train"] > 0
    assert summary["mismatch"]["abs_mean"] >= 0
    assert [step for step, _ in summary["curve"]] == [0, 3]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in checkpoints(folder)] == [2, 3]
    found = audit(folder / "ledger" / FILE)
    assert (found.trained, found.unused, found.twice, found.unknown) == (3 * P * K, (), (), ())
    assert load(folder / "config.toml").config.run.steps == 3
    memory = summary["memory"]
    assert memory["peak_bytes"] > memory["weights_bytes"] > 0
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    (event,) = [e for e in events if e["kind"] == "memory"]
    assert event["text"].startswith("peak ") and event["logits_bytes"] == memory["logits_bytes"]


def test_from_nothing_with_a_warm_start(tmp_path: Path) -> None:
    code, folder = train(
        tmp_path,
        "tiny",
        "warm_start.demonstrations=8",
        "warm_start.steps=4",
        "run.steps=1",
    )
    assert code == DONE
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["success"]) == {"initial", "warm_start", "final"}
    assert (folder / "initial" / "config.json").is_file()
    assert (folder / "warm_start" / "config.json").is_file()
    assert all(step.equal for step in replay(folder))


def test_a_critic_a_reference_and_a_proximal_policy_without_a_pass(
    tmp_path: Path, policy: str
) -> None:
    code, folder = train(
        tmp_path,
        policy,
        "rollout.group_size=1",
        "rollout.groups_per_step=6",
        "algorithm.advantage=gae",
        "algorithm.level=turn",
        "algorithm.loss=decoupled",
        "algorithm.proximal=loglinear",
        "algorithm.kl=k3",
    )
    assert code == DONE
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    assert all("value/explained_variance" in row for row in steps) and len(steps) == 3
    assert steps[-1]["train/kl_reference_mean"] > 0
    assert all(step.equal for step in replay(folder))


def test_a_folder_with_a_run_is_not_overwritten(
    tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, policy, "run.steps=0")[0] == DONE
    before = sorted(p.name for p in (tmp_path / "runs" / "tiny").iterdir())
    code, folder = train(tmp_path, policy, "run.steps=0")
    assert code == REFUSED
    told = capsys.readouterr().err.splitlines()[-1]
    assert "holds a run already" in told and "--resume" in told
    assert sorted(p.name for p in folder.iterdir()) == before


def test_resume_of_nothing_is_refused(
    tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, folder = train(tmp_path, policy, resume=True)
    assert code == REFUSED
    assert "no run in" in capsys.readouterr().err
    assert not folder.exists()


def test_resume_under_other_tickets_is_refused(
    tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With half the groups per step, tickets that are trained already would be trained again."""
    _, folder = train(tmp_path, policy, "run.steps=1")
    before = (folder / "config.toml").read_text()
    code, _ = train(tmp_path, policy, "run.steps=2", "rollout.groups_per_step=1", resume=True)
    assert code == REFUSED
    told = capsys.readouterr().err.splitlines()[-1]
    assert "rollout.groups_per_step = 1, the run has 2" in told
    assert (folder / "config.toml").read_text() == before
    assert train(tmp_path, policy, "run.steps=2", "trainer.lr=1e-4", resume=True)[0] == DONE


def test_the_same_command_begins_a_run_and_goes_on_with_it(tmp_path: Path, policy: str) -> None:
    assert train(tmp_path, policy, "run.steps=1", auto_resume=True)[0] == DONE
    code, folder = train(tmp_path, policy, "run.steps=2", auto_resume=True)
    assert code == DONE
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2


def test_a_run_stopped_by_its_time_is_resumed_to_the_end(tmp_path: Path, policy: str) -> None:
    code, folder = train(tmp_path, policy, "run.max_seconds=1e-6")
    assert code == DONE
    stopped = json.loads((folder / "summary.json").read_text())
    assert stopped["complete"] is False and "final" not in stopped["success"]
    code, _ = train(tmp_path, policy, resume=True)
    assert code == DONE
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["complete"] is True and summary["steps"] == 3
    found = audit(folder / "ledger" / FILE)
    assert (found.trained, found.unused, found.twice, found.unknown) == (3 * P * K, (), (), ())


@pytest.mark.parametrize(
    "relief",
    [
        (),
        ("rollout.window=2",),
        ("rollout.cut=0.5", "rollout.cut_group=0.5"),
        ("rollout.dynamic_sampling=true", "rollout.adaptive_concurrency=true"),
    ],
    ids=["none", "window", "cut", "dynamic"],
)
def test_a_killed_run_takes_the_same_steps_again(
    tmp_path: Path, policy: str, relief: tuple[str, ...]
) -> None:
    """Killed before the checkpoint of step 4 was whole: steps 3 and 4 are trained again on what is
    on record, to the same weights, and nothing is played again."""
    steps = ("run.steps=4", *relief)
    _, folder = train(tmp_path, policy, *steps)
    before = read(folder / "ledger" / FILE)
    shutil.rmtree(folder / "checkpoints" / "step-4")
    (folder / "summary.json").unlink()
    code, _ = train(tmp_path, policy, *steps, resume=True)
    assert code == DONE
    after = read(folder / "ledger" / FILE)
    assert after.checksums == before.checksums
    assert after.trained == before.trained and after.tickets == before.tickets
    assert after.cancelled == before.cancelled or relief
    for ticket, attempts in before.rollouts.items():
        # a group that was still being played when the run ended is played to its end
        assert {k: after.rollouts[ticket][k] for k in attempts} == attempts
    found = audit(folder / "ledger" / FILE)
    assert (found.unused, found.twice, found.unknown) == ((), (), ())
    assert bool(found.cancelled) == ("rollout.cut=0.5" in relief)
    assert bool(found.discarded) == ("rollout.dynamic_sampling=true" in relief)
    assert len(set(after.checksums.values())) > 2, "most steps changed nothing: a weak test"


def test_the_configuration_of_these_tests_is_valid(tmp_path: Path) -> None:
    loaded = load(write_config(tmp_path, "tiny"))
    assert loaded.config.cluster.address == "none"
