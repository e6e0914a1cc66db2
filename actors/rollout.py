"""Rollout actor: one process, one engine, and the rule that it serves nobody before it holds the current weights."""

import importlib
import os

from loopwright.actors.engine import (
    Completion,
    Engine,
    EngineSettings,
    EngineStats,
    GenerateRequest,
    OnUpdate,
    UpdateReport,
)
from loopwright.actors.episode import EngineLost
from loopwright.actors.weights import WeightManifest

ENGINES = {
    "torch": "loopwright.actors.torch_engine:TorchEngine",
    "vllm": "loopwright.actors.vllm_engine:VllmEngine",
}


def build_engine(name: str, settings: EngineSettings) -> Engine:
    """The engine called `name`, not started."""
    module, _, cls = ENGINES[name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), cls)(settings)
    return engine


class RolloutActor:
    """Holds an engine. A fresh one (also after a restart) loads `start`, then `update`, and only then serves."""

    def __init__(self, engine: str, settings: EngineSettings) -> None:
        self._engine = build_engine(engine, settings)
        self._serving = False
        self._started = False

    async def start(self) -> int:
        """Load the engine unless that is done; the process id."""
        if not self._started:
            await self._engine.start()
            self._started = True
        return os.getpid()

    async def generate(self, request: GenerateRequest) -> Completion:
        """Serve one turn. Raises `EngineLost` before the first `update`: a restarted process has no weights yet."""
        if not self._serving:
            raise EngineLost("restarted, and not yet given the current weights")
        return await self._engine.generate(request)

    async def cancel(self, request_id: str) -> bool:
        """End a request early."""
        return await self._engine.cancel(request_id)

    async def update(self, manifest: WeightManifest, on_update: OnUpdate) -> UpdateReport:
        """Take published weights and serve from them."""
        report = await self._engine.update_weights(manifest, on_update)
        self._serving = True
        return report

    async def ping(self) -> EngineStats | None:
        """Proof of life; None before the engine is started."""
        return await self._engine.stats() if self._started else None

    async def close(self) -> None:
        """Free the engine."""
        self._serving = False
        if self._started:
            await self._engine.close()
