"""Replay of a whole asynchronous run in this process: every episode is played again, every token
sampled again, in the order that the schedule recorded, and every step trained on what comes of it.

The engines' batches are put together as they were (`actors.replay_engine`), so that tokens,
logprobs and versions are equal to the bit; rollouts and weights are compared with the ledger's.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loopwright.actors.chat import ChatFormat
from loopwright.actors.episode import FIRST_REQUEST, play_episode
from loopwright.actors.journal import Segment, decode
from loopwright.actors.replay_engine import ReplayEngine, ReplayError
from loopwright.actors.trainer import Trainer
from loopwright.actors.trainer_backend import published_tensors
from loopwright.algorithms import records
from loopwright.algorithms.batching import build_batch
from loopwright.algorithms.records import Group, Rollout
from loopwright.configs.schema import Config
from loopwright.envs import registry
from loopwright.orchestrator import assembly, ledger, sampling_record
from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.replay import (
    groups_of,
    open_trainer,
    published_checksum,
    recorded_run,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedStep:
    """One step, sampled and trained again."""

    step: int
    rollouts: int
    tokens: int  # chosen by the policy in them
    different_rollouts: int  # tokens, logprobs, versions or reward are not the recorded ones
    recorded: int  # checksum of the weights after the step
    now: int

    @property
    def equal(self) -> bool:
        """Whether everything is as recorded, to the bit."""
        return not self.different_rollouts and self.recorded == self.now

    def row(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "step": self.step,
            "rollouts": self.rollouts,
            "tokens": self.tokens,
            "different_rollouts": self.different_rollouts,
            "recorded": self.recorded,
            "now": self.now,
            "equal": self.equal,
        }

    def text(self) -> str:
        """A line."""
        same = self.rollouts - self.different_rollouts
        weights = "the same weights" if self.recorded == self.now else "OTHER WEIGHTS"
        return (
            f"step {self.step}: {same} of {self.rollouts} rollouts ({self.tokens} tokens) equal "
            f"bit for bit; weights recorded {self.recorded:08x}, now {self.now:08x}: {weights}"
        )


def replay_generation(folder: Path) -> Iterator[ReplayedStep]:
    """Sample and train the run in `folder` again, step by step.

    Raises `RunError` where the schedule cannot say how: another engine than torch's, a run that was
    resumed or lost an actor, or episodes that do not do again what they did.
    """
    config, state = recorded_run(folder)
    path = folder / "ledger" / sampling_record.FILE
    if not path.is_file():
        raise RunError(f"{folder}: no {sampling_record.FILE}: its generation was not recorded")
    recorded = sampling_record.read(path)
    _refuse_what_has_no_schedule(folder, config, recorded)
    with closing(open_trainer(config, folder)) as trainer, asyncio.Runner() as runner:
        again = _Again(config, state, recorded, trainer, _former_weights(config, folder))
        steps = again.steps()
        try:
            while (step := runner.run(_next(steps))) is not None:
                yield step
        except ReplayError as error:
            raise RunError(f"{folder}: {error}") from error
        finally:
            runner.run(again.close())


async def _next(steps: AsyncIterator[ReplayedStep]) -> ReplayedStep | None:
    return await anext(steps, None)


def _refuse_what_has_no_schedule(
    folder: Path, config: Config, recorded: sampling_record.Recorded
) -> None:
    if config.rollout.engine != "torch":
        raise RunError(
            f"{folder}: rollout.engine = {config.rollout.engine!r} does not record what it did; "
            "the generation of the torch engine can be replayed"
        )
    if len(recorded.segments) != config.rollout.engines:
        raise RunError(
            f"{folder}: {len(recorded.segments)} of {config.rollout.engines} engines have recorded "
            "what they did: the run ended before its first step, or took an engine's weights by "
            "another way than a publish"
        )
    for name, encoded in recorded.segments.items():
        segments = [decode(segment) for segment in encoded]
        versions = [segment.version for segment in segments]
        one_life = len({segment.life for segment in segments}) == 1
        if not one_life or versions[0] != 0 or not 1 <= len(versions) - versions[-1] <= 2:
            raise RunError(
                f"{folder}: {name} was restarted, or the run was resumed, or weights came by an "
                f"adapter: what its memory held then is not on record (versions {versions[:6]} …)"
            )


def _former_weights(config: Config, folder: Path) -> str:
    """What the engines held before the clone: a model folder."""
    initial = folder / "initial"
    return str(initial) if initial.is_dir() else config.model.path


@dataclass(slots=True)
class _Engine:
    engine: ReplayEngine
    segments: list[Segment]
    done: int = 0  # segments


@dataclass(slots=True)
class _Again:
    """The run, going on once more."""

    config: Config
    state: ledger.LedgerState
    recorded: sampling_record.Recorded
    trainer: Trainer
    former: str
    engines: list[_Engine] = field(default_factory=list)
    rollouts: dict[tuple[int, int], Rollout] = field(default_factory=dict)
    playing: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)
    weights: "dict[int, Mapping[str, torch.Tensor]]" = field(default_factory=dict)

    async def steps(self) -> AsyncIterator[ReplayedStep]:
        """Every step that the ledger has."""
        model = self.trainer.settings.model_path
        chat = ChatFormat.load(model)
        for name in sorted(self.recorded.segments):
            segments = [decode(segment) for segment in self.recorded.segments[name]]
            serving = ReplayEngine(
                assembly.engine_settings(self.config, model),
                begin=lambda request, engine: self._begin(request, engine, chat),
            )
            self.engines.append(_Engine(serving, segments))
        for step in sorted(self.state.trained):
            for engine in self.engines:
                await self._until(engine, version=step)
            yield await self._train(step)

    async def close(self) -> None:
        """Let go of episodes that never came to their end."""
        for task in self.playing.values():
            task.cancel()
        await asyncio.gather(*self.playing.values(), return_exceptions=True)

    async def _until(self, engine: _Engine, *, version: int) -> None:
        """Everything the engine did before it had the weights of `version`."""
        while engine.done < len(engine.segments):
            segment = engine.segments[engine.done]
            if segment.version >= version:
                return
            following = engine.segments[engine.done + 1 : engine.done + 2]
            replaced = [s for s in following if s.version == segment.version]  # by the clone's
            for entry in segment.entries:
                await engine.engine.apply(entry, self._former if replaced else self._weights_of)
            engine.done += 1

    def _weights_of(self, version: int) -> "Mapping[str, torch.Tensor]":
        if version not in self.weights:
            found = published_tensors(self.trainer.backend)
            self.weights = {version: {name: t.clone() for name, t in found.items()}}
        return self.weights[version]

    def _former(self, _version: int) -> "Mapping[str, torch.Tensor]":
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.former, dtype=torch.float32)
        return {name: t.clone() for name, t in model.state_dict().items()}

    def _begin(self, request: str, engine: ReplayEngine, chat: ChatFormat) -> None:
        """Start the episode that makes `request` first of all; one that is under way comes to its
        next request by itself."""
        session, _, turn = request.rpartition("/")
        former = self.playing.get(session)
        if former is not None and not former.done() and not engine.holds(session):
            return
        if session not in self.recorded.episodes or turn != FIRST_REQUEST:
            raise ReplayError(
                f"request {request} was served, and its episode makes another one or none: it does "
                "not go as it went"
            )
        if former is not None:
            former.cancel()  # taken back, or cut off: it is played anew
        episode = self.recorded.episodes[session]

        async def play() -> None:
            env = registry.load(
                self.config.environment.name, assembly.environment_options(self.config)
            )
            rollout = await play_episode(
                env,
                episode.task,
                episode.attempt,
                engine.generate,
                chat,
                episode.limits,
                seed=episode.seed,
                priority=episode.ticket,
            )
            await env.close()
            self.rollouts[episode.ticket, episode.attempt] = rollout

        self.playing[session] = asyncio.get_running_loop().create_task(play())

    async def _train(self, step: int) -> ReplayedStep:
        import torch

        recorded = groups_of(self.state, step)
        groups = [await self._again(group) for group in recorded]
        drop_below = assembly.drop_below(self.config)
        batch, _ = build_batch(groups, step, self.config.algorithm.advantage, drop_below)
        torch.set_num_threads(self.config.trainer.threads)
        self.trainer.step(step, records.encode(batch))
        pairs = [
            (now, then)
            for group, former in zip(groups, recorded, strict=True)
            for now, then in zip(group.rollouts, former.rollouts, strict=True)
        ]
        return ReplayedStep(
            step=step,
            rollouts=len(pairs),
            tokens=sum(then.generated_tokens for _, then in pairs),
            different_rollouts=sum(not same(now, then) for now, then in pairs),
            recorded=self.state.checksums[step],
            now=published_checksum(self.trainer, step),
        )

    async def _again(self, group: Group) -> Group:
        """The group as it came out now."""
        for _ in range(10_000):  # what an engine has handed out, episodes have yet to take
            missing = [r for r in group.rollouts if (group.ticket, r.attempt) not in self.rollouts]
            if not missing:
                break
            await asyncio.sleep(0)
        else:
            raise ReplayError(
                f"ticket {group.ticket}: attempts {[r.attempt for r in missing]} have not ended"
            )
        rollouts = tuple(self.rollouts.pop((group.ticket, r.attempt)) for r in group.rollouts)
        return Group(ticket=group.ticket, task_id=group.task_id, rollouts=rollouts)


def same(one: Rollout, other: Rollout) -> bool:
    """Whether two rollouts have the same tokens, logprobs, versions and reward, to the bit."""
    if len(one.contexts) != len(other.contexts) or one.reward != other.reward:
        return False
    names = ("token_ids", "action_mask", "behavior_logprobs", "policy_versions", "turn_ids")
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one.contexts, other.contexts, strict=True)
        for name in names
    )
