"""`loopwright ledger`: what it tells, that it finds damage and what lies behind it, what it
writes."""

import json
import random
from pathlib import Path

import pytest

from loopwright.algorithms.records import Outcome, decode, encode
from loopwright.orchestrator.cli import main
from loopwright.orchestrator.ledger import FILE, Ledger, read_frames
from loopwright.orchestrator.ledger_command import Damage, read_contents, scan
from tests.test_ledger import fill, rollout

_CONFIG = """[run]\nname = "r"\n[environment]\nname = "officeworld"\n
[rollout]\ngroup_size = 2\ngroups_per_step = 2\n"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder: four groups of two, one void, a fault, one step, one checkpoint."""
    fill(tmp_path / "ledger")
    ledger = Ledger(tmp_path / "ledger")
    ledger.rollout(4, encode(rollout(4, 0, Outcome.INFRA_FAULT)))
    ledger.group(4, b"task", "the environment broke")
    ledger.checkpoint(1)
    ledger.close()
    (tmp_path / "config.toml").write_text(_CONFIG)
    return tmp_path


def test_it_tells_what_is_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", str(run)]) == 0
    told = capsys.readouterr().out
    assert "16 frames (9 rollout, 5 group, 1 step, 1 checkpoint)" in told
    assert "groups finished: 5, of them void: 1" in told
    assert "void, 1x: the environment broke" in told
    assert "rollouts: 8 scored, 1 infra_fault; ended by: 9 done" in told
    assert "4 rollouts trained, each once, all of them on record" in told


def test_a_history_that_does_not_add_up_is_an_error(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(run / "ledger")
    ledger.step(2, [2, 3], [(2, 0), (2, 0), (7, 1)], 18)
    ledger.close()
    assert main(["ledger", str(run)]) == 1
    told = capsys.readouterr().out
    assert "1 trained twice: ticket 2 attempt 0" in told
    assert "1 trained, but not on record: ticket 7 attempt 1" in told
    assert "3 finished, but not in the step it was for: ticket 2 attempt 1" in told


def test_damage_is_told_with_its_place_and_what_follows_is_read(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "ledger" / FILE
    offsets = [offset for offset, _ in read_frames(path)]
    data = bytearray(path.read_bytes())
    data[offsets[3] + 60] ^= 1
    path.write_bytes(bytes(data) + b"torn")
    damage = read_contents(path).damage
    assert [(d.offset, d.size_bytes, d.at_the_end) for d in damage] == [
        (offsets[3], offsets[4] - offsets[3], False),
        (len(data), 4, True),
    ]
    assert "rollout" in damage[0].what
    assert main(["ledger", str(run)]) == 1
    told = capsys.readouterr().out
    assert f"DAMAGED: {offsets[4] - offsets[3]} bytes at byte {offsets[3]}, held a rollout" in told
    assert "8 rollout" in told


def test_behind_damage_nothing_is_made_up(run: Path) -> None:
    """Whatever is cut or flipped: what is read was written, in the order it was written."""
    path = run / "ledger" / FILE
    whole = path.read_bytes()
    truth = [record for _, record in read_frames(path)]
    chance = random.Random(1)
    lost = 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 3)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        del data[chance.randrange(len(data) // 2, len(data) + 1) :]
        path.write_bytes(bytes(data))
        left = iter(truth)
        found = [f[1] for f in scan(path) if not isinstance(f, Damage)]
        assert all(record in left for record in found)  # a subsequence
        lost += len(truth) - len(found)
    assert lost > 200


def test_jsonl_holds_a_line_for_each_rollout(run: Path) -> None:
    out = run / "rollouts.jsonl"
    assert main(["ledger", str(run), "--export", str(out), "--tokens"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["ticket"], r["attempt"]) for r in rows] == [
        (t, a) for t in range(4) for a in range(2)
    ] + [(4, 0)]
    assert [r["trained_in_step"] for r in rows] == [1] * 4 + [None] * 5
    path = run / "ledger" / FILE
    first = next(record for _, record in read_frames(path) if record["kind"] == "rollout")
    context = decode(first["data"]).contexts[0]
    assert rows[0]["token_ids"] == [context.token_ids.tolist()]
    assert rows[0]["behavior_logprobs"] == [context.behavior_logprobs.tolist()]


def test_parquet_holds_the_same(run: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    jsonl, table = run / "r.jsonl", run / "r.parquet"
    for out in (jsonl, table):
        assert main(["ledger", str(run), "--export", str(out), "--tokens"]) == 0
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert parquet.read_table(table).to_pylist() == rows


def test_what_cannot_be_done_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ledger", str(tmp_path / "nothing")]) == 1
    assert "is not a run's folder" in capsys.readouterr().err
    assert main(["ledger", str(run), "--export", str(run / "r.csv")]) == 1
    assert ".jsonl or .parquet" in capsys.readouterr().err
    assert main(["ledger", str(run), "--tokens"]) == 1
    assert "add --export" in capsys.readouterr().err
