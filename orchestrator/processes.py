"""A long-lived process, seen from the controller, and the cluster that gives it a place.

Implemented on Ray (cluster.py) and without processes (in_process.py).
"""

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from loopwright.actors.env_worker import EngineClient
from loopwright.orchestrator.inspection import Home
from loopwright.orchestrator.resources import Resources
from loopwright.orchestrator.trackers import Tracker


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What one process gets."""

    cpus: float = 1.0
    gpus: float = 0.0
    threads: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    shares_memory: bool = False  # with all others that do: they run on one node
    plays: bool = False  # environments: on the nodes set aside for them, if there are any


class Actor(Protocol):
    """One long-lived process, seen from the controller."""

    name: str

    async def call(self, method: str, *args: Any, timeout_s: float, waiting_for: str) -> Any:
        """Call a method. Raises `ActorLost`, `DeadlinePassed` (naming `waiting_for`), or what the
        method raised."""
        ...

    async def restart(self) -> None:
        """Kill the process and let a fresh one run the constructor; the actor stays the same."""
        ...

    def end(self) -> None:
        """Its work is done: free the process for good."""
        ...

    async def home(self, *, timeout_s: float) -> Home:
        """Where its process lives, asked of itself; raises as `call`."""
        ...

    async def lacks(self) -> str:
        """What the cluster lacks to run its process; empty where it has a place."""
        ...

    def generate_client(self) -> EngineClient:
        """A picklable callable that asks this rollout actor for a turn; raises `EngineLost` when it
        is gone."""
        ...


class Cluster(Protocol):
    """Where actors live."""

    description: str
    resources: Resources
    alone: bool  # it is this machine and no other
    head: str  # the address that all its nodes reach; empty where there is none

    def spawn(self, name: str, target: str, args: tuple[Any, ...], placement: Placement) -> Actor:
        """Start `module:Class` as an actor; returns before its constructor has run, or there is
        room for it."""
        ...

    def tracker(self, run_name: str) -> Tracker | None:
        """Where metrics are exported from this cluster; None if it exports none."""
        ...

    def shutdown(self) -> None:
        """End every actor spawned here, and the cluster too if this process started it."""
        ...


def load_target(target: str) -> Callable[..., Any]:
    """The class that `module:Class` names."""
    module, _, name = target.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return loaded


async def first_exception(*work: Awaitable[Any]) -> list[Any]:
    """Run side by side; the first failure cancels the rest and is raised as itself, not as a
    group."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
