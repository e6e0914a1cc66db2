"""Rollout actor: one process, one engine, and the rule that it serves nobody before it holds the
current weights."""

import asyncio
import os
from collections.abc import Callable

import numpy as np

from loopwright.actors.engine import (
    Completion,
    Engine,
    EngineSettings,
    EngineStats,
    GenerateRequest,
    OnUpdate,
    UpdateReport,
)
from loopwright.actors.envelopes import Answer, Envelope, PostOffice
from loopwright.actors.episode import EngineLost
from loopwright.actors.model_identity import ModelIdentity, model_identity
from loopwright.actors.weights import WeightManifest
from loopwright.configs.backends import load_backend


class RolloutActor:
    """Holds an engine. A fresh one (also after a restart) loads `start`, then `update`, and only
    then serves."""

    def __init__(
        self, engine: str | Callable[[EngineSettings], Engine], settings: EngineSettings
    ) -> None:
        """`engine` is a name of `rollout.engine`, or what builds one that has no name there."""
        build = load_backend("rollout.engine", engine) if isinstance(engine, str) else engine
        self._settings = settings
        self._engine: Engine = build(settings)
        self._post_office = PostOffice(self.generate, self.cancel)
        self._running: set[str] = set()  # request ids
        self._starting = asyncio.Lock()
        self._serving = False
        self._retired = False
        self._started = False

    async def start(self) -> int:
        """Load the engine unless that is done; the process id."""
        async with self._starting:
            if not self._started:
                await self._engine.start()
                self._started = True
        return os.getpid()

    async def generate(self, request: GenerateRequest) -> Completion:
        """Serve one turn. Raises `EngineLost` before the first `update`: a restarted process has no
        weights yet; and once it is retired."""
        self._refuse_unless_serving()
        self._running.add(request.request_id)
        try:
            return await self._engine.generate(request)
        finally:
            self._running.discard(request.request_id)

    async def exchange(self, envelope: Envelope) -> list[Answer]:
        """Many turns in one call: take in requests, answer with what is done (`PostOffice`).
        Raises `EngineLost` as `generate` does."""
        if not (self._retired and self._post_office.owes(envelope.sender)):
            self._refuse_unless_serving()
        return await self._post_office.exchange(envelope)

    async def cancel(self, request_id: str) -> bool:
        """End a turn early: its `generate` returns what it has. False if it is not running."""
        return self._serving and await self._engine.cancel(request_id)

    async def retire(self) -> int:
        """Serve nobody from now on: turns under way end with the tokens they have, and who asks
        again is told to go elsewhere. How many turns that cut off."""
        self._retired = True
        running = tuple(self._running)
        await asyncio.gather(*(self._engine.cancel(request_id) for request_id in running))
        return len(running)

    def _refuse_unless_serving(self) -> None:
        if self._retired:
            raise EngineLost("it leaves the run")
        if not self._serving:
            raise EngineLost("restarted, and not yet given the current weights")

    async def update(self, manifest: WeightManifest, on_update: OnUpdate) -> UpdateReport:
        """Take published weights and serve from them. Raises `EngineLost` in a process that was
        restarted and not started since."""
        if not self._started:
            raise EngineLost("restarted, and its engine is not loaded yet")
        report = await self._engine.update_weights(manifest, on_update)
        self._serving = True
        return report

    async def sleep(self) -> None:
        """`Engine.sleep`: stand still until the next `update`. Raises `EngineLost` in a process
        that was restarted and not started since."""
        if not self._started:
            raise EngineLost("restarted, and its engine is not loaded yet")
        await self._engine.sleep()

    async def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """`Engine.probe`: logprobs [T-1] float32 of given tokens, to compare with the trainer's."""
        return await self._engine.probe(token_ids)

    async def identity(self) -> ModelIdentity:
        """What it was started from."""
        return await asyncio.to_thread(
            model_identity, self._settings.model_path, self._settings.dtype
        )

    async def ping(self) -> EngineStats | None:
        """Proof of life; None before the engine is started."""
        return await self._engine.stats() if self._started else None

    async def close(self) -> None:
        """Free the engine."""
        self._serving = False
        if self._started:
            await self._engine.close()
