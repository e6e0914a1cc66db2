"""A recorded asynchronous run, sampled and trained again: every token, to the bit."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loopwright.actors.decode_batch import DecodeBatch
from loopwright.actors.engine import Completion, GenerateRequest
from loopwright.actors.journal import Entry, Journal, decode, encode
from loopwright.actors.torch_backend import TorchBackend
from loopwright.actors.torch_model import load_model
from loopwright.actors.trainer_backend import TrainerSettings, published_tensors
from loopwright.orchestrator.cli import DONE, FAILED, main
from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.ledger import FILE, read
from loopwright.orchestrator.replay_generation import replay_generation
from loopwright.orchestrator.sampling_record import FILE as SAMPLING
from loopwright.orchestrator.sampling_record import read as read_sampling
from tests.tiny_run import train


def _requests(count: int) -> list[GenerateRequest]:
    random = np.random.default_rng(0)
    return [
        GenerateRequest(
            request_id=f"r{i}",
            session=f"s{i}",
            prompt_ids=random.integers(0, 300, 5 + 3 * i).astype(np.int32),
            max_new_tokens=12,
            stop_token_ids=(),
            seed=i,
        )
        for i in range(count)
    ]


def _batch(policy: str) -> DecodeBatch:
    model = load_model(policy, dtype="float32", device="cpu", max_context=128)
    return DecodeBatch(model, max_concurrency=8, max_context=128, kv_bytes=1 << 24)


def test_a_journal_is_enough_to_decode_the_same_bits_again(policy: str) -> None:
    """Requests that join and leave at different steps, and new weights in the middle."""
    first, requests, found = _batch(policy), _requests(6), dict[str, Completion]()
    weights = {k: v * 1.01 for k, v in first._model.prepare(_state(policy)).items()}

    def steps(batch: DecodeBatch, into: dict[str, Completion], count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                into |= {e.request.request_id: e.result for e in batch.step()}  # type: ignore[misc]

    for number, request in enumerate(requests):
        first.add(request, 12)
        steps(first, found, 2)
        if number == 3:
            first.cancel("r1")
            first.install(weights, 1, recompute=True)
    steps(first, found, 12)
    first.install(weights, 2)
    entries = [e for segment in first.journal.take() for e in decode(segment).entries]
    again, same, by_name = (
        _batch(policy),
        dict[str, Completion](),
        {r.request_id: r for r in requests},
    )
    for entry in entries:
        if entry.kind == "add":
            again.add(by_name[str(entry.of)], 12)
        elif entry.kind == "cancel":
            again.cancel(str(entry.of))
        elif entry.kind == "install":
            again.install(weights, int(entry.of), recompute=entry.recompute)
        else:
            steps(again, same, int(entry.of))
    assert sorted(found) == sorted(same) == ["r0", "r2", "r3", "r4", "r5"]
    for name, completion in found.items():
        for field in ("token_ids", "logprobs", "versions"):
            np.testing.assert_array_equal(getattr(completion, field), getattr(same[name], field))
    assert len({int(v) for c in found.values() for v in c.versions}) == 2


def _state(policy: str) -> dict[str, torch.Tensor]:
    return published_tensors(TorchBackend(TrainerSettings(model_path=policy)))


def test_segments_end_where_weights_are_installed() -> None:
    journal = Journal()
    journal.note("install", 0)
    journal.note("add", "a")
    journal.step()
    journal.step()
    assert journal.take() == ()
    journal.note("install", 1, recompute=True)
    (segment,) = journal.take()
    found = decode(segment)
    assert found.entries == (Entry("install", 0), Entry("add", "a"), Entry("step", 2))
    assert found.version == 0 and journal.take() == () and decode(encode(found)) == found


RUNS: list[tuple[str, ...]] = [
    ("rollout.engines=2", "run.eval_every=1", "run.steps=4"),
    ("rollout.on_update=recompute", "rollout.max_lag=2", "rollout.concurrency=5", "run.steps=4"),
    (
        "rollout.cut=0.5",
        "rollout.cut_group=0.5",
        "rollout.dynamic_sampling=true",
        "rollout.on_update=finish",
        "run.steps=4",
    ),
]


@pytest.mark.parametrize("settings", RUNS, ids=["engines", "recompute", "cut"])
def test_a_run_is_sampled_again_to_the_bit(
    tmp_path: Path, policy: str, settings: tuple[str, ...]
) -> None:
    code, folder = train(tmp_path, policy, *settings)
    assert code == DONE
    steps = list(replay_generation(folder))
    assert [s.step for s in steps] == [1, 2, 3, 4] and all(s.equal for s in steps)
    assert sum(s.tokens for s in steps) > 100
    assert len(set(read(folder / "ledger" / FILE).checksums.values())) > 2, "nothing was learned"


def test_a_run_from_nothing_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The untouched policy was evaluated while its clone was made: other weights of version 0."""
    code, folder = train(
        tmp_path, "tiny", "warm_start.demonstrations=8", "warm_start.steps=4", "run.steps=2"
    )
    assert code == DONE
    capsys.readouterr()
    assert main(["replay", str(folder), "--generation"]) == DONE
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and all("8 of 8 rollouts" in line for line in told)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, policy: str) -> Path:
    code, folder = train(tmp_path_factory.mktemp("run"), policy)
    assert code == DONE
    return folder


