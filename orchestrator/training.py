"""The trainer, seen from the controller: steps that happen exactly once, whatever dies.

A step either is in the history or is not. If the trainer is lost, a fresh one loads the newest
checkpoint, takes the steps since then again from the batches kept here (the same batches in the
same order give the same weights), and the call that was cut off is made again.
"""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from loopwright.actors.weights import WeightManifest
from loopwright.orchestrator.cluster import Actor
from loopwright.orchestrator.faults import ActorLost, DeadlinePassed, RestartBudget

T = TypeVar("T")


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

    async def publish(self, version: int) -> WeightManifest:
        """Write the weights into the channel; what engines are to read."""

        async def call() -> WeightManifest:
            manifest: WeightManifest = await self._call(
                "publish", version, waiting_for=f"publish of {version}"
            )
            return manifest

        return await self._robustly(call)

    async def save(self, folder: Path, step: int) -> None:
        """Save weights and trainer state into `folder`, which is made anew."""

        async def call() -> None:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir(parents=True)
            await self._call("save", str(folder), waiting_for=f"checkpoint of step {step}")

        await self._robustly(call)

    def saved(self, folder: Path, step: int) -> None:
        """`folder` is in place under its final name: recovery begins there."""
        self._checkpoint = folder
        self._since = [(s, batch) for s, batch in self._since if s > step]

    async def _robustly(self, work: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await work()
            except (ActorLost, DeadlinePassed) as error:
                self._event("actor_lost", actor=self._actor.name, why=str(error))
                self._restarts.spend(str(error))
                await self._rebuild(kill=isinstance(error, DeadlinePassed))

    async def _rebuild(self, *, kill: bool) -> None:
        started = asyncio.get_running_loop().time()
        while True:
            try:
                if kill:
                    await self._actor.restart()
                await self._load()
                for step, batch in self._since:
                    await self._call("step", step, batch, waiting_for=f"step {step}, again")
                break
            except ActorLost as error:
                kill = False
                self._restarts.spend(str(error))
                await asyncio.sleep(0.5)
        seconds = asyncio.get_running_loop().time() - started
        self._event(
            "actor_back",
            actor=self._actor.name,
            seconds=round(seconds, 3),
            steps_again=len(self._since),
        )

    async def _load(self) -> None:
        await self._call("ping", waiting_for="trainer to start", timeout_s=self._start_s)
        if self._checkpoint is not None:
            await self._call(
                "load", str(self._checkpoint), waiting_for=f"load of {self._checkpoint}"
            )
        else:
            await self._call("reset", self._initial, waiting_for=f"load of {self._initial}")

    async def _call(
        self, method: str, *args: Any, waiting_for: str, timeout_s: float | None = None
    ) -> Any:
        return await self._actor.call(
            method, *args, timeout_s=timeout_s or self._step_s, waiting_for=waiting_for
        )
