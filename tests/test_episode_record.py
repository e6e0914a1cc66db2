"""Episodes outlive the process that plays them, where their world is deterministic."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loopwright.actors.engine import Completion, FinishReason, GenerateRequest
from loopwright.actors.env_worker import EnvWorker, EpisodeOrder, WorkerSettings
from loopwright.actors.episode import EpisodeLimits
from loopwright.actors.episode_record import EpisodeRecords
from loopwright.actors.tiny_model import train_tokenizer
from loopwright.algorithms.records import Outcome, Rollout, decode
from loopwright.envs.protocol import Task, encode_task

WORLDS = Path(__file__).parent / "fault_envs.py"
TASK = Task(environment="letters", id="train-0-1", seed=1, split="train", scenario="letters")
ORDER = EpisodeOrder(
    key="1",
    task=encode_task(TASK),
    attempt=0,
    engine=0,
    seed=3,
    priority=0,
    limits=EpisodeLimits(
        max_turns=4, max_new_tokens=8, max_context=200, timeout_s=20, temperature=1.0
    ),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["write 0 1 2 abc"] * 3, vocab_size=300).save_pretrained(folder)
    return str(folder)


class Numbered:
    """Says another token in every turn, until it is told to keep silent."""

    def __init__(self, turns: int) -> None:
        self.asked: list[GenerateRequest] = []
        self.silent = asyncio.Event()
        self._turns = turns

    async def __call__(self, request: GenerateRequest) -> Completion:
        self.asked.append(request)
        if len(self.asked) > self._turns:
            self.silent.set()
            await asyncio.Event().wait()
        turn = int(request.request_id.rpartition("/")[2].partition(".")[0])
        return Completion(
            request_id=request.request_id,
            token_ids=np.array([10 + turn, 5], np.int32)[request.sampled :],
            logprobs=np.array([-0.5 - turn, -0.25], np.float32)[request.sampled :],
            versions=np.full(2 - request.sampled, turn, np.int32),
            finish_reason=FinishReason.STOP,
        )

    async def cancel(self, request_id: str) -> bool:
        raise AssertionError("cancel")


def _played_by_two(
    tokenizer: str, folder: Path, world: str, turns: int
) -> tuple[Rollout, Numbered, Numbered]:
    """An episode whose worker is lost after `turns` turns, and the one who goes on with it."""
    (folder / "episodes").mkdir()
    settings = WorkerSettings(
        environment=f"{WORLDS}:{world}",
        options={"folder": str(folder), "pause_s": 0.0},
        tokenizer_path=tokenizer,
        records=str(folder / "episodes"),
    )

    async def body() -> tuple[Rollout, Numbered, Numbered]:
        lost, next_one = EnvWorker(settings), EnvWorker(settings)
        before, after = Numbered(turns), Numbered(99)
        await lost.start({0: before})
        await next_one.start({0: after})
        playing = asyncio.create_task(lost.play(ORDER))
        await before.silent.wait()
        # a process that is killed leaves its file as it is, maybe with a torn end
        (left,) = (folder / "episodes").iterdir()
        data = left.read_bytes()
        playing.cancel()
        await asyncio.wait([playing])
        left.write_bytes(data + data[:20])
        async with asyncio.timeout(20):
            outcome = await next_one.play(replace(ORDER, life=1))
        assert isinstance(outcome, bytes)
        await next_one.close()
        return decode(outcome), before, after

    return asyncio.run(body())


@pytest.mark.parametrize("turns", [1, 3])
def test_another_worker_goes_on_with_the_turns_of_one_that_was_lost(
    tokenizer: str, tmp_path: Path, turns: int
) -> None:
    rollout, before, after = _played_by_two(tokenizer, tmp_path, "Chatty", turns)
    assert (rollout.turns, rollout.saved_tokens) == (4, 2 * turns)
    (context,) = rollout.contexts
    said = [token for turn in range(4) for token in (10 + turn, 5)]
    assert context.token_ids[context.action_mask].tolist() == said
    logprobs = [value for turn in range(4) for value in (-0.5 - turn, -0.25)]
    assert context.behavior_logprobs[context.action_mask].tolist() == logprobs
    assert context.policy_versions[context.action_mask].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(after.asked) == 4 - turns, "no turn is sampled twice"
    assert after.asked[0].prompt_ids.tolist() == before.asked[-1].prompt_ids.tolist()
    names = {request.request_id for engine in (before, after) for request in engine.asked}
    assert len(names) == len(before.asked) + len(after.asked)


def test_a_world_that_answers_otherwise_is_a_fault_that_says_so(
    tokenizer: str, tmp_path: Path
) -> None:
    rollout, _, after = _played_by_two(tokenizer, tmp_path, "Forgetful", 2)
    assert rollout.outcome is Outcome.INFRA_FAULT
    assert "letters raised in resume: WorldDiffers: before turn 1 it does not say" in rollout.fault
    assert after.asked == []


def test_segments_of_episodes_that_are_over_are_removed(tmp_path: Path) -> None:
    records = EpisodeRecords(tmp_path, segment_bytes=300)
    prompt, said = np.arange(5, dtype=np.int32), np.array([7, 8], np.int32)
    piece = Completion(
        request_id="r",
        token_ids=said,
        logprobs=np.zeros(2, np.float32),
        versions=np.zeros(2, np.int32),
        finish_reason=FinishReason.STOP,
    )
    long = records.open("long", 0)
    long.add(0, prompt, piece)
    for number in range(20):
        short = records.open(f"{number}", 0)
        short.add(0, prompt, piece)
        short.close()
    assert len(list(tmp_path.iterdir())) == 2, "that of the long one and the present one"
    found = EpisodeRecords(tmp_path).open("long", 3).pieces(0, prompt)
    assert [p.token_ids.tolist() for p in found] == [[7, 8]]
    later = EpisodeRecords(tmp_path).open("long", 4)
    assert [p.token_ids.tolist() for p in later.pieces(0, prompt)] == [[7, 8]], "not twice"
    assert later.pieces(1, prompt) == []
