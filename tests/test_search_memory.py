"""Constant memory end to end: what the sampler saw is what the trainer trains on, instance by
instance."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from loopwright.actors.chat import ChatFormat
from loopwright.actors.cloning import clone
from loopwright.actors.demonstrations import demonstrate, texts, tokenize
from loopwright.actors.engine import Completion, EngineSettings, FinishReason, GenerateRequest
from loopwright.actors.episode import EpisodeLimits, play_episode
from loopwright.actors.rollout import RolloutActor
from loopwright.actors.tiny_model import build_tiny_policy, train_tokenizer
from loopwright.actors.trainer import Trainer
from loopwright.actors.trainer_backend import TrainerSettings
from loopwright.algorithms.records import Outcome, Rollout
from loopwright.envs.search import Search

LIMITS = EpisodeLimits(
    max_turns=0, max_new_tokens=48, max_context=256, timeout_s=60.0, temperature=1.0
)


def _env(objectives: int = 2) -> Search:
    return Search(
        style="compact", entities=100, hops=[1], memory="constant", documents=2,
        objectives=objectives, noise=0.3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy that was shown the form of a turn, and little more."""
    folder, env = tmp_path_factory.mktemp("policy"), _env()
    found = [asyncio.run(demonstrate(env, task)) for task in islice(env.tasks("train", 1), 60)]
    shape = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 48}
    base = build_tiny_policy(texts(found), folder / "base", **shape, vocab_size=420)
    chat = ChatFormat.load(str(base))
    contexts = [context for d in found for context in tokenize(d, chat)]
    clone(str(base), contexts, folder / "cloned", steps=110, batch=8, lr=1e-2)
    return str(folder / "cloned")


async def _played(policy: str) -> tuple[list[Rollout], Trainer]:
    trainer = Trainer(TrainerSettings(model_path=policy), "search-memory-test")
    actor = RolloutActor(
        "torch",
        EngineSettings(
            model_path=policy, dtype="float32", device="cpu", max_concurrency=8, max_context=256,
            kv_bytes=8 << 20, threads=1, options={},
        ),
    )  # fmt: skip
    await actor.start()
    try:
        await actor.update(trainer.publish(0), "continue")
        chat, tasks = ChatFormat.load(policy), list(islice(_env().tasks("train", 0), 8))
        return await asyncio.gather(
            *(
                play_episode(_env(), task, k, actor.generate, chat, LIMITS, seed=k, priority=0)
                for k, task in enumerate(tasks)
            )
        ), trainer
    finally:
        await actor.close()


def test_trainer_and_sampler_agree_token_by_token_in_every_instance(policy: str) -> None:
    rollouts, trainer = asyncio.run(_played(policy))
    try:
        assert all(r.outcome is Outcome.SCORED for r in rollouts)
        instances = [context for r in rollouts for context in r.contexts]
        several = [r for r in rollouts if len(r.contexts) > 1]
        assert len(several) >= 4 and sum("search/useful" in r.tool_errors for r in rollouts) >= 2
        for context in instances:
            mine = trainer.probe(context.token_ids)[context.action_mask[1:]]
            theirs = context.behavior_logprobs[context.action_mask]
            np.testing.assert_allclose(mine, theirs, atol=2e-4)
    finally:
        trainer.close()


def test_the_context_stays_as_short_while_the_transcript_grows(policy: str) -> None:
    chat = ChatFormat.load(policy)

    def peak(memory: str, objectives: int) -> int:
        env = Search(
            style="compact", entities=100, hops=[1], memory=memory, objectives=objectives,  # type: ignore[arg-type]
        )  # fmt: skip
        tasks = islice(env.tasks("train", 0), 20)
        contexts = [c for t in tasks for c in tokenize(asyncio.run(demonstrate(env, t)), chat)]
        return max(len(c.token_ids) for c in contexts)

    growth = {memory: peak(memory, 8) / peak(memory, 2) for memory in ("full", "constant")}
    assert growth["full"] > 3 and growth["constant"] < 2.3


class Scripted:
    """An agent that does what the oracle would, asked by the real episode loop."""

    def __init__(self, chat: ChatFormat, env: Search) -> None:
        self._chat, self._env = chat, env
        self._actions: Iterator[str] = iter(())

    async def __call__(self, request: GenerateRequest) -> Completion:
        if request.request_id.endswith("/0.1"):
            self._actions = self._env.oracle()
        said = self._chat.tokenizer.encode(next(self._actions), add_special_tokens=False)
        tokens = np.asarray([*said, self._chat.stop_token_ids[0]], np.int32)
        return Completion(
            request_id=request.request_id,
            token_ids=tokens,
            logprobs=np.zeros(tokens.size, np.float32),
            versions=np.zeros(tokens.size, np.int32),
            finish_reason=FinishReason.STOP,
        )


def test_peak_context_is_flat_from_two_to_eight_objectives_in_full_wording() -> None:
    """Flat but for what must grow with the objectives: their own text, and the answers found so
    far, which both stand in the context that is rebuilt."""
    style: dict[str, Any] = {"style": "full", "entities": 300, "hops": [1]}
    limits = replace(LIMITS, max_context=1 << 15, max_new_tokens=1 << 12)

    def env(memory: str, objectives: int) -> Search:
        return Search(memory=memory, objectives=objectives, **style)  # type: ignore[arg-type]

    shown = [
        asyncio.run(demonstrate(env("full", 2), task))
        for task in islice(env("full", 2).tasks("train", 1), 30)
    ]
    chat = ChatFormat(train_tokenizer(list(texts(shown)), vocab_size=2000))

    def peaks(memory: str, objectives: int) -> tuple[int, int]:
        """Most tokens of a context over all episodes; and of one without questions and answers."""
        played, peak, beside = env(memory, objectives), 0, 0
        for number, task in enumerate(islice(played.tasks("train", 0), 6)):
            agent = Scripted(chat, played)
            rollout = asyncio.run(
                play_episode(played, task, 0, agent, chat, limits, seed=number, priority=0)
            )
            assert rollout.reward == objectives, rollout.fault
            questions = task.payload["questions"]
            own = "; ".join(q["text"] + q["answers"][0] for q in questions)
            longest = max(c.token_ids.size for c in rollout.contexts)
            peak = max(peak, longest)
            beside = max(beside, longest - len(chat.tokenizer.encode(own)))
        return peak, beside

    full = [peaks("full", n)[0] for n in (2, 8)]
    constant, beside = zip(*(peaks("constant", n) for n in (2, 4, 8)), strict=True)
    assert full[1] / full[0] > 3
    assert constant[-1] / constant[0] < 1.6 and constant[-1] < full[0]
    assert max(beside) / min(beside) < 1.25
