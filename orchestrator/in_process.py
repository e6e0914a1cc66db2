"""A cluster without processes: the same loop in this one, for reading along in a debugger and for
machines without Ray (`cluster.address = "none"`)."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loopwright.actors.engine import Completion, GenerateRequest
from loopwright.actors.env_worker import EngineClient
from loopwright.actors.episode import EngineLost
from loopwright.orchestrator.faults import DeadlinePassed
from loopwright.orchestrator.inspection import Home, home
from loopwright.orchestrator.processes import Actor, Placement, load_target
from loopwright.orchestrator.resources import Resources


class InProcessActor:
    """An actor without a process: the same object, called directly. Blocking methods run on a
    thread."""

    def __init__(self, name: str, build: Callable[[], Any]) -> None:
        self.name = name
        self._build = build
        self._object = build()

    async def call(self, method: str, *args: Any, timeout_s: float, waiting_for: str) -> Any:
        """As `Actor.call`; nothing can be lost here."""
        bound = getattr(self._object, method)
        work = (
            bound(*args) if asyncio.iscoroutinefunction(bound) else asyncio.to_thread(bound, *args)
        )
        try:
            return await asyncio.wait_for(work, timeout_s)
        except TimeoutError:
            raise DeadlinePassed(
                f"{self.name}: {waiting_for}: no answer within {timeout_s:g} s"
            ) from None

    async def restart(self) -> None:
        """A fresh object."""
        self._object = self._build()

    def end(self) -> None:
        """Forget the object."""
        self._object = None

    async def home(self, *, timeout_s: float) -> Home:
        """This process."""
        return home()

    async def lacks(self) -> str:
        """Nothing: this process is there."""
        return ""

    def generate_client(self) -> EngineClient:
        """The object's own `generate`, whichever object that is at the time."""
        return InProcessGenerate(self)

    @property
    def held(self) -> Any:
        """The object."""
        return self._object


@dataclass(frozen=True, slots=True)
class InProcessGenerate:
    """As `RayGenerate`, without a process in between."""

    actor: InProcessActor

    async def __call__(self, request: GenerateRequest) -> Completion:
        """One completion. Raises `EngineLost` where the actor was ended."""
        if self.actor.held is None:
            raise EngineLost(f"{self.actor.name}: it has left the run")
        completion: Completion = await self.actor.held.generate(request)
        return completion

    async def cancel(self, request_id: str) -> bool:
        """End a request early."""
        if self.actor.held is None:
            raise EngineLost(f"{self.actor.name}: it has left the run")
        cancelled: bool = await self.actor.held.cancel(request_id)
        return cancelled


class InProcess:
    """Everything in this process: for reading along in a debugger, and for machines without Ray."""

    description = "this process, no Ray"
    alone = True
    head = ""

    def __init__(self) -> None:
        self.resources = Resources.of_this_machine()

    def spawn(self, name: str, target: str, args: tuple[Any, ...], placement: Placement) -> Actor:
        """As `Cluster.spawn`; placement has no meaning here."""
        return InProcessActor(name, lambda: load_target(target)(*args))

    def tracker(self, run_name: str) -> None:
        """None: nothing is exported."""

    def shutdown(self) -> None:
        """Nothing to end."""
