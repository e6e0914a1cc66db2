"""The parts of a run and the verbs of its loop: each verb is timed, recorded, and safe to repeat
after a crash."""

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopwright.actors.episode import EpisodeLimits
from loopwright.algorithms.batching import BatchReport, build_batch, smallest_group
from loopwright.algorithms.records import Group, TrainBatch, encode
from loopwright.envs.protocol import Task
from loopwright.orchestrator.buffer import GroupBuffer
from loopwright.orchestrator.evaluation import evaluate
from loopwright.orchestrator.faults import DeadlinePassed, RunError
from loopwright.orchestrator.groups import Groups
from loopwright.orchestrator.ledger import Ledger, LedgerError
from loopwright.orchestrator.pool import Pool
from loopwright.orchestrator.recorder import Recorder
from loopwright.orchestrator.room import Room
from loopwright.orchestrator.scaling import Scaling
from loopwright.orchestrator.tasks import TaskStream
from loopwright.orchestrator.training import Training
from loopwright.orchestrator.watchdog import Watchdog


@dataclass(slots=True, kw_only=True)
class Parts:
    """Everything one run is made of; `loop.train` reads as its verbs."""

    folder: Path
    steps: int
    samplers: int  # groups played at the same time, at most
    advantage: str
    drop_below: float
    step_timeout_s: float
    max_seconds: float  # 0: no limit
    eval_every: int
    checkpoint_every: int
    keep_checkpoints: int
    eval_limits: EpisodeLimits
    eval_tasks: list[Task]
    eval_seed: int
    stream: TaskStream
    buffer: GroupBuffer
    groups: Groups
    pool: Pool
    training: Training
    watchdog: Watchdog
    ledger: Ledger
    recorder: Recorder
    by_turns: bool = False  # trainer and engines share a device
    room: Room = field(default_factory=lambda: Room(sys.maxsize))  # for groups being played
    scaling: Scaling | None = None  # who is told how many of whom there are to be
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    report: BatchReport | None = None
    started: float = field(default_factory=time.monotonic)

    async def take(self, step: int) -> list[Group] | None:
        """The groups of this step; None once the run was asked to stop or its time is over."""
        if self.stop.is_set() or (
            self.max_seconds and time.monotonic() - self.started > self.max_seconds
        ):
            return None
        with self.recorder.timed("take"):
            taking = asyncio.ensure_future(self.buffer.take(timeout_s=self.step_timeout_s))
            stopping = asyncio.ensure_future(self.stop.wait())
            try:
                await asyncio.wait([taking, stopping], return_when=asyncio.FIRST_COMPLETED)
                return taking.result() if taking.done() else None
            except DeadlinePassed as error:
                raise DeadlinePassed(f"{error}; {self.watchdog.longest()}") from None
            finally:
                taking.cancel()
                stopping.cancel()

    def batch(self, step: int, groups: Sequence[Group]) -> TrainBatch:
        """Filter, advantage, flatten. A group with too few rollouts for a baseline is left out."""
        batch, self.report = build_batch(self._whole(groups), step, self.advantage, self.drop_below)
        return batch

    def _whole(self, groups: Sequence[Group]) -> list[Group]:
        least = smallest_group(self.advantage)
        return [group for group in groups if len(group.rollouts) >= least]

    async def update(self, step: int, batch: TrainBatch) -> None:
        """The trainer's step; where they share a device, after the engines have gone to sleep."""
        if self.by_turns:
            await self.pool.sleep()
        with self.recorder.timed("train"):
            self.recorder.add(await self.training.step(step, encode(batch)))

    async def publish(self, step: int) -> None:
        """Trainer → channel → every engine, proven by checksums."""
        with self.recorder.timed("publish"):
            manifest = await self.training.publish(step, self.pool.members())
            reports = await self.pool.publish(manifest)
        self.recorder.published(manifest, reports)

    async def record(self, step: int, groups: Sequence[Group]) -> None:
        """Ledger first, then metrics."""
        trained = [(g.ticket, r.attempt) for g in self._whole(groups) for r in g.rollouts]
        unused = self.groups.unused(groups)
        tickets = [g.ticket for g in groups]
        self.ledger.step(step, tickets, trained, self.recorder.weights_checksum)
        self.stream.forget_before(self.buffer.oldest)
        self.recorder.unused(unused)
        assert self.report is not None, "batch comes first"
        self.recorder.step(step, self.report, groups, self.pool, self.buffer)

    async def watch(self) -> None:
        """For ever: look after everyone, and let actors join and leave as asked."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.pool.watch())
            if self.scaling is not None:
                tasks.create_task(self.scaling.watch())

    async def play_group(self, ticket: int) -> Group:
        """All rollouts of a ticket's task that its step waits for."""
        return await self.groups.play(ticket)

    def evaluation_due(self, step: int) -> bool:
        """After every `eval_every` steps, and after the last."""
        return step == self.steps or bool(self.eval_every and step % self.eval_every == 0)

    async def evaluate(self, step: int) -> float:
        """Held-out success at this version, 0–1."""
        with self.recorder.timed("evaluate"):
            metrics = await evaluate(
                self.pool,
                self.eval_tasks,
                self.eval_limits,
                seed=self.eval_seed,
                timeout_s=self.step_timeout_s,
                progress=self.recorder.progress("evaluate"),
            )
        self.recorder.evaluated(step, metrics)
        return metrics["eval/success"]

    def checkpoint_due(self, step: int) -> bool:
        """After every `checkpoint_every` steps, and after the last."""
        return step == self.steps or bool(
            self.checkpoint_every and step % self.checkpoint_every == 0
        )

    async def checkpoint(self, step: int) -> Path:
        """Write `checkpoints/step-N` aside, then rename it: it is whole or it is not there."""
        final = self.folder / "checkpoints" / f"step-{step}"
        aside = final.with_name(f"{final.name}.partial")
        with self.recorder.timed("checkpoint"):
            try:
                await self.training.save(aside, step)
                state = {"step": step, **self.recorder.state()}
                (aside / "run_state.json").write_text(json.dumps(state, indent=1))
                await asyncio.to_thread(_put_in_place, aside, final)
            except OSError as error:
                raise LedgerError(
                    f"cannot write {final}: {error.strerror or error}; the ledger holds every "
                    "finished rollout: free space, then run the same command with --resume"
                ) from error
        self.training.saved(final, step)
        self.ledger.checkpoint(step)
        self.ledger.forget_before(step)
        self.recorder.event("checkpoint", step=step, path=str(final))
        self._drop_checkpoints()
        return final

    async def close(self) -> None:
        """Stop recovering actors, and let go of the shared memory."""
        await self.watchdog.close()
        await self.pool.close()
        await self.training.close()

    def _drop_checkpoints(self) -> None:
        kept = checkpoints(self.folder)
        for _, path in kept[: -self.keep_checkpoints]:
            shutil.rmtree(path, ignore_errors=True)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint of a run, oldest first."""
    found = (folder / "checkpoints").glob("step-*")
    whole = [
        (int(p.name.removeprefix("step-")), p)
        for p in found
        if p.name.removeprefix("step-").isdigit()
    ]
    return sorted((step, path) for step, path in whole if (path / "run_state.json").exists())


def _put_in_place(aside: Path, final: Path) -> None:
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_run_state(path: Path) -> dict[str, Any]:
    """What the controller knew when the checkpoint at `path` was written."""
    try:
        state: dict[str, Any] = json.loads((path / "run_state.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}/run_state.json cannot be read: {error}") from error
    return state
