"""The trainer, seen from the controller: steps that happen exactly once, whatever dies.

A step either is in the history or is not. If the trainer is lost, a fresh one loads the newest
checkpoint, takes the steps since then again from the batches kept here (the same batches in the
same order give the same weights), and the call that was cut off is made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from loopwright.actors.weights import ChannelLost, WeightManifest
from loopwright.orchestrator.faults import (
    ActorGone,
    ActorLost,
    DeadlinePassed,
    RestartBudget,
    RunError,
)
from loopwright.orchestrator.processes import Actor
from loopwright.orchestrator.upbringing import not_back

if TYPE_CHECKING:
    from loopwright.actors.dry_run import DryRun
    from loopwright.actors.model_identity import ModelIdentity

T = TypeVar("T")
_CLOSE_S = 10.0


class Training:
    """One trainer actor and what is needed to rebuild its state."""

    def __init__(
        self,
        actor: Actor,
        *,
        initial: str,
        start_s: float,
        step_s: float,
        restarts: RestartBudget,
        event: Callable[..., None],
    ) -> None:
        self._actor = actor
        self._start_s = start_s
        self._step_s = step_s
        self._restarts = restarts
        self._event = event
        self._checkpoint: Path | None = None
        self._since: list[tuple[int, bytes]] = []  # steps taken after the checkpoint
        self._initial = initial  # model path of version 0
        self._pid = 0  # of the process that holds the state; another one knows nothing

    async def start(self, checkpoint: Path | None) -> None:
        """Wait for the trainer, and load `checkpoint` if there is one."""
        self._checkpoint = checkpoint
        await self._robustly(self._load)

    async def reset(self, model_path: str) -> None:
        """Begin from these weights as version 0, with a fresh optimizer."""
        self._initial = model_path
        await self._robustly(self._load)

    async def step(self, step: int, batch: bytes) -> dict[str, float]:
        """One trip through the optimizer; its metrics."""

        async def call() -> dict[str, float]:
            metrics: dict[str, float] = await self._call(
                "step", step, batch, waiting_for=f"step {step}"
            )
            return metrics

        metrics = await self._robustly(call)
        self._since.append((step, batch))
        return metrics

    async def publish(self, version: int, members: tuple[str, ...] = ()) -> WeightManifest:
        """Send the weights on their way to the engines that `members` names; how they are to take
        them."""

        async def call() -> WeightManifest:
            manifest: WeightManifest = await self._call(
                "publish", version, members, waiting_for=f"publish of {version}"
            )
            return manifest

        return await self._robustly(call)

    async def resend(self, version: int, members: tuple[str, ...]) -> WeightManifest:
        """What was published last, for engines that missed it, also while a step is taken. Raises
        `ChannelLost` where the trainer cannot send it now."""
        try:
            manifest: WeightManifest = await self._call(
                "resend", version, members, waiting_for=f"another send of {version}"
            )
        except (ActorLost, DeadlinePassed) as error:
            raise ChannelLost(f"version {version} cannot be sent again: {error}") from error
        return manifest

    async def dry_run(self, longest: int) -> DryRun:
        """What the trainer needs for contexts of `longest` tokens; it ends the run if that does not
        fit."""

        async def call() -> DryRun:
            found: DryRun = await self._call("dry_run", longest, waiting_for="dry run")
            return found

        return await self._robustly(call)

    async def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """Logprobs [T-1] of given tokens [T] under the current weights."""

        async def call() -> np.ndarray:
            found: np.ndarray = await self._call("probe", token_ids, waiting_for="probe")
            return found

        return await self._robustly(call)

    async def identity(self) -> ModelIdentity:
        """What its weights were loaded from."""

        async def call() -> ModelIdentity:
            found: ModelIdentity = await self._call("identity", waiting_for="its tokenizer")
            return found

        return await self._robustly(call)

    async def save(self, folder: Path, step: int) -> None:
        """Save weights and trainer state into `folder`, which is made anew. Raises `OSError`."""

        async def call() -> None:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir(parents=True)
            await self._call("save", str(folder), waiting_for=f"checkpoint of step {step}")

        await self._robustly(call)

    def saved(self, folder: Path, step: int) -> None:
        """`folder` is in place under its final name: recovery begins there."""
        self._checkpoint = folder
        self._since = [(s, batch) for s, batch in self._since if s > step]

    async def close(self) -> None:
        """Let go of the shared memory. The process is the cluster's to end."""
        with contextlib.suppress(RunError):  # a dead trainer's is dropped by the next of this run
            await self._actor.call("close", timeout_s=_CLOSE_S, waiting_for="trainer to close")

    async def _robustly(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do it, and if the trainer is lost meanwhile, rebuild it and do it again."""
        lost: RunError | None = None
        began = 0.0
        while True:
            try:
                if lost is not None:
                    await self._rebuild(lost, began)
                    lost = None
                return await work()
            except ActorGone:
                raise
            except (ActorLost, DeadlinePassed) as error:
                self._event("actor_lost", actor=self._actor.name, pid=self._pid, why=str(error))
                self._restarts.spend(str(error))
                lost, began = error, asyncio.get_running_loop().time()

    async def _rebuild(self, lost: RunError, began: float) -> None:
        if isinstance(lost, DeadlinePassed):
            await self._actor.restart()
        await self._until_it_answers()
        await self._load()
        for step, batch in self._since:
            await self._call("step", step, batch, waiting_for=f"step {step}, again")
        seconds = asyncio.get_running_loop().time() - began
        self._event(
            "actor_back",
            actor=self._actor.name,
            seconds=round(seconds, 3),
            steps_again=len(self._since),
        )

    async def _until_it_answers(self) -> None:
        """While Ray restarts it, calls fail at once; later ones wait for it."""
        try:
            async with asyncio.timeout(self._start_s):
                while True:
                    try:
                        return await self._ping()
                    except ActorGone:
                        raise
                    except ActorLost:
                        await asyncio.sleep(0.2)
        except TimeoutError:
            raise not_back(self._actor, self._start_s, await self._actor.lacks()) from None

    async def _ping(self) -> None:
        answer = await self._actor.call(
            "ping", timeout_s=self._start_s, waiting_for="trainer to start"
        )
        pid = int(answer["pid"])
        if pid != self._pid:
            self._pid = pid
            self._event("actor_up", actor=self._actor.name, pid=pid)

    async def _load(self) -> None:
        """Wait for the trainer, and put it at the newest checkpoint, or at the beginning."""
        await self._ping()
        if self._checkpoint is not None:
            await self._call(
                "load", str(self._checkpoint), waiting_for=f"load of {self._checkpoint}"
            )
        else:
            await self._call("reset", self._initial, waiting_for=f"load of {self._initial}")

    async def _call(self, method: str, *args: Any, waiting_for: str) -> Any:
        """Call the process that holds the state. One that Ray restarted since answers too, as if
        nothing had been trained: so its process id is asked for first."""
        answer = await self._actor.call("ping", timeout_s=self._step_s, waiting_for=waiting_for)
        if int(answer["pid"]) != self._pid:
            raise ActorLost(f"{self._actor.name}: restarted before {waiting_for}")
        return await self._actor.call(
            method, *args, timeout_s=self._step_s, waiting_for=waiting_for
        )