def test_what_differs_is_told(run: Path, tmp_path: Path) -> None:
    changed = _changed(run, tmp_path, "weight_decay = 0.01", "weight_decay = 0.5")
    first = next(iter(replay_generation(changed)))
    assert not first.equal and not first.different_rollouts and "OTHER WEIGHTS" in first.text()
    assert main(["replay", str(changed), "--generation"]) == FAILED


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('engine = "torch"', 'engine = "vllm"', "does not record"),
        ("engines = 1", "engines = 2", "1 of 2 engines"),
    ],
)
def test_what_cannot_be_sampled_again_is_refused(
    run: Path, tmp_path: Path, before: str, after: str, words: str
) -> None:
    with pytest.raises(RunError, match=words):
        next(iter(replay_generation(_changed(run, tmp_path, before, after))))


def test_a_resumed_run_is_refused(tmp_path: Path, policy: str) -> None:
    train(tmp_path, policy, "run.steps=2")
    code, folder = train(tmp_path, policy, "run.steps=4", resume=True)
    assert code == DONE
    with pytest.raises(RunError, match="resumed"):
        next(iter(replay_generation(folder)))


def test_without_a_record_there_is_nothing_to_go_by(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "ledger" / SAMPLING).unlink()
    with pytest.raises(RunError, match="was not recorded"):
        next(iter(replay_generation(copy)))


def test_the_record_holds_every_episode_once(run: Path) -> None:
    recorded = read_sampling(run / "ledger" / SAMPLING)
    of_training = [e for e in recorded.episodes.values() if e.ticket >= 0]
    played = {(e.ticket, e.attempt) for e in of_training}
    assert played >= {(ticket, k) for ticket in range(6) for k in range(4)}
    assert all(session == e.session for session, e in recorded.episodes.items())
    assert any(e.ticket < 0 for e in recorded.episodes.values()), "evaluations"


def _changed(run: Path, folder: Path, before: str, after: str) -> Path:
    copy: Any = shutil.copytree(run, folder / "changed")
    config = (copy / "config.toml").read_text()
    assert before in config
    (copy / "config.toml").write_text(config.replace(before, after))
    return Path(copy)


def test_a_request_that_nobody_makes_is_told(policy: str) -> None:
    from loopwright.actors.engine import EngineSettings
    from loopwright.actors.replay_engine import ReplayEngine, ReplayError

    settings = EngineSettings(model_path=policy, max_context=128)
    engine = ReplayEngine(settings, begin=lambda request, engine: None, patience_s=0.05)
    with pytest.raises(ReplayError, match=r"a/0\.1 was served here"):
        asyncio.run(engine.apply(Entry("add", "a/0.1"), lambda version: {}))
