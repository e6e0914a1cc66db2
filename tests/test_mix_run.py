"""A whole run on a mix: scheduled noise, a sampler that learns, the same draws after a crash."""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from loopwright.algorithms.curricula import scheduled
from loopwright.envs.protocol import decode_task
from loopwright.orchestrator.cli import DONE, REFUSED
from loopwright.orchestrator.ledger import FILE, read, read_frames
from tests.tiny_run import train

P = 2  # groups per step
MIX = (
    'environment.name="mix"',
    "environment.options={}",
    'environment.mix={errands={environment="officeworld",options={style="compact",'
    'scenarios=["ask_phone"]},max_turns=4},'
    'search={weight=2.0,options={style="compact",entities=60,hops=[1],documents=1}}}',
    "environment.max_turns=0",
    'environment.sampler="pass_rate"',
    "environment.sampler_options={pool=16,schedule={noise={start=0.0,end=0.8,steps=3}}}",
    "run.steps=4",
)


def _tasks(folder: Path) -> dict[int, Any]:
    frames = [record for _, record in read_frames(folder / "ledger" / FILE)]
    return {f["ticket"]: decode_task(f["task"]) for f in frames if f["kind"] == "group"}


def test_a_mix_is_trained_with_its_schedule_and_goes_on_with_the_same_tasks(
    tmp_path: Path, policy: str
) -> None:
    code, folder = train(tmp_path, policy, *MIX)
    assert code == DONE
    before = _tasks(folder)
    assert {t.environment for t in before.values()} == {"errands", "search"}
    for ticket, task in before.items():
        if task.environment == "search":
            noise = scheduled(ticket // P, start=0.0, end=0.8, steps=3)
            assert task.payload["noise"] == pytest.approx(noise)
        else:
            assert "noise" not in task.payload
    state = read(folder / "ledger" / FILE)
    assert all(state.played[t][-1].task_id == task.id for t, task in before.items())
    metrics: dict[str, list[float]] = defaultdict(list)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            metrics[name].append(value)
    for name in ("success_mean", "reward_mean", "context_peak_tokens_max", "episodes"):
        assert metrics[f"environment/search/{name}"] and metrics[f"eval_environment/errands/{name}"]
    # the last step and its checkpoint are lost: the same groups make it again, none is redrawn
    shutil.rmtree(folder / "checkpoints" / "step-4")
    (folder / "summary.json").unlink()
    code, folder = train(tmp_path, policy, *MIX, resume=True)
    assert code == DONE
    after, again = _tasks(folder), read(folder / "ledger" / FILE)
    assert {t: after[t].id for t in before} == {t: task.id for t, task in before.items()}
    assert again.checksums == state.checksums and again.trained == state.trained
    other = [o.replace('"pass_rate"', '"failure_variants"').replace("pool=16,", "") for o in MIX]
    assert train(tmp_path, policy, *other, resume=True)[0] == REFUSED


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['environment.name="mix"', "environment.options={}"], "environment.mix"),
        (["environment.mix={search={},officeworld={}}"], "environment.mix"),
        (
            ["environment.sampler_options={schedule={noise={start=0.0,end=1.0}}}"],
            "schedules nothing",
        ),
        (['environment.sampler="pass_rate"', "environment.sampler_options={flor=1.0}"], "'floor'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, policy: str, overrides: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code, folder = train(tmp_path, policy, *overrides)
    assert code != DONE and message in capsys.readouterr().err
    assert not folder.exists()


def test_a_sampler_learns_from_groups_that_were_replaced_too(tmp_path: Path, policy: str) -> None:
    """With dynamic sampling a group of equal rewards is played for no step; that its task always
    (or never) succeeds is what the sampler is to know."""
    code, folder = train(tmp_path, policy, *MIX, "rollout.dynamic_sampling=true", "run.steps=3")
    assert code == DONE
    state = read(folder / "ledger" / FILE)
    replaced = [p for played in state.played.values() for p in played[:-1]]
    assert replaced and all(len(set(p.passed)) <= 1 and len(p.passed) == 4 for p in replaced)
    tasks = {p.task_id for p in replaced} - {played[-1].task_id for played in state.played.values()}
    assert tasks, "tasks that no step has seen"
